"""What a picture is drawn from: a small file with the command and the commit that measured it.

Whatever took minutes to measure can so be drawn again in a second: `make figures` does, from the
files in docs/figures/.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import style
from matplotlib.figure import Figure


def keep(path: Path, command: str, numbers: Any) -> None:
    """Writes what `command` measured; a list to a line."""
    kept = {"command": command, "commit": commit(), "measured": numbers}
    text = json.dumps(kept, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")


def draw(drawing: Callable[[Any], Figure], kept: Path, path: Path) -> None:
    """The picture of what a file holds; command and commit stand below it."""
    found = json.loads(kept.read_text())
    below = f"{found['command']}, at {found['commit']}"
    style.picture(drawing, path, found["measured"], below=below)


def rounded(values: Any) -> list[float]:
    """Four digits of each, which are more than a picture shows."""
    return [float(f"{value:.4g}") for value in np.asarray(values).ravel()]


def commit() -> str:
    """The commit of the code that runs, as far as git knows it."""
    told = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        return "an unknown commit"
