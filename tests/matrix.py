"""Runs what needs no torch under every Python we declare, with old releases and with new ones.

python tests/matrix.py            every leg, with the newest releases of today
python tests/matrix.py NAME...    these legs, in their environments as they stand

Each leg has an environment of its own, .venv-NAME, made at the first run. Legs whose Python is not
on this machine are named and skipped.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Leg:
    """A Python and the releases that are installed in it."""

    python: str
    releases: str

    @property
    def name(self) -> str:
        return f"{self.python}-{self.releases}"

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-{self.name}"

    @property
    def constraints(self) -> str:
        """As in a file for pip's --constraint."""
        match self.releases:
            case "oldest":
                return "\n".join(line.replace(">=", "==") for line in PROJECT["dependencies"])
            case "pinned":
                return (ROOT / "constraints.txt").read_text()
            case _:
                return ""


LEGS = (
    Leg("3.11", "oldest"),
    Leg("3.11", "pinned"),
    Leg("3.12", "newest"),
    Leg("3.13", "newest"),
)


def interpreter(version: str) -> str | None:
    """Where this Python is: on the path, or among those that pyenv manages."""
    environments: list[dict[str, str]] = [{}]
    if shutil.which("pyenv"):  # what it puts on the path runs one chosen release only
        listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
        found = [line for line in listed.stdout.split() if line.startswith(f"{version}.")]
        environments += [{"PYENV_VERSION": release} for release in reversed(found)]
    say = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    for environment in environments:
        try:
            done = subprocess.run(
                say, env={**os.environ, **environment}, capture_output=True, text=True
            )
        except FileNotFoundError:
            return None
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def install(leg: Leg, python: str, renew: bool) -> None:
    """Makes the leg's environment, unless it stands."""
    wanted, stamp = leg.folder / "wanted.txt", leg.folder / ".installed"
    text = f"{(ROOT / 'pyproject.toml').read_text()}\n{leg.constraints}\n"
    if stamp.exists() and stamp.read_text() == text and not renew:
        return
    if not leg.folder.exists():
        subprocess.run([python, "-m", "venv", leg.folder], check=True)
    wanted.write_text(leg.constraints)
    pip = [leg.folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"]
    newest = ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run(
        [*pip, "-q", *newest, "--constraint", wanted, "--editable", ".[test]"], cwd=ROOT, check=True
    )
    stamp.write_text(text)


def run(leg: Leg) -> bool:
    """Whether its tests passed; prints with which releases."""
    python = leg.folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "freeze", "--exclude-editable"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout.split()
    ours = {line.partition(">=")[0] for line in PROJECT["dependencies"]}
    shown = [line for line in installed if line.partition("==")[0] in ours]
    print(f"{leg.name}: {' '.join(shown)}", flush=True)
    return not subprocess.run([python, "-m", "pytest", "-n", "2", "-q"], cwd=ROOT).returncode


def main(names: list[str]) -> int:
    """Every leg, or those that are named."""
    by_name = {leg.name: leg for leg in LEGS}
    if unknown := set(names) - by_name.keys():
        print(f"no such legs: {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
        return 2
    said = {}
    for name in names or by_name:
        leg = by_name[name]
        python = interpreter(leg.python)
        if python is None:
            said[name] = f"skipped: no Python {leg.python} on this machine"
            continue
        install(leg, python, renew=not names)
        said[name] = "passed" if run(leg) else "FAILED"
    for name, outcome in said.items():
        print(f"{name}: {outcome}")
    return int("FAILED" in said.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
