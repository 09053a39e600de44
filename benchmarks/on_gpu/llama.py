"""Llama in flax.nnx, of real shapes, so that the JAX side needs no library of models.

Layers are called what Hugging Face calls them. Attention is JAX's own, by cuDNN where that works.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .cases import Model

Attend = Literal["cudnn", "xla"]
Rotation = tuple[jax.Array, jax.Array]
THETA = 500_000.0
LOW: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


def linear(n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A layer in bfloat16."""
    return nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs, **LOW)


def rotation(length: int, dim: int) -> Rotation:
    """Sines and cosines of every position, (length, 1, dim / 2)."""
    angles = jnp.arange(length)[:, None] * THETA ** (-jnp.arange(0, dim, 2) / dim)
    return jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]


def rotated(x: jax.Array, by: Rotation) -> jax.Array:
    """(batch, length, heads, dim), by position."""
    (sin, cos), (a, b) = by, jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped queries, each token looking back."""

    def __init__(self, model: Model, attend: Attend, rngs: nnx.Rngs):
        self.heads, self.key_heads, self.attend = model.heads, model.key_heads, attend
        kv = model.width // model.heads * model.key_heads
        self.q_proj = linear(model.width, model.width, rngs)
        self.k_proj = linear(model.width, kv, rngs)
        self.v_proj = linear(model.width, kv, rngs)
        self.o_proj = linear(model.width, model.width, rngs)

    def __call__(self, x: jax.Array, by: Rotation) -> jax.Array:
        """(batch, length, width) in and out."""
        split = lambda y, heads: y.reshape(*y.shape[:2], heads, -1)  # noqa: E731
        q = rotated(split(self.q_proj(x), self.heads), by)
        k = rotated(split(self.k_proj(x), self.key_heads), by)
        v = split(self.v_proj(x), self.key_heads)
        attend = "xla" if x.shape[1] == 1 else self.attend  # of one token nothing is to be gained
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attend)
        return self.o_proj(y.reshape(x.shape))


class Mlp(nnx.Module):
    """The gated one."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.gate_proj = linear(model.width, model.mlp, rngs)
        self.up_proj = linear(model.width, model.mlp, rngs)
        self.down_proj = linear(model.mlp, model.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) in and out."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """A decoder layer."""

    def __init__(self, model: Model, attend: Attend, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(model.width, rngs=rngs, **LOW)
        self.self_attn = Attention(model, attend, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(model.width, rngs=rngs, **LOW)
        self.mlp = Mlp(model, rngs)

    def __call__(self, x: jax.Array, by: Rotation) -> jax.Array:
        """(batch, length, width) in and out."""
        x = x + self.self_attn(self.input_layernorm(x), by)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """The model; its embedding is its head too."""

    def __init__(self, model: Model, attend: Attend, rngs: nnx.Rngs):
        self.dim = model.width // model.heads
        self.embed_tokens = nnx.Embed(model.vocabulary, model.width, rngs=rngs, **LOW)
        self.layers = nnx.List(Layer(model, attend, rngs) for _ in range(model.layers))
        self.norm = nnx.RMSNorm(model.width, rngs=rngs, **LOW)

    def __call__(self, tokens: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        """Scores of the next tokens, or the mean loss where these are given.

        The head and the loss are computed one sequence at a time, and anew in the backward pass, so
        that scores of a large vocabulary never lie there whole.
        """
        x, by = self.embed_tokens(tokens), rotation(tokens.shape[1], self.dim)
        for layer in self.layers:
            x = layer(x, by)
        x, head = self.norm(x), self.embed_tokens.embedding[...].T
        if targets is None:
            return x @ head

        @jax.checkpoint
        def loss(sequence: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, wanted = sequence
            scores = (hidden @ head).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(scores, wanted).mean()

        return jax.lax.map(loss, (x, targets)).mean()
