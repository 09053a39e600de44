"""A clone, and the wheel that is built from it: once for all tests of the package."""

from pathlib import Path

import pytest
from installed import Environment, build_wheel, copy_of_the_sources
from named_models import save_my_bert, save_my_qwen3


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone's root."""
    return copy_of_the_sources(tmp_path_factory.mktemp("clone") / "randlora-jax")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    work = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_of_the_sources(work / "source"), work)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """Where the wheel is installed."""
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel, cwd=environment.folder)
    return environment


@pytest.fixture
def my_bert(tmp_path: Path) -> None:
    """A small model of this name."""
    save_my_bert(tmp_path)


@pytest.fixture
def my_qwen3(tmp_path: Path) -> None:
    """A small model of this name."""
    save_my_qwen3(tmp_path)
