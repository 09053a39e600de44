"""One contestant on one model, in a process of its own: a line of JSON for every figure.

python -m on_gpu.one SIZES MODEL CONTESTANT ATTENTION, as ../bench_gpu.py calls it
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .cases import CONTESTANTS, SIZES, Contestant, Model, Sizes
from .telling import in_a_line, teller
from .timing import timed

Row = dict[str, Any]


def side_of(contestant: Contestant, model: Model, length: int, attend: Any) -> Any:
    """The contestant, ready: only its own framework is imported."""
    if contestant.side == "jax":
        from .in_jax import JaxSide

        return JaxSide(contestant, model, attend)
    from .in_torch import TorchSide

    return TorchSide(contestant, model, length)


def training(side: Any, model: Model, tokens: int, length: int) -> Row:
    """Figures of steps on `tokens` tokens."""
    shape = (tokens // length, length + 1)
    ids = np.random.default_rng(0).integers(model.vocabulary, size=shape)
    side.forget_peak()
    began = time.perf_counter()
    step = side.train(ids)
    first = step()
    ready = time.perf_counter() - began
    times, losses = timed(step)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"losses are not all finite: {losses}")
    return {
        "seconds": statistics.median(times),
        "all_seconds": times,
        "first_step_seconds": ready,
        **side.memory(),
        "losses": [first, losses[-1]],
        "trained": side.trained,
    }


def decoding(side: Any, model: Model, batch: int) -> Row:
    """Seconds of the model on `batch` single tokens."""
    ids = np.random.default_rng(0).integers(model.vocabulary, size=(batch, 1))
    times, _ = timed(side.decode(ids))
    return {"seconds": statistics.median(times), "all_seconds": times}


def attempted(figures: Callable[[], Row]) -> Row:
    """Figures, or why there are none."""
    try:
        return figures()
    except Exception as error:  # out of memory, what a compiler refuses: all is a result here
        return {"failed": in_a_line(error)}


def rows(contestant: Contestant, model: Model, sizes: Sizes, attend: Any) -> Iterator[Row]:
    """Every figure as it comes; sizes above one that failed are not tried."""
    side = side_of(contestant, model, sizes.length, attend)
    for batch in sizes.batches:
        row = attempted(lambda: decoding(side, model, batch))  # noqa: B023
        yield {"kind": "decode", "size": batch, **row}
    failed = 0
    for tokens in sizes.tokens:
        row = {"failed": f"not tried, since {failed:,} tokens failed"}
        if not failed:
            row = attempted(lambda: training(side, model, tokens, sizes.length))  # noqa: B023
            failed = tokens if "failed" in row else 0
        yield {"kind": "train", "size": tokens, **row}


def main() -> None:
    """Tells every row."""
    tell = teller()
    chosen, model_name, name, attend = sys.argv[1:]
    sizes = SIZES[chosen]
    model = next(model for model in sizes.models if model.name == model_name)
    for row in rows(CONTESTANTS[name], model, sizes, attend):
        tell(row)


if __name__ == "__main__":
    main()
