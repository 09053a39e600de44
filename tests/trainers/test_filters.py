"""What trains is of the type by which trainers tell it, and nothing else is."""

import jax
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from tiny_llama import adapted, base_model, is_default, leaves, move
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from tunix_pair import IDS, jax_logits

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model
from randlora_jax.front_ends.nnx.variables import FrozenAdapterParam, SharedBasis

pytestmark = pytest.mark.torch


def types(model):
    return {path: type(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def test_types(base):
    model = adapted(base)
    for path, kind in types(model).items():
        if "randlora_bases" in path:
            assert kind is SharedBasis
        elif "other" in path:
            assert kind is FrozenAdapterParam
        else:
            assert (kind is nnx.LoRAParam) == is_default(path)
    model.set_adapter("other")
    assert {path for path, kind in types(model).items() if kind is nnx.LoRAParam} == {
        path for path in types(model) if "other" in path
    }
    model.set_adapter("other", inference_mode=True)
    assert nnx.LoRAParam not in types(model).values()


def test_both_names_and_the_trainer_train_the_same(base):
    model = adapted(base)
    expected = {path for path in leaves(model) if is_default(path)}
    config = TrainingConfig(eval_every_n_steps=1)
    for optimizer in (
        nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam),
        nnx.Optimizer(model, optax.adam(1e-3), wrt=AdapterParam),
        PeftTrainer(model, optax.adam(1e-3), config).optimizer,
    ):
        momenta = [path for path in leaves(optimizer) if "mu" in path]
        assert {path[path.index("mu") + 1 :] for path in momenta} == expected


def test_a_lora_that_the_model_came_with_stays_as_it_is(base):
    """qwix's own LoRA on some layers; RandLoRA trains others."""
    provider = qwix.LoraProvider(module_path=".*q_proj", rank=2, alpha=4.0)
    ids = jax.numpy.asarray(IDS)
    mask = jax.numpy.ones((*IDS.shape, IDS.shape[1]), bool)
    given = (ids, ids, None, mask)
    model = qwix.apply_lora_to_model(base_model(base), provider, *given, rngs=nnx.Rngs(0))
    before = np.asarray(jax_logits(model))
    loras = {path for path, kind in types(model).items() if kind is nnx.LoRAParam}
    assert loras
    model = get_peft_model(model, RandLoraConfig(r=6, target_modules=["gate_proj", "up_proj"]))
    np.testing.assert_array_equal(jax_logits(model), before)
    trained = {path for path, kind in types(model).items() if kind is nnx.LoRAParam}
    assert trained and all("default" in path for path in trained)
    move(model)
    assert {path for path, kind in types(model.unload()).items() if kind is nnx.LoRAParam} == loras
