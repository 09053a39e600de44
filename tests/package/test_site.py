"""The site: every page can be reached, and every public name is in its reference."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import randlora_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def cells(page):
    """The cells of a page that the build runs."""
    return re.findall(r"```{code-cell} python\n(?::[^\n]*\n)*(.*?)```", page, re.DOTALL)


NOTEBOOKS = [page for page in sorted(DOCS.glob("*.md")) if cells(page.read_text())]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_can_be_run_from_its_top(page):
    first, *others = (ast.parse(cell).body for cell in cells(page.read_text()))
    imports = (ast.Import, ast.ImportFrom)
    assert isinstance(first[0], imports)
    assert not [line for cell in others for line in cell if isinstance(line, imports)]
    assert page.read_text().startswith("---\nfile_format: mystnb\nkernelspec:\n  name: python3\n")


@pytest.mark.long
@pytest.mark.parametrize(("cell", "status"), [("x = 1", 0), ("x = undefined", 1)])
def test_a_cell_that_fails_fails_the_build(cell, status, tmp_path):
    pytest.importorskip("myst_nb")
    header = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"
    (tmp_path / "index.md").write_text(
        f"{header}# A page\n\n```{{code-cell}} python\n{cell}\n```\n"
    )
    build = [sys.executable, "-m", "sphinx", "-b", "html", "-E", "-W", "-q", "-c", str(DOCS)]
    told = subprocess.run(
        [*build, str(tmp_path), str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert bool(told.returncode) == bool(status), told.stderr
    assert ("ExecutionError" in told.stderr) == bool(status)


def test_every_public_name_has_its_place():
    page = (DOCS / "api.md").read_text()
    told = set(re.findall(r"auto(?:class|function|exception|data):: ([\w.]+)", page))
    # flax's own class is told beside; what `get_peft_model` gives is made by nobody
    given = {name for name in told if name.startswith("randlora_jax.front_ends.")}
    apart = {"AdapterParam", "randlora_jax.layer_types.of_einsum"}
    assert (told - given) ^ apart == set(randlora_jax.__all__)
    assert given
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

    (tmp_path / "source.py").write_text('''"""What it is about."""
from elsewhere import quietly

WHY = "whatever it is, none is wanted"

def check(x):
    if x:
        found = f"there is {quietly(x)} after all"
        raise ConfigError(f"x={x!r}: expected " "none, found " + str(x) + found)
    if x is None:
        raise refusal("x", "none", x)
    warn(f"mind {WHY}")
    return TargetError("other")

def refusal(name, expected, found, remedy="Try again."):
    """The error of a setting."""
    return AdapterFileError(f"{name}: expected {expected}, found {shown(found)}. {remedy}")

def unheard(x):
    return "nobody says this where something is wrong"
''')
    (tmp_path / "elsewhere.py").write_text('''
def quietly(x) -> str:
    """How it is said."""
    return f"{x} which nobody had asked for"
''')
    read = {name: messages.Source.read(tmp_path / f"{name}.py") for name in ("source", "elsewhere")}
    found = "found {shown(found)}"
    assert [message for _, message in messages.messages(read)] == [
        ("part of a message", "there is {quietly(x)} after all", "check"),
        ("ConfigError", "x={x}: expected none, found {str(x)}{found}", "check"),
        ("AdapterFileError", f"x: expected none, {found}. Try again.", "check"),
        ("warning", "mind whatever it is, none is wanted", "check"),
        ("TargetError", "other", "check"),
        (
            "AdapterFileError",
            "{name}: expected {expected}, found {shown(found)}. {remedy}",
            "refusal",
        ),
        ("part of a message", "{x} which nobody had asked for", "quietly"),
    ]


@pytest.mark.parametrize(
    "said",
    [
        "call unmerge_adapter()",
        "there is no field",
        "Only RandLoRA adapters open.",
        "allow with --force",
        "add --plot FILE",
        "expected a rank of at least 1",
        "the adapter leaves out",
    ],
)
def test_the_page_of_errors_has_whatever_is_said(said, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import messages

    assert said in messages.page()


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
