"""orbax: docs/checkpoints.md runs, and leaves that mean something else are refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model

HERE = Path(__file__).parents[1]
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["up", "head"])
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.up(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(nn.relu(nn.Dense(8, name="up")(x)))


def wrapped(config=CONFIG, kind="nnx"):
    if kind == "nnx":
        return get_peft_model(Net(nnx.Rngs(0)), config)
    return get_peft_model(LinenNet().bind(LinenNet().init(jax.random.key(0), X)), config)


def test_the_page_runs_on_four_devices(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "checkpoints_page.py"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        cwd=tmp_path,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"r": 2}, "r: the checkpoint was saved with 4, and this model has 2"),
        ({"randlora_alpha": 9}, "randlora_alpha: the checkpoint was saved with 8"),
        ({"projection_prng_key": 7}, "projection_prng_key: the checkpoint was saved with 0"),
        ({"sparse": True}, "sparse: the checkpoint was saved with False"),
        ({"projection_source": "torch:bf16-8bit"}, r"the bases \(projection_source\): .* jax-0"),
        ({"target_modules": ["up"]}, "what target_modules takes: .* head of shape .* no head"),
        ({"modules_to_save": ["head"], "target_modules": ["up"]}, "what target_modules takes"),
        ({"bias": "randlora_only"}, "what modules_to_save takes: .*no head.bias"),
    ],
)
def test_leaves_of_another_adapter_are_refused_by_the_setting(kind, change, field):
    saved = json.loads(json.dumps(wrapped(kind=kind).randlora_settings()))
    model = wrapped(replace(CONFIG, **change), kind)
    with pytest.raises(ConfigError, match=f"adapter 'default': {field}"):
        model.check_randlora_settings(saved)
    again = wrapped(RandLoraConfig(**saved["default"]["config"]), kind)
    again.add_adapter("more", CONFIG)
    again.check_randlora_settings(saved)


def test_leaves_of_another_view_of_a_square_kernel_are_refused():
    def of(view):
        rules = {"views": {"up": view}, "rngs": jax.random.key(0)}
        return get_peft_model(
            {"up": jnp.ones((8, 8))}, replace(CONFIG, target_modules=["up"]), **rules
        )

    saved = json.loads(json.dumps(of("i o").randlora_settings()))
    of("i o").check_randlora_settings(saved)
    with pytest.raises(ConfigError, match=r"the axes of up \(views\): .* saved with io, .* has oi"):
        of("o i").check_randlora_settings(saved)
    # settings of before axes were kept tell shapes alone
    saved["default"]["layers"] = {"up": [8, 8]}
    of("o i").check_randlora_settings(saved)
    saved["default"]["layers"] = {"up": [8, 4]}
    with pytest.raises(
        ConfigError, match=r"up of shape \(8, 4\), and this .* up of shape \(8, 8\)"
    ):
        of("o i").check_randlora_settings(saved)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_kernels_that_hold_the_delta_and_such_that_do_not_are_not_mixed(kind):
    merged, apart = wrapped(kind=kind), wrapped(kind=kind)
    merged.merge_adapter()
    theirs, ours = (json.loads(json.dumps(m.randlora_settings())) for m in (merged, apart))
    merged.check_randlora_settings(theirs)
    apart.check_randlora_settings(ours)
    with pytest.raises(ConfigError, match=r"be there twice. Call merge_adapter\(\['default'\]\)"):
        apart.check_randlora_settings(theirs)
    with pytest.raises(ConfigError, match=r"would be lost. Call unmerge_adapter\(\) first"):
        merged.check_randlora_settings(ours)
    del ours["default"]["merged"]  # settings of before that was kept
    apart.check_randlora_settings(ours)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_what_is_not_among_what_trains_is_told(kind, recwarn):
    saved, model = wrapped(kind=kind), wrapped(kind=kind)
    for each in (saved, model):
        each.add_adapter("b", CONFIG)
    with pytest.warns(UserWarning, match="'b': did not train when the checkpoint was saved"):
        model.check_randlora_settings(json.loads(json.dumps(saved.randlora_settings())))
    for each in (saved, model):
        each.set_adapter(["default", "b"])
    told = saved.randlora_settings()
    recwarn.clear()
    model.check_randlora_settings(told)
    del told["b"]["trains"], told["b"]["scale"]  # settings of before these were kept
    model.check_randlora_settings(told)
    assert not recwarn


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_another_scale_is_refused(kind):
    saved, model = wrapped(kind=kind), wrapped(kind=kind)
    saved.set_scale("default", 0.5)
    told = json.loads(json.dumps(saved.randlora_settings()))
    with pytest.raises(ConfigError, match=r"its scale was 0.5, .* set_scale\('default', 0.5\)"):
        model.check_randlora_settings(told)
    model.set_scale("default", 0.5)
    model.check_randlora_settings(told)


def test_all_of_a_merged_model_goes_into_one_that_is_merged(tmp_path):
    config = replace(CONFIG, init_weights=False)
    saved, model = (get_peft_model(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(i)) for i in (1, 2))
    expected = saved(X)
    saved.merge_adapter()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "all", nnx.state(saved))
    model.merge_adapter()
    model.check_randlora_settings(saved.randlora_settings())
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(model, checkpointer.restore(tmp_path / "all", nnx.state(model)))
    np.testing.assert_array_equal(model(X), saved(X))
    np.testing.assert_allclose(model(X), expected, atol=1e-5)
    with pytest.warns(UserWarning, match="changed while 'default' was merged"):
        model.unmerge_adapter()
    np.testing.assert_allclose(model(X), expected, atol=1e-5)


def test_what_decides_nothing_may_differ():
    other = replace(CONFIG, randlora_dropout=0.5, target_modules="all-linear")
    model = get_peft_model(Net(nnx.Rngs(0)), other, rngs=nnx.Rngs(1))
    model.check_randlora_settings(wrapped().randlora_settings())


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({}, "expected what model.randlora_settings"),
        (None, "expected what model.randlora_settings"),
        ({"default": {}}, "of adapter 'default': expected .*config"),
        ({"default": {"config": 3, "bases": "", "layers": {}, "trained_whole": {}}}, "expected"),
        ({"other": {}}, "holds an adapter 'other', and this model has 'default'"),
    ],
)
def test_what_are_no_settings_is_refused(saved, words):
    with pytest.raises(ConfigError, match=words):
        wrapped().check_randlora_settings(saved)


def test_what_orbax_notices_by_itself(tmp_path):
    """Other shapes and other layers, and neither another alpha nor another key."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "leaves", nnx.state(wrapped(), AdapterParam))

    def restored(**change):
        state = nnx.state(wrapped(replace(CONFIG, **change)), AdapterParam)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(tmp_path / "leaves", state)

    with pytest.raises(ValueError, match=r"Requested shape.*not compatible with the stored"):
        restored(r=2)
    with pytest.raises(ValueError, match="tree structures do not match"):
        restored(target_modules=["up"])
    restored(randlora_alpha=9, projection_prng_key=7)


