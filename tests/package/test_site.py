"""The site: each fence of Python in its guides runs, and every public name is in its reference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import randlora_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", ["nnx", "peft"])
def test_a_guide_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for fence in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL):
        exec(fence, scope)
    assert scope["model"]


def test_every_public_name_has_its_place():
    page = (DOCS / "api.md").read_text()
    told = set(re.findall(r"auto(?:class|function|exception|data):: (\w+)", page))
    assert told == set(randlora_jax.__all__) - {"AdapterParam"}  # flax's own class, told beside
    assert "AdapterParam" in page


def test_every_page_can_be_reached():
    listed = set()
    for tree in re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL):
        listed |= {line for line in tree.splitlines() if line and not line.startswith(":")}
    assert listed == {page.stem for page in DOCS.glob("*.md")} - {"index"}


@pytest.mark.long
def test_it_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "-b", "html", "-E", "-W", "--keep-going", "-q"]
    subprocess.run([*build, str(DOCS), str(tmp_path)], check=True, cwd=ROOT)
    assert "stack_adapters" in (tmp_path / "api.html").read_text()


def test_messages_are_read_as_the_source_builds_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import messages

    source = """
def check(x):
    if x:
        raise ConfigError(f"x={x!r}: expected " "none, found " + str(x))
    return TargetError("other")
"""
    (tmp_path / "source.py").write_text(source)
    first, second = messages.messages(tmp_path / "source.py")
    assert first == ("ConfigError", "x={x}: expected none, found {str(x)}", "check")
    assert second == ("TargetError", "other", "check")
    page = messages.page()
    assert page.count("**ConfigError**") > 100 and "call unmerge_adapter()" in page
