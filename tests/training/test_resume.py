"""orbax: a run that is killed and resumed ends with the bits of one that was not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch
PROGRAM = str(Path(__file__).parent.with_name("resumed.py"))
STEPS = 12


def start(kind, folder):
    command = [sys.executable, "-W", "ignore", PROGRAM, kind, str(folder), str(STEPS)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )


@pytest.mark.parametrize("kind", ["nnx", pytest.param("linen", marks=pytest.mark.long)])
def test_a_resumed_run_ends_as_the_uninterrupted_one(kind, tmp_path):
    whole = start(kind, tmp_path / "whole")
    expected, errors = whole.communicate()
    assert whole.returncode == 0, errors
    doomed = start(kind, tmp_path / "cut")
    while not (tmp_path / "cut" / "3").exists():
        assert doomed.poll() is None, doomed.communicate()[1]
        time.sleep(0.01)
    doomed.kill()
    doomed.wait()
    assert not (tmp_path / "cut" / str(STEPS)).exists(), "it ended before it was killed"
    again = start(kind, tmp_path / "cut")
    found, errors = again.communicate()
    assert again.returncode == 0 and "resumed at" in errors, errors
    assert found == expected