def test_tunix_keeps_the_settings_beside_its_leaves(tmp_path):
    """As its trainers call its manager, `custom_checkpoint_metadata` given."""
    manager = pytest.importorskip("tunix.sft.checkpoint_manager")
    model = wrapped()
    moved = jax.tree.map(lambda x: x + 0.3, nnx.state(model, AdapterParam))
    nnx.update(model, moved)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    told = {"randlora": model.randlora_settings()}
    theirs = manager.CheckpointManager(str(tmp_path / "run"))
    theirs.save(3, model, optimizer, True, force=True, custom_metadata=told)
    theirs.close()

    with ocp.CheckpointManager(tmp_path / "run") as plain:
        found = plain.metadata(plain.latest_step()).custom_metadata["randlora"]
    with pytest.raises(ConfigError, match="randlora_alpha"):
        wrapped(replace(CONFIG, randlora_alpha=9)).check_randlora_settings(found)
    again = wrapped()
    again.check_randlora_settings(found)
    optimizer = nnx.Optimizer(again, optax.adam(1e-3), wrt=nnx.LoRAParam)
    theirs = manager.CheckpointManager(str(tmp_path / "run"))
    assert theirs.maybe_restore(again, optimizer, restore_only_lora_params=True)[0] == 3
    theirs.close()
    np.testing.assert_array_equal(again(X), model(X))
