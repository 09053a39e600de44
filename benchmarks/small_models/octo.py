"""Octo."""

import jax.numpy as jnp
import numpy as np

from small_models.entry import CodeBase, Entry, bound


def octo():
    from octo.model.components.action_heads import L1ActionHead
    from octo.model.components.tokenizers import ImageTokenizer
    from octo.model.components.vit_encoders import SmallStem
    from octo.model.octo_module import OctoModule
    from octo.utils.spec import ModuleSpec

    stem = ModuleSpec.create(
        SmallStem,
        patch_size=32,
        num_features=24,
        features=(32, 32),
        kernel_sizes=(3, 3),
        strides=(2, 2),
        padding=(1, 1),
    )
    eyes = ModuleSpec.create(
        ImageTokenizer, obs_stack_keys=["image_primary"], task_stack_keys=[], encoder=stem
    )
    head = ModuleSpec.create(
        L1ActionHead, readout_key="readout_action", action_horizon=2, action_dim=3, use_map=True
    )
    module = OctoModule.create(
        observation_tokenizers={"primary": eyes},
        task_tokenizers={},
        heads={"action": head},
        readouts={"action": 1},
        transformer_kwargs={
            "num_layers": 2,
            "mlp_dim": 40,
            "num_attention_heads": 2,
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
            "add_position_embedding": False,
        },
        token_embedding_size=24,
        max_horizon=2,
    )
    images = np.random.default_rng(1).integers(0, 255, (2, 2, 64, 64, 3))
    there = jnp.ones((2, 2), bool)
    observed = {
        "image_primary": jnp.asarray(images, jnp.uint8),
        "timestep_pad_mask": there,
        "pad_mask_dict": {"image_primary": there},
    }
    inputs = {"observed": observed, "tasks": {"pad_mask_dict": {}}, "pad_mask": there}
    return Entry(
        bound(module, *inputs.values(), train=False),
        inputs,
        lambda model, *inputs: model(*inputs, train=False)[1]["action"],
        said="sample_inputs=SampleInputs((observed, tasks, pad_mask), dict(train=False))",
    )


BASE = CodeBase("octo", "241fb35", "linen", ("octo",), {"Octo": octo})
