"""Names that known models' tables give to modules that are not linear layers."""

from types import SimpleNamespace

import pytest

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.models import known_models
from randlora_jax.models.finding import StatedLayouts
from randlora_jax.models.front_end import WrapRules
from randlora_jax.models.known.entry import KnownModel
from randlora_jax.models.layer import LayerType
from randlora_jax.models.names import Names

GEMMA = {
    "google-tunix": ("tunix.models.gemma.model.Gemma", ("layers", 1)),
    "DeepMind gemma": ("gemma.gm.nn._transformer.Transformer", ("layer_1",)),
}
# In PyTorch the norm before the feed-forward layer is called by what it comes after in Gemma 1,
# and so is the norm behind attention in Gemma 2.
NORMS = {
    1: {
        "pre_attention_norm": "input_layernorm",
        "pre_ffw_norm": "post_attention_layernorm",
    },
    2: {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


@pytest.mark.parametrize("version", NORMS)
@pytest.mark.parametrize("code_base", GEMMA)
def test_norms_of_gemma(code_base, version):
    full_name, layer = GEMMA[code_base]
    module, _, name = full_name.rpartition(".")
    config = SimpleNamespace(
        use_post_attn_norm=version > 1, use_qk_norm=False, transpose_gating_einsum=False
    )
    model = type(name, (), {"__module__": module, "config": config})()
    names = Names(known_models.about(model).names)
    for ours, theirs in NORMS[version].items():
        assert names.of((*layer, ours)) == (f"model.layers.1.{theirs}",)


def test_a_users_rule_takes_the_place_of_a_known_one_with_its_key():
    mine, known = LayerType(KernelLayout("o i")), LayerType(KernelLayout("i o"))
    rules = WrapRules(
        layouts=StatedLayouts({"up": "o i"}),
        names=Names({"up": "mine"}),
        layer_types={"some.Dense": mine},
    ).beside(
        KnownModel(
            layouts={"down": "i o", "up": "i o"},
            names={"down": "theirs.down", "up": "theirs.up"},
            layer_types={"some.Dense": known, "some.Other": known},
        )
    )
    assert rules.layouts == StatedLayouts({"up": "o i", "down": "i o"}, frozenset({"down"}))
    assert rules.names == Names({"up": "mine", "down": "theirs.down"}, frozenset({"down"}))
    assert rules.layer_types == {"some.Dense": mine, "some.Other": known}
