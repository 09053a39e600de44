"""What the wheel and the source distribution hold, and what they say of themselves."""

import email
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from installed import copy_of_the_sources, run

import randlora_jax


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(packed.read(name).decode())


def test_the_source_distribution_has_every_file(tmp_path):
    """So what the Makefile does, the tests foremost, can be done from it."""
    source = copy_of_the_sources(tmp_path / "source")
    files = files_below(source)
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, str(tmp_path), cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as packed:
        packed.extractall(tmp_path, filter="data")
    found = files_below(tmp_path / name.removesuffix(".tar.gz"))
    assert files - found == set()
    made = {name for name in found - files if not name.startswith("randlora_jax.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_has_every_module_and_nothing_else(wheel, clone):
    expected = {
        f"randlora_jax/{name}"
        for name in files_below(clone / "randlora_jax")
        | {f"interop/{name}" for name in files_below(clone / "interop")}
        if name.endswith((".py", "py.typed"))
    }
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
        licenses = [name for name in packed.namelist() if name.endswith("licenses/LICENSE")]
    assert found == expected and len(licenses) == 1


def test_what_the_package_says_of_itself(metadata, clone):
    assert metadata["Version"] == randlora_jax.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier")
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in classifiers
    assert all(", https://" in url for url in metadata.get_all("Project-URL"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    project = tomllib.loads((clone / "pyproject.toml").read_text())["project"]
    assert sorted(needed) == sorted(project["dependencies"])
    assert all(">=" in line for line in needed)  # what `make matrix` installs the oldest of


def test_an_index_can_show_the_description(metadata, clone):
    """It has neither our pictures nor our files, but all the rest of README.md."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown, readme = metadata.get_payload(), (clone / "README.md").read_text()
    relative = re.compile(r"\]\((?!https?:)")
    assert relative.search(readme) and not relative.search(shown)
    assert "![" not in shown
    for line in readme.splitlines():
        if "](" not in line:
            assert line in shown
    assert "(https://arxiv.org/abs/2502.00987)" in shown
    documents = set(re.findall(r"\]\((docs/[\w-]+\.md)", readme))
    assert "docs/index.md" in documents
    for document in documents:
        assert f"(`{document}`)" in shown
