"""Type checkers know what `get_peft_model` returns, and accept the guides' first usages."""

import re
import subprocess
import sys

import pytest
from usages import USAGES

pytestmark = pytest.mark.torch

# What a wrapped model has, and what only a checker that looks into it finds.
MEMBERS = """
import flax.linen as nn
import jax
from flax import nnx
from transformers import FlaxPreTrainedModel
from randlora_jax import RandLoraConfig, get_peft_model

config = RandLoraConfig(r=4)


def of_nnx(base: nnx.Linear, x: jax.Array) -> None:
    model = get_peft_model(base, config)
    print(model, model(x), model.explain(tokens=4), nnx.state(model), model.in_features)


def of_linen(base: nn.Dense, x: jax.Array) -> None:
    model = get_peft_model(base, config)
    trained, frozen = model.split()
    print(model, model(x), model.apply({**frozen, "randlora": trained}, x), model.variables)
    model.nothing  # WRONG


def of_hugging_face(base: FlaxPreTrainedModel, x: jax.Array) -> None:
    model = get_peft_model(base, config)
    trained, frozen = model.split()
    print(model, model(x), model(x, params={**frozen, "randlora": trained}), model.params)


def of_pytree(params: dict[str, jax.Array]) -> None:
    model = get_peft_model(params, config, views={".*": "i o"})
    trained, frozen = model.split()
    print(model, model.merged({**frozen, "randlora": trained}), model.params, model.variables)
    get_peft_model(params, RandLoraConfig(r="4"))  # WRONG
"""
WRONG = {
    ("members", number)
    for number, line in enumerate(MEMBERS.splitlines(), start=1)
    if line.endswith("# WRONG")
}

# pyright sees no fields in a class under flax.struct.dataclass(frozen=True), as tunix's is.
TUNIX_WRONG = {
    ("tunix", number)
    for number, line in enumerate(USAGES["tunix"].splitlines(), start=1)
    if "TrainingInput(" in line
}

# optax has no types. Reading transformers takes mypy half a minute, so that only pyright does.
MYPY = """
[mypy]
check_untyped_defs = True
disable_error_code = import-untyped
[mypy-transformers.*]
follow_imports = skip
"""


@pytest.fixture
def modules(tmp_path):
    """A folder with all of these."""
    for name, text in {**USAGES, "members": MEMBERS}.items():
        (tmp_path / f"{name}_.py").write_text(text)
    (tmp_path / "mypy.ini").write_text(MYPY)
    return tmp_path


@pytest.mark.parametrize("checker", [("mypy", "--python-executable"), ("pyright", "--pythonpath")])
def test_only_what_is_wrong_is_refused(checker, installed, modules):
    command = [sys.executable, "-m", *checker, installed.python, "."]
    said = subprocess.run(command, cwd=modules, capture_output=True, text=True).stdout
    errors = re.findall(r"(\w+)_\.py:(\d+).* error: ", said)
    wrong = WRONG | TUNIX_WRONG if checker[0] == "pyright" else WRONG
    assert {(module, int(line)) for module, line in errors} == wrong, said
