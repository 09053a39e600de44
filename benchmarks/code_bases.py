"""Other people's models, on their own code: wrapped, trained, merged, saved, read back.

    python benchmarks/code_bases.py --from FOLDER [NAME...]

FOLDER holds checkouts of the code bases (installed ones are imported as they are); NAME picks code
bases, such as ``bonsai``, or one model, such as ``bonsai/ViT``. Each model runs in a process of its
own. Nothing is fetched or installed: what cannot be imported is reported as such. Prints the table
of docs/models.md.

Of each model, in float32 on a CPU, with "all-linear" and r 2:

- *bits*: wrapped, before training, its output is that of the model alone, to the bit;
- *gradients*: with random lambda and gamma, both have gradients that are not zero in every matrix
  of every layer, but where the gradient of the base model's own kernel is zero too;
- *five steps* of AdamW lower the loss on a random target;
- *merged*: the largest difference that merging makes, as a share of the largest output;
- *round trip*: saved, and read into a new model, the output is the same to the bit;
- *left out*: arrays that look like kernels and were not adapted, as `coverage` says.
"""

import argparse
import functools
import importlib
import json
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model

BASES = {
    "tunix": "tunix.BASE",
    "bonsai": "bonsai.BASE",
    "gemma": "deepmind_gemma.BASE",
    "maxtext": "maxtext.BASE",
    "openpi": "openpi.BASE",
    "vision_transformer": "vision.VISION_TRANSFORMER",
    "big_vision": "vision.BIG_VISION",
    "octo": "octo.BASE",
    "flax": "flax_examples.BASE",
    "maxdiffusion": "maxdiffusion.BASE",
}
SETTINGS = {"r": 2, "randlora_alpha": 4, "target_modules": "all-linear"}
NAME = "default"


def code_base(key):
    """Of `BASES`."""
    module, attribute = BASES[key].split(".")
    return getattr(importlib.import_module(f"small_models.{module}"), attribute)


def largest(x) -> float:
    """The largest magnitude in an array."""
    return float(jnp.abs(x).max())


class Wrapped:
    """A wrapped model as a function of its trained leaves, in nnx and linen alike."""

    def __init__(self, entry, model):
        self.entry, self.model = entry, model
        self.is_nnx = isinstance(model, nnx.Module)
        self.inputs = tuple(entry.inputs.values())

    def output(self):
        """What the model returns."""
        return self.entry.call(self.model, *self.inputs)

    def trained(self):
        """A copy of the trained leaves."""
        if self.is_nnx:
            return jax.tree.map(lambda x: x, nnx.state(self.model, AdapterParam))
        return self.model.split()[0]

    def put(self, trained):
        """Puts trained leaves in place."""
        if self.is_nnx:
            nnx.update(self.model, trained)
        else:
            self.model.variables = {**self.model.split()[1], "randlora": trained}

    def by_layer(self, trained):
        """Lambda and gamma (or what has their shape) by layer, the stack first."""
        before = self.trained()
        self.put(trained)
        found = self.model._store.state(NAME).layers
        self.put(before)
        return found

    def loss_and_gradients(self, target):
        """(trained) -> (the loss, its gradients), compiled."""

        def loss(call):
            return ((self.entry.call(call, *self.inputs) - target) ** 2).mean()

        if self.is_nnx:
            state = nnx.DiffState(0, AdapterParam)
            compiled = nnx.jit(nnx.value_and_grad(loss, argnums=state))

            def of_trained(trained):
                self.put(trained)
                return compiled(self.model)

            return of_trained

        def of_collections(trained, frozen):
            return loss(functools.partial(self.model.apply, {**frozen, "randlora": trained}))

        _, frozen = self.model.split()
        compiled = jax.jit(jax.value_and_grad(of_collections))
        return lambda trained: compiled(trained, frozen)


def shaken(trained):
    """Random lambda and gamma: zeros become noise, other numbers are scaled."""
    draws = np.random.default_rng(5)

    def shake(x):
        noise = 0.1 * jnp.asarray(draws.standard_normal(x.shape), x.dtype)
        return jnp.where(x == 0, noise, x * (1 + noise))

    return jax.tree.map(shake, trained)


def kernel_gradients(entry, model, target):
    """The gradient of a base model's own parameters, by path."""
    inputs = tuple(entry.inputs.values())
    if isinstance(model, nnx.Module):

        def loss(model):
            return ((entry.call(model, *inputs) - target) ** 2).mean()

        grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param)))(model)
        flat = nnx.to_flat_state(grads)
        return {tuple(map(str, path)): leaf.get_raw_value() for path, leaf in flat}
    from flax.core import meta
    from flax.traverse_util import flatten_dict

    module, variables = model.unbind()

    def loss(params):
        def call(*args, **kwargs):
            return module.apply({**variables, "params": params}, *args, **kwargs)

        return ((entry.call(call, *inputs) - target) ** 2).mean()

    def unboxed(tree):
        return jax.tree.map(
            lambda x: getattr(x, "value", x),
            tree,
            is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
        )

    return flatten_dict(unboxed(jax.jit(jax.grad(loss))(variables["params"])))


