"""What `import randlora_jax` offers: to completion, to help(), to a type checker, by old names."""

import ast
import pydoc
import rlcompleter
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import randlora_jax

PUBLIC = {
    "randlora_jax": [
        "AdapterFileError",
        "AdapterParam",
        "ConfigError",
        "Contraction",
        "FrozenAdapterParam",
        "KernelLayout",
        "LayerType",
        "RandLoraConfig",
        "RandLoraError",
        "RandLoraModel",
        "SampleInputs",
        "TargetError",
        "get_peft_model",
        "register_front_end",
    ],
    "randlora_jax.config": ["CONFIG_NAME", "RandLoraConfig"],
    "randlora_jax.contraction": ["LAST_AXES", "Contraction"],
    "randlora_jax.errors": ["AdapterFileError", "ConfigError", "RandLoraError", "TargetError"],
    "randlora_jax.layer_types": ["LayerType", "Table", "of_axes", "of_einsum"],
    "randlora_jax.names": ["Names"],
    "randlora_jax.views": ["View"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    loaded = import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module])
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


def test_completion_lists_them():
    completer = rlcompleter.Completer({"randlora_jax": randlora_jax})
    found = completer.attr_matches("randlora_jax.")
    for name in ("__version__", *PUBLIC["randlora_jax"]):
        stem = f"randlora_jax.{name}"
        assert any(match.startswith(stem) for match in (*found, *completer.attr_matches(stem)))
    assert set(PUBLIC["randlora_jax"]) <= set(dir(randlora_jax))


def test_help_lists_them():
    page = pydoc.plain(pydoc.render_doc(randlora_jax))
    assert f"VERSION\n    {randlora_jax.__version__}" in page
    for name in PUBLIC["randlora_jax"]:
        own = getattr(randlora_jax, name).__name__  # AdapterParam is flax's own type
        assert f"class {own}(" in page or f"    {own}(" in page, name


def test_a_type_checker_sees_the_same_names():
    """The imports that only it reads are the table that Python reads."""
    tree = ast.parse(Path(randlora_jax.__file__).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and not node.orelse
        and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {node.names[0].asname: node.module for node in block.body}
    assert seen == {name: f"randlora_jax.{home}" for name, home in randlora_jax._HOMES.items()}


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'randlora_jax' has no attribute 'nothing'"):
        randlora_jax.nothing  # noqa: B018


def test_config_and_errors_load_no_jax():
    program = "import sys, randlora_jax.config, randlora_jax.errors, randlora_jax as r; "
    program += "r.RandLoraConfig, r.TargetError, dir(r), r.__version__; "
    program += "sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
