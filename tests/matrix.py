"""Runs what needs no torch under every Python we declare, with old releases and with new ones.

python tests/matrix.py                       every leg, with the newest releases of today
python tests/matrix.py 3.12-newest tests/... one leg, in its environment as it stands, some tests

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


def run(leg: Leg, tests: list[str]) -> bool:
    """Whether its tests passed; prints with which releases."""
    python = leg.folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "freeze", "--exclude-editable"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout.split()
    ours = {line.partition(">=")[0] for line in PROJECT["dependencies"]}
    shown = [line for line in installed if line.partition("==")[0] in ours]
    print(f"{leg.name}: {' '.join(shown)}", flush=True)
    pytest = [python, "-m", "pytest", "-n", "2", "-q", *tests]
    return not subprocess.run(pytest, cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    """Every leg, or the one that is named."""
    legs = {leg.name: leg for leg in LEGS}
    name, tests = (arguments or [""])[0], arguments[1:]
    if name and name not in legs:
        print(f"no leg {name!r}: there are {', '.join(legs)}")
        return 2
    outcomes = {}
    for leg in [legs[name]] if name else LEGS:
        python = interpreter(leg.python)
        if python is None:
            outcomes[leg.name] = f"skipped, as no Python {leg.python} was found"
            continue
        install(leg, python, renew=not name)
        outcomes[leg.name] = "passed" if run(leg, tests) else "FAILED"
    for one, outcome in outcomes.items():
        print(f"{one}: {outcome}")
    return int("FAILED" in outcomes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
