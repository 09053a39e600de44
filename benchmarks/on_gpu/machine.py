"""What a framework finds on this machine, as JSON: `python -m on_gpu.machine jax` (or torch).

In processes of their own, so that whoever asks holds none of the card's memory.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .telling import in_a_line, teller

Found = dict[str, Any]


def versions(*packages: str) -> dict[str, str | None]:
    """Of what is installed; None of what is not, or does not say."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def attention() -> dict[str, str]:
    """By what JAX attends: cuDNN, if it can do that forward and backward on this card."""
    import jax
    import jax.numpy as jnp

    def loss(q: jax.Array, kv: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(q, kv, kv, is_causal=True, implementation="cudnn")
        return y.astype(jnp.float32).sum()

    q, kv = (jnp.ones((1, 256, heads, 64), jnp.bfloat16) for heads in (8, 2))
    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(q, kv))
    except Exception as error:  # whatever it is, there is another way
        return {"attention": "xla", "why": in_a_line(error)}
    return {"attention": "cudnn"}


def in_jax() -> Found:
    """Whether our library can run here at all, and on what."""
    import jax
    import optax  # noqa: F401 - all that ours needs, so that what lacks is named at once

    from randlora_jax import get_peft_model  # noqa: F401

    device = jax.devices()[0]
    found: Found = {"platform": device.platform, "device": device.device_kind}
    on_gpu = device.platform == "gpu"
    found |= attention() if on_gpu else {"attention": "xla", "why": "cuDNN is for NVIDIA's cards"}
    return found | {"versions": versions("jax", "flax", "optax", "qwix")}


def in_torch() -> Found:
    """Whether PyTorch sees the card."""
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"device": card, "versions": versions("torch", "transformers", "peft")}


def main() -> None:
    """Tells it."""
    tell = teller()
    tell({"jax": in_jax, "torch": in_torch}[sys.argv[1]]())


if __name__ == "__main__":
    main()
