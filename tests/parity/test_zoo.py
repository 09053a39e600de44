"""Every Flax family of transformers: its layers by PyTorch's names, an adapter there and back."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from zoo import FAMILIES, mend_clip, torch_layers, twins
from zoo_table import in_bfloat16, measure

from randlora_jax import RandLoraConfig, TargetError, get_peft_model
from randlora_jax.models.front_end import WrapRules, wrap
from randlora_jax.models.selecting import select

pytestmark = pytest.mark.torch

CONFIGS = {type(family.make()): family.make for family in FAMILIES.values()}
CONFIGS[transformers.CLIPTextConfig] = lambda: FAMILIES["clip"].make().text_config
CONFIGS[transformers.CLIPVisionConfig] = lambda: FAMILIES["clip"].make().vision_config
CLASSES = sorted(
    name
    for name in dir(transformers)
    if name.startswith("Flax")
    and getattr(getattr(transformers, name), "config_class", None) in CONFIGS
    and not name.endswith("PreTrainedModel")
)


TWIN = {"FlaxBertForCausalLM": "BertLMHeadModel"}
COMPOSITES = {n for n in CLASSES if n.endswith("EncoderDecoderModel") or "Dual" in n}


@pytest.fixture(autouse=True)
def old_clip(monkeypatch):
    monkeypatch.setattr(jnp, "clip", jnp.clip)  # what `mend_clip` does ends with the test
    mend_clip()


def matrices(registry) -> dict[str, tuple[int, int]]:
    """(in, out) of every layer we can adapt, by canonical name."""
    return {name: layer.matrix for name, layer in registry.owners().items()}


def test_all_of_transformers_flax_classes_are_known():
    models = {n for n in dir(transformers) if n.startswith("Flax") and n.endswith(("Model", "LM"))}
    others = {n for n in models if not n.startswith("FlaxAuto") and "PreTrained" not in n}
    assert others <= set(CLASSES) and len(CLASSES) > 120


@pytest.mark.parametrize("name", CLASSES)
def test_layers_have_pytorchs_names_and_shapes(name):
    kind = getattr(transformers, name)
    config = CONFIGS[kind.config_class]()
    config.num_labels = 2  # Flax's ALBERT cannot have others for the order of sentences
    if name in COMPOSITES:
        flax = kind(config)
    else:  # shapes will do
        flax = kind(config, _do_init=False)
        init = partial(flax.init_weights, input_shape=flax.input_shape)
        flax._params, flax._is_initialized = jax.eval_shape(init, flax.key), True
    with torch.device("meta"):
        twin = getattr(transformers, TWIN.get(name, name.removeprefix("Flax")))(config)
    registry = wrap(flax, WrapRules())._registry
    ours, theirs = matrices(registry), torch_layers(twin)
    assert ours == {layer: theirs.get(layer) for layer in ours}
    missing = {layer for layer in theirs if layer not in ours}
    tied = {n for n, module in twin.named_modules() if module is twin.get_output_embeddings()}
    unused = {"bert.pooler"} if name.startswith("FlaxBigBird") else set()  # by these heads
    assert missing <= tied | unused, missing
    if ours:
        every = select(registry, RandLoraConfig(r=2, target_modules="all-linear"))
        assert set(ours) - set(every) == tied & set(ours), "what all-linear leaves out in PEFT"


def families(few: set[str]) -> list:
    """All of them; those that are not among `few` are run by `make test-long`."""
    return [n if n in few else pytest.param(n, marks=pytest.mark.long) for n in sorted(FAMILIES)]


# Differ from one that stays in names and sizes, not in kinds of layers.
KIN = {
    "blenderbot",
    "blenderbot_small",
    "electra",
    "longt5",
    "marian",
    "mbart",
    "mistral",
    "mt5",
    "pegasus",
    "regnet",
    "roberta",
    "roberta_prelayernorm",
    "speech-encoder-decoder",
    "xlm-roberta",
}


@pytest.fixture(params=families(set(FAMILIES) - KIN))
def pair(request, tmp_path):
    return twins(request.param, tmp_path / "base")


def test_family(pair, tmp_path):
    assert set(pair.torch_layers()) - set(wrap(pair.flax, WrapRules())._registry.owners()) == set(
        pair.family.tied
    )
    for name in pair.family.tied:
        with pytest.raises(TargetError, match=r"has no kernel of its own.*tied"):
            get_peft_model(pair.flax, RandLoraConfig(r=5, target_modules=[name]))
    found = measure(pair, tmp_path)
    print(found)
    assert found.moved >= 0.1, "the adapter hardly moves the outputs"
    assert found.ours_in_peft <= found.allowed and found.theirs_here <= found.allowed
    assert found.deltas <= 1e-6


FEW = {"bert", "gpt2", "llama", "t5", "resnet", "vit"}  # one of each kind


@pytest.mark.parametrize("pair", families(FEW), indirect=True)
def test_in_bfloat16_no_more_is_lost_than_in_peft(pair, tmp_path):
    ratio = in_bfloat16(pair, tmp_path)
    print(f"our error in bfloat16 is {ratio:.2f} of PEFT's")
    assert ratio <= 1.5
