"""The package works however it is installed, from the clone's root and from elsewhere."""

import json
import subprocess

import pytest
from installed import Environment, run

import randlora_jax

SAY = """
import json
import randlora_jax
import randlora_jax.interop.peft_dir as peft_dir
import randlora_jax.commands.main as command
print(json.dumps([peft_dir.__file__, command.__file__, randlora_jax.__version__]))
"""
WAYS = {
    "pip install .": ["."],
    "pip install --editable .": ["--editable", "."],
    "pip install randlora_jax.whl": [],
    "nothing": None,
}


@pytest.fixture(scope="module", params=WAYS)
def environment(request, tmp_path_factory, clone, wheel):
    """How it was installed, and where."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    if (what := WAYS[request.param]) is not None:
        made.install(*(what or [wheel]), cwd=clone)
    return request.param, made


def test_from_the_clones_root(environment, clone):
    """There Python finds the clone's files first, whatever is installed."""
    _, made = environment
    files = json.loads(run(made.python, "-c", SAY, cwd=clone))
    assert files == [
        str(clone / "interop" / "peft_dir.py"),
        str(clone / "randlora_jax" / "commands" / "main.py"),
        randlora_jax.__version__,
    ]
    assert "randlora-jax inspect" in run(made.python, "-m", "randlora_jax", "-h", cwd=clone)


def test_from_elsewhere(environment, clone, tmp_path):
    way, made = environment
    if way == "nothing":
        done = subprocess.run([made.python, "-c", SAY], cwd=tmp_path, stderr=subprocess.PIPE)
        assert b"No module named 'randlora_jax'" in done.stderr
        return
    peft_dir, command, found = json.loads(run(made.python, "-c", SAY, cwd=tmp_path))
    if "editable" in way:
        assert peft_dir == str(clone / "interop" / "peft_dir.py")
        assert command == str(clone / "randlora_jax" / "commands" / "main.py")
    else:
        home = made.packages / "randlora_jax"
        assert peft_dir == str(home / "interop" / "peft_dir.py")
        assert command == str(home / "commands" / "main.py")
    assert found == randlora_jax.__version__
    said = [
        run(made.python, "-m", "randlora_jax", "--help", cwd=tmp_path),
        run(made.folder / "bin" / "randlora-jax", "--help", cwd=tmp_path),
    ]
    assert said[0] == said[1] and "randlora-jax inspect" in said[0]
