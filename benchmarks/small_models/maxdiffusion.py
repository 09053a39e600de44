"""maxdiffusion."""

import jax.numpy as jnp

from small_models.entry import CodeBase, Entry, bound, normal


def unet():
    from maxdiffusion.models.unet_2d_condition_flax import FlaxUNet2DConditionModel

    module = FlaxUNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        attention_kernel="dot_product",
    )
    inputs = {
        "images": normal(2, 4, 8, 8),
        "steps": jnp.asarray([3, 7]),
        "text": normal(2, 5, 24),
    }

    def call(model, *inputs):
        return model(*inputs).sample

    return Entry(bound(module, *inputs.values()), inputs, call)


BASE = CodeBase("maxdiffusion", "7cfb880", "linen", ("maxdiffusion/src",), {"UNet": unet})
