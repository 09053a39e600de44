"""get_layer_status and get_model_status, field by field beside PEFT's."""

from dataclasses import asdict, fields

import jax
import jax.numpy as jnp
import peft
import pytest
import qwix
from flax import nnx
from mlp import KINDS, NnxNet, torch_net
from peft.peft_model import TunerLayerStatus, TunerModelStatus

from randlora_jax import ConfigError, KernelLayout, LayerType, RandLoraConfig, get_peft_model
from randlora_jax.models import status

pytestmark = pytest.mark.torch

FIRST = {"r": 5, "randlora_alpha": 10, "target_modules": ["tall", "square", "wide"]}
SECOND = {
    "r": 5, "target_modules": ["square"], "modules_to_save": ["head"], "bias": "randlora_only"
}  # fmt: skip


def in_words(layer, adapters):
    """A layer's status; of PEFT's devices, those of the adapters that the layer has."""
    found = asdict(layer)
    found["devices"] = {name: found["devices"][name] for name in layer.available_adapters}
    assert set(found["devices"]) <= set(adapters)
    return found


def same(ours, theirs):
    """All fields, but what PEFT calls irregular in a sound model."""
    adapters = ours.peft_config
    by_name = {layer.name: in_words(layer, adapters) for layer in theirs.get_layer_status()}
    assert {s.name: in_words(s, adapters) for s in ours.get_layer_status()} == by_name
    found, expected = asdict(ours.get_model_status()), asdict(theirs.get_model_status())
    irregular = {key for key, value in expected.items() if value == "irregular"}
    assert irregular <= {"active_adapters", "merged_adapters"}
    for key in expected.keys() - irregular - {"base_model_type", "trainable_params"}:
        assert found[key] == expected[key], key
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts(kind):
    ours = get_peft_model(KINDS[kind][0](torch_net()), RandLoraConfig(**FIRST))
    theirs = peft.get_peft_model(torch_net(), peft.RandLoraConfig(**FIRST))
    found = same(ours, theirs)
    assert found["base_model_type"] == f"{kind.title()}Net"
    assert found["trainable_params"] == theirs.get_model_status().trainable_params
    ours.add_adapter("second", RandLoraConfig(**SECOND))
    theirs.add_adapter("second", peft.RandLoraConfig(**SECOND))
    assert same(ours, theirs)["active_adapters"] == ["default"]
    for model in (ours, theirs):
        model.set_adapter("second")
    assert same(ours, theirs)["requires_grad"] == {"default": False, "second": True}
    for model in (ours, theirs):
        model.merge_adapter()
    for layer in theirs.get_layer_status():  # PEFT's merged parameters go on training
        assert layer.requires_grad.get("second", True) is True
    merged = {s.name: s.merged_adapters for s in theirs.get_layer_status()}
    assert {s.name: s.merged_adapters for s in ours.get_layer_status()} == merged
    assert ours.get_model_status().merged_adapters == ["second"]
    for model in (ours, theirs):
        model.unmerge_adapter()
    ours.disable_adapter_layers()
    theirs.base_model.disable_adapter_layers()
    assert same(ours, theirs)["enabled"] is False


def test_it_has_pefts_fields_in_pefts_order():
    for ours, theirs in (
        (status.TunerLayerStatus, TunerLayerStatus),
        (status.TunerModelStatus, TunerModelStatus),
    ):
        assert [f.name for f in fields(ours)] == [f.name for f in fields(theirs)]


def test_of_a_model_with_stacks_and_of_one_without_numbers():
    model = get_peft_model(NnxNet(), RandLoraConfig(**FIRST))
    model.add_adapter("second", RandLoraConfig(**SECOND))
    before, layers = model.get_model_status(), model.get_layer_status()
    model.stack_adapters(4, parts=2)
    frozen = {"requires_grad": {"default": False, "second": False}, "trainable_params": 0}
    assert asdict(model.get_model_status()) == asdict(before) | frozen
    for found, expected in zip(model.get_layer_status(), layers, strict=True):
        off = dict.fromkeys(expected.available_adapters, False)
        assert asdict(found) == asdict(expected) | {"requires_grad": off}
    model.add_weighted_adapter(["default"], [2.0], "twice")
    model.set_adapter("twice")
    assert model.get_model_status().active_adapters == ["twice"]
    abstract = get_peft_model(nnx.eval_shape(NnxNet), RandLoraConfig(**FIRST))
    assert abstract.get_model_status().devices == {"default": []}
    model = get_peft_model(NnxNet(), RandLoraConfig(**FIRST))
    assert model.get_model_status().devices == {"default": [jax.devices()[0].platform]}
    model.delete_adapter("default")
    with pytest.raises(ConfigError, match="no adapter"):
        model.get_layer_status()


@pytest.mark.parametrize("held", ["int8", "float8_e4m3fn"])
def test_only_what_qwix_quantised_is_qwixs(held):
    class Mine(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((6, 8), held))

        def __call__(self, x):
            return x @ self.kernel[...].astype(x.dtype)

    config = RandLoraConfig(r=2, target_modules="all-linear")
    types = {Mine: LayerType(KernelLayout("i o"))}
    mine = get_peft_model(nnx.Sequential(Mine()), config, layer_types=types)
    base = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=held)]
    base = qwix.quantize_model(base, qwix.PtqProvider(rules), jnp.ones((1, 6)))
    for model, backend in ((mine, "other"), (get_peft_model(base, config), "qwix")):
        (layer,) = model.get_layer_status()
        assert layer.quantization_backend == backend
        assert model.get_model_status().quantization_backend == backend
