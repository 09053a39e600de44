"""The two programs of a server: prompts are read, and every row says one more token.

tunix's cache has one place for the next token of all rows. Here rows begin and end at different
times, so each has its tokens at places of its own, from 0 on. The model writes a new token in the
last place, which belongs to no row; from there it is moved to its row's own. So what a row says
depends on nothing that other rows do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Cache = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for.

    Args:
      rows: how many answers are written at once.
      places: how many tokens a prompt and its answer have together.
      prompts: how many prompts are read at once, ascending: programs for each.
      lengths: how many tokens a prompt is padded to, ascending: programs for each.
      widths: of how many rows, the first ones, a step is, ascending: a program for each.
    """

    rows: int
    places: int
    prompts: Sequence[int]
    lengths: Sequence[int]
    widths: Sequence[int]


class Steps:
    """A model with stacked adapters and the cache of its rows.

    The model's arrays are an argument of the programs: adapters come and go while they run.

    Args:
      model: tunix's Llama 3 after `stack_adapters`.
    """

    def __init__(self, model: Any, sizes: Sizes) -> None:
        graph, _ = nnx.split(model)
        self.sizes = sizes
        self.take_arrays(model)
        config = model.model.config
        shape = sizes.rows, sizes.places + 1, config.num_kv_heads, config.head_dim
        self._cache: Cache = {
            f"layer_{i}": {"k": jnp.zeros(shape), "v": jnp.zeros(shape)}
            for i in range(config.num_layers)
        }

        def read(arrays: Any, cache: Cache, slots: Any, tokens: Any, counts: Any, rows: Any) -> Any:
            count, length = tokens.shape
            empty = jax.tree.map(lambda x: jnp.zeros((count, length, *x.shape[2:])), cache)
            places = jnp.broadcast_to(jnp.arange(length), tokens.shape)
            seen = places[:, None] <= places[..., None]
            model = nnx.merge(graph, arrays)
            logits, made = model(tokens, places, _at(empty, 0), seen, adapter_names=slots)
            last = jnp.take_along_axis(logits, (counts - 1)[:, None, None], axis=1)
            kept = jax.tree.map(  # where there is no such row, there was no prompt
                lambda x, new: x.at[rows, :length].set(new, mode="drop"), cache, _kept(made)
            )
            return last[:, 0].argmax(-1), kept

        def step(arrays: Any, cache: Cache, slots: Any, tokens: Any, counts: Any) -> Any:
            places, width = jnp.arange(sizes.places + 1), len(tokens)
            seen = (places < counts[:, None]) | (places == sizes.places)
            mine = jax.tree.map(lambda x: x[:width], cache)
            model = nnx.merge(graph, arrays)
            logits, made = model(
                tokens[:, None],
                counts[:, None],
                _at(mine, sizes.places),
                seen[:, None],
                adapter_names=slots,
            )
            rows = jnp.arange(width)
            kept = jax.tree.map(
                lambda x, new: x.at[rows, counts].set(new[:, sizes.places]), cache, _kept(made)
            )
            return logits[:, 0].argmax(-1), kept

        self._read = jax.jit(read, donate_argnums=1)
        self._step = jax.jit(step, donate_argnums=1)

    def take_arrays(self, model: Any) -> None:
        """From here on steps are of the adapters that `model` has now."""
        self._arrays = nnx.state(model)

    def read(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], rows: Sequence[int]
    ) -> list[int]:
        """Puts prompts into rows; the first token of each one's answer.

        Args:
          slots: of their adapters.
          rows: where they go; what was there is forgotten.
        """
        count = _least(self.sizes.prompts, len(prompts))
        length = _least(self.sizes.lengths, max(map(len, prompts)))
        tokens = np.zeros((count, length), np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
        counts = _padded([len(prompt) for prompt in prompts], count, 1)
        where = _padded(rows, count, self.sizes.rows)
        which = _padded(slots, count, 0)
        said, self._cache = self._read(self._arrays, self._cache, which, tokens, counts, where)
        return np.asarray(said).tolist()[: len(prompts)]

    def step(
        self, tokens: Sequence[int], counts: Sequence[int], slots: Sequence[int] | None
    ) -> list[int]:
        """The next token of each of the first rows.

        Args:
          tokens: each row's newest.
          counts: how many a row has before it.
          slots: of their adapters; None for the model's active one in all.
        """
        width = _least(self.sizes.widths, len(tokens))
        which = None if slots is None else _padded(slots, width, 0)
        asked = [_padded(values, width, 0) for values in (tokens, counts)]
        said, self._cache = self._step(self._arrays, self._cache, which, *asked)
        return np.asarray(said).tolist()[: len(tokens)]

    def programs(self) -> Iterator[Callable[[], object]]:
        """Calls that compile each program; rows, which are free, are left with no sense in them."""
        for count, length in product(self.sizes.prompts, self.sizes.lengths):
            yield partial(self.read, [[0] * length] * count, [0] * count, range(count))
        for width in self.sizes.widths:
            yield partial(self.step, *[[0] * width] * 3)
        # the first one again: it met a cache that no program had made, and JAX tells such apart
        yield partial(self.read, [[0]], [0], [0])


def _least(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _padded(values: Sequence[int], size: int, filler: int) -> np.ndarray:
    return np.array([*values, *[filler] * (size - len(values))], np.int32)


def _at(cache: Cache, place: int) -> Cache:
    """As the model takes it, which is told where new tokens go."""
    end = jnp.full((1,), place, jnp.int32)
    return {layer: {**both, "end_index": end} for layer, both in cache.items()}


def _kept(cache: Cache) -> Cache:
    return {layer: {"k": both["k"], "v": both["v"]} for layer, both in cache.items()}