def without_gradient(wrapped, gradients, own):
    """Matrices whose lambda or gamma has none: where the kernel has, and where it has none either.

    Args:
      own: makes the gradients of the merged model's kernels, where it comes to that.
    """
    lost, still, kernels = [], [], None
    for name, arrays in wrapped.by_layer(gradients).items():
        layer = wrapped.model._registry.layers[name]
        for index in np.ndindex(*layer.stack):
            if all(largest(x[index]) > 0 for x in arrays):
                continue
            kernels = kernels or own()
            kernel = layer.layout.to_matrix(kernels[tuple(map(str, layer.kernel_path))])
            (lost if largest(kernel[index]) > 0 else still).append(f"{name}{list(index)}")
    return lost, still


def five_steps(wrapped, gradients):
    """The losses of five steps from here, and after them."""
    tx = optax.adamw(2e-3)
    trained = wrapped.trained()
    state, losses = tx.init(trained), []
    for _ in range(5):
        loss, grads = gradients(trained)
        losses.append(float(loss))
        updates, state = tx.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
    losses.append(float(gradients(trained)[0]))
    return losses


def check(make) -> dict:
    """What was found of one model."""
    entry = make()
    alone = entry.call(entry.model, *entry.inputs.values())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings, stated = entry.stated()
        config = RandLoraConfig(**{**SETTINGS, **settings})
        wrapped = Wrapped(entry, get_peft_model(entry.model, config, **stated))
    found = {
        "said": entry.said,
        "warned": [str(w.message) for w in said if "adapter" in str(w.message)],
    }
    registry = wrapped.model._registry
    adapted = wrapped.by_layer(wrapped.trained())
    found["layers"] = len(adapted)
    found["matrices"] = sum(int(np.prod(registry.layers[name].stack)) for name in adapted)
    found["paths"] = sorted({"/".join(map(str, registry.layers[n].kernel_path)) for n in adapted})
    found["left"] = [a.path for a in wrapped.model.coverage() if a.taken == "left out"]
    found["unsaid"] = [f"{'/'.join(map(str, a.path))}" for a in registry.left if not a.other]
    found["bits"] = bool((wrapped.output() == alone).all())
    noise = np.random.default_rng(6).standard_normal(alone.shape)
    target = alone + jnp.asarray(noise, alone.dtype) * jnp.std(alone)
    gradients = wrapped.loss_and_gradients(target)
    losses = five_steps(wrapped, gradients)
    found["losses"] = losses
    wrapped.put(shaken(wrapped.trained()))
    _, slopes = gradients(wrapped.trained())
    output = wrapped.output()
    found["moves"] = largest(output - alone) / largest(alone)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.model.save_pretrained(folder)
        fresh = make()
        again = RandLoraModel.from_pretrained(fresh.model, folder, **fresh.stated()[1])
        found["round trip"] = bool((Wrapped(fresh, again).output() == output).all())
    own = functools.partial(kernel_gradients, entry, again.merge_and_unload(), target)
    found["lost"], found["still"] = without_gradient(wrapped, slopes, own)
    wrapped.model.merge_adapter()
    found["merged"] = largest(wrapped.output() - output) / largest(output)
    return found


def in_a_process(folder, key, model) -> dict:
    """`check` of one model, or the error that stopped it."""
    command = [sys.executable, __file__, "--from", str(folder), "--one", f"{key}/{model}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"it ended with {done.returncode}"}
    return json.loads(lines[-1])


def one(name) -> None:
    """Prints what was found of one model, as JSON."""
    key, _, model = name.partition("/")
    try:
        found = check(code_base(key).models[model])
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(found))


def _gradients(lost, still) -> str:
    """How a row says which matrices have gradients."""
    if lost:
        return f"NONE in {lost[:3]}"
    return f"all but {len(still)}, which have none alone either" if still else "all"


def row(base, model, found) -> str:
    """A line of the table."""
    if "error" in found:
        cells = ["", "", "", "", "", "", " ".join(found["error"].split())[:200]]
    else:
        losses = found["losses"]
        cells = [
            f"`{found['said']}`" if found["said"] else "nothing",
            f"{found['matrices']}",
            "equal" if found["bits"] else "DIFFER",
            _gradients(found["lost"], found["still"]),
            f"{losses[0]:.3g} to {losses[-1]:.3g}",
            f"{found['merged']:.1e}",
            "equal" if found["round trip"] else "DIFFERS",
        ]
    return (
        f"| {base.name} {base.version} | {model} | {base.framework} | " + " | ".join(cells) + " |"
    )


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    sys.path[:0] = [
        str(args.folder.resolve() / path) for key in BASES for path in code_base(key).paths
    ]
    if args.one:
        return one(args.one)
    print(
        "| code base | model | framework | said by hand | matrices | bits before training | "
        "gradients | loss, five steps | merged | round trip |\n" + "|---" * 10 + "|"
    )
    for key in BASES:
        base = code_base(key)
        for model in base.models:
            if args.names and not {key, f"{key}/{model}"} & set(args.names):
                continue
            print(f"{key}/{model} ...", file=sys.stderr, flush=True)
            found = in_a_process(args.folder, key, model)
            print(json.dumps(found), file=sys.stderr, flush=True)
            print(row(base, model, found), flush=True)


if __name__ == "__main__":
    main()
