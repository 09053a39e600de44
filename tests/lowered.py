"""Runs an example up to its first training step, and lowers that for GPU and TPU instead.

python tests/lowered.py examples/with_nnx.py
"""

import functools
import os
import runpy
import sys
from pathlib import Path

import jax
from flax import nnx

os.environ["HF_HUB_OFFLINE"] = "1"
PLATFORMS = ("cuda", "tpu")
jit, nnx_jit = jax.jit, nnx.jit


def lower(function, *args):
    exported = jax.export.export(jit(function), platforms=PLATFORMS)(*args)
    text = exported.mlir_module()
    assert exported.platforms == PLATFORMS and "stablehlo.dot_general" in text
    print(
        f"lowered for {', '.join(exported.platforms)}: {text.count('stablehlo.dot_general')} dots"
    )
    sys.stdout.flush()
    os._exit(0)  # nothing after the first step matters


def on_arrays(function):
    """Stands in for jax.jit."""

    @functools.wraps(function)
    def call(*args):
        lower(function, *args)

    return call


def on_modules(function):
    """Stands in for nnx.jit, as nnx's own split and merge do."""

    @functools.wraps(function)
    def call(*args):
        graph, state = nnx.split(args)

        def pure(state):
            merged = nnx.merge(graph, state)
            return function(*merged), nnx.state(merged)

        lower(pure, state)

    return call


def patched(real, stand_in):
    def decorate(function=None, **options):
        if getattr(function, "__name__", "") == "step":
            return stand_in(function)
        return real(**options) if function is None else real(function, **options)

    return decorate


if __name__ == "__main__":
    jax.jit, nnx.jit = patched(jit, on_arrays), patched(nnx_jit, on_modules)
    script = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(script.parent))
    if "tunix" in script.name:
        import tunix_pair  # noqa: F401 - lets tunix be imported without its trainers
    runpy.run_path(str(script), run_name="__main__")
    sys.exit("the example has no training step")
