"""The contestants in JAX: ours, everything, and qwix's LoRA, of one model and one kind of step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from planned import planned_bytes

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

from .cases import LORA_RANK, RANK, RATE, TARGETS, Contestant, Model
from .llama import Attend, Llama


def adapted(contestant: Contestant, base: Llama) -> tuple[Any, Any]:
    """The model to train, and the type of what is trained in it."""
    if contestant.method == "full":
        return base, nnx.Param
    if contestant.method == "RandLoRA":
        config = RandLoraConfig(r=RANK, randlora_alpha=2 * RANK, target_modules=list(TARGETS))
        return get_peft_model(base, config, apply=contestant.apply), AdapterParam
    import qwix  # the only one that needs it

    provider = qwix.LoraProvider(
        module_path=f".*({'|'.join(TARGETS)})", rank=LORA_RANK, alpha=2.0 * LORA_RANK
    )
    one = jnp.ones((1, 1), jnp.int32)
    return qwix.apply_lora_to_model(base, provider, one, rngs=nnx.Rngs(0)), nnx.LoRAParam


class JaxSide:
    """A contestant that is ready to take steps."""

    def __init__(self, contestant: Contestant, model: Model, attend: Attend):
        wrapped, kind = adapted(contestant, Llama(model, attend, nnx.Rngs(0)))
        self._graph, trained, self._rest = nnx.split(wrapped, kind, ...)
        self._tx = optax.adamw(RATE)
        self._now = [trained, self._tx.init(trained)]
        self._planned: int | None = None
        self.trained = sum(x.size for x in jax.tree.leaves(trained))

    def train(self, ids: np.ndarray) -> Callable[[], float]:
        """A step on (batch, length + 1) tokens, compiled: it waits for its end, tells the loss."""
        tokens, targets = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])

        def one(trained: Any, state: Any, rest: Any, tokens: Any, targets: Any) -> Any:
            def loss(trained: Any) -> jax.Array:
                return nnx.merge(self._graph, trained, rest)(tokens, targets)

            value, gradients = jax.value_and_grad(loss)(trained)
            updates, state = self._tx.update(gradients, state, trained)
            return optax.apply_updates(trained, updates), state, value

        inputs = (self._rest, tokens, targets)
        compiled = jax.jit(one, donate_argnums=(0, 1)).lower(*self._now, *inputs).compile()
        self._planned = planned_bytes(compiled)

        def step() -> float:
            *self._now[:], value = jax.block_until_ready(compiled(*self._now, *inputs))
            return float(value)

        return step

    def decode(self, ids: np.ndarray) -> Callable[[], object]:
        """The model on (batch, 1) tokens, compiled."""
        inputs = (self._now[0], self._rest, jnp.asarray(ids))
        forward = jax.jit(lambda trained, rest, x: nnx.merge(self._graph, trained, rest)(x))
        compiled = forward.lower(*inputs).compile()
        return lambda: jax.block_until_ready(compiled(*inputs))

    def forget_peak(self) -> None:
        """Nothing: JAX's peak never falls, so sizes must rise."""

    def memory(self) -> dict[str, int | None]:
        """Most bytes there were at once, by the allocator; and what XLA plans for the last step.

        A CPU has the plan alone.
        """
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", self._planned)
        return {"peak_bytes": peak, "planned_bytes": self._planned}
