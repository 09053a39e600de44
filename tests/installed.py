"""The package as others get it: built from a copy of this tree, installed in an environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_SOURCES = (".*", "build", "dist", "out", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command printed; that it failed is an error."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **quiet}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_sources(folder: Path) -> Path:
    """Building writes into the tree it builds."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCES)))


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a tree, written into `folder`."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, ".", cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass
class Environment:
    """A virtual environment that sees what is installed here, but for our package."""

    folder: Path

    def __post_init__(self) -> None:
        venv.create(self.folder, symlinks=True)
        # An editable install hangs on a file like this one, and none is read through another.
        (self.packages / "others.pth").write_text(sysconfig.get_path("purelib"))

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))

    def install(self, *what: str | Path, cwd: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q"]
        run(*pip, "--no-deps", "--no-build-isolation", *what, cwd=cwd)
