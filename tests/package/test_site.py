"""The site: every page can be reached, and every public name is in its reference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import randlora_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


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


def test_no_message_tells_to_install_what_no_index_has():
    """Until there is a release, what is to be installed is a clone."""
    assert randlora_jax.__version__.endswith("dev0"), "a release: messages may name it"
    folders = ("randlora_jax", "interop", "docs", "examples", "benchmarks")
    files = [p for f in folders for end in ("py", "md") for p in (ROOT / f).rglob(f"*.{end}")]
    telling = re.compile(r"pip3? install[^#\n]*(?<![/\w])randlora[-_]jax")
    clone = re.compile(r"pip install '[.][^']*' in a clone of randlora-jax")
    for file in [*files, *ROOT.glob("*.md")]:
        said = clone.sub("", file.read_text())
        assert not telling.search(said), f"{file}: {telling.search(said)}"
