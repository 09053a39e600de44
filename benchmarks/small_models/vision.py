"""Google's vision_transformer and big_vision."""

import types

from small_models.entry import CodeBase, Entry, bound, ids, normal

SIZES = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 2}


def vit():
    from vit_jax import models_vit

    module = models_vit.VisionTransformer(
        num_classes=5,
        patches=types.SimpleNamespace(size=(4, 4)),
        transformer={
            "num_layers": 2,
            "mlp_dim": 40,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
        },
        hidden_size=24,
        representation_size=None,
        classifier="token",
    )
    images = normal(2, 16, 16, 3)
    return Entry(
        bound(module, images, train=False),
        {"images": images},
        lambda model, images: model(images, train=False),
        said="sample_inputs=dict(inputs=images, train=False)",
    )


def mixer():
    from vit_jax import models_mixer

    module = models_mixer.MlpMixer(
        num_classes=5,
        patches=types.SimpleNamespace(size=(4, 4)),
        num_blocks=2,
        hidden_dim=24,
        tokens_mlp_dim=20,
        channels_mlp_dim=40,
    )
    images = normal(2, 16, 16, 3)
    return Entry(
        bound(module, images, train=False),
        {"images": images},
        lambda model, images: model(images, train=False),
    )


def big_vit(**changes):
    from big_vision.models import vit

    module = vit.Model(num_classes=5, **SIZES, patch_size=(4, 4), pool_type="map", **changes)
    images = normal(2, 16, 16, 3)
    return Entry(
        bound(module, images),
        {"images": images},
        lambda model, images: model(images)[0],
        said="sample_inputs=(images,)",
    )


def big_vit_scanned():
    return big_vit(scan=True)


def siglip():
    import big_vision.models.vit  # noqa: F401 - found by name
    from big_vision.models.proj.image_text import two_towers

    module = two_towers.Model(
        image={**SIZES, "patch_size": (4, 4), "pool_type": "map"},
        text={"vocab_size": 61, **SIZES},
        text_model="proj.image_text.text_transformer",
        image_model="vit",
        out_dim=(None, 24),
        bias_init=-10.0,
    )
    inputs = {"images": normal(2, 16, 16, 3), "tokens": ids(2)}

    def call(model, *inputs):
        seen, read, _ = model(*inputs)
        return seen @ read.T

    said = "sample_inputs=(images, tokens)"
    return Entry(bound(module, *inputs.values()), inputs, call, said=said)


VISION_TRANSFORMER = CodeBase(
    "vision_transformer",
    "c6de1e5",
    "linen",
    ("vision_transformer",),
    {"ViT": vit, "MLP-Mixer": mixer},
)
BIG_VISION = CodeBase(
    "big_vision",
    "0127fb6",
    "linen",
    ("big_vision",),
    {"ViT": big_vit, "ViT, scanned": big_vit_scanned, "SigLIP": siglip},
)
