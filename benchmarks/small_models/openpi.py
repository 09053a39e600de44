"""Physical Intelligence's openpi."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from small_models.entry import CodeBase, Entry, normal


def pi0():
    from openpi.models import gemma, model, pi0, pi0_config, siglip

    small = functools.partial(model.preprocess_observation, image_resolution=(28, 28))
    model.preprocess_observation, model.IMAGE_RESOLUTION = small, (28, 28)
    siglip.decode_variant = lambda variant: {
        "width": 24,
        "depth": 2,
        "mlp_dim": 40,
        "num_heads": 2,
        "patch_size": (14, 14),
    }
    gemma.PALIGEMMA_VOCAB_SIZE = 97
    pi0._model = model
    config = pi0_config.Pi0Config(
        dtype="float32",
        paligemma_variant="dummy",
        action_expert_variant="dummy",
        action_dim=6,
        action_horizon=4,
        max_token_len=5,
        pytorch_compile_mode=None,
    )
    observed = config.fake_obs(2)
    draws = np.random.default_rng(3)
    observed = dataclasses.replace(
        observed,
        images={name: normal(2, 28, 28, 3) for name in observed.images},
        tokenized_prompt=jnp.asarray(draws.integers(0, 97, (2, 5))),
        state=normal(2, 6),
    )
    inputs = {"observed": observed, "actions": normal(*config.fake_act(2).shape)}

    def call(model, *inputs):
        return model.compute_loss(jax.random.key(1), *inputs)

    return Entry(config.create(jax.random.key(0)), inputs, call)


BASE = CodeBase("openpi", "15a9616", "linen in nnx", ("openpi/src",), {"pi0": pi0})
