"""Names of a wrapper's own hide nothing of the user's, and what flax does to methods leaves it."""

import inspect
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import RandLoraConfig, get_peft_model

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)


class Layer(nnx.Linear):
    """Has what a wrapper might have, too."""

    def __init__(self, rngs):
        super().__init__(8, 8, rngs=rngs)
        self.settings, self.held, self.by_row = {"gain": 1.5}, 2.0, [1]

    def applied(self):
        return 3.0

    def stacked(self, x):
        return self(x)


class Net(nnx.Module):
    def __init__(self):
        self.d = Layer(nnx.Rngs(0))
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        d = self.d
        return self.norms[0](d.stacked(x)) * d.settings["gain"] * d.held * d.applied() + d.by_row[0]


def made(**fields):
    config = RandLoraConfig(r=3, target_modules=["d"], init_weights=False, **fields)
    return get_peft_model(Net(), config, rngs=nnx.Rngs(1))


def test_a_layer_keeps_its_names():
    model = made()
    with model.disable_adapter():
        np.testing.assert_array_equal(model(X), Net()(X))
    y = model(X)
    np.testing.assert_allclose(model.merge_and_unload()(X), y, rtol=1e-4, atol=1e-5)


@pytest.fixture
def classes_given_back():
    """``nnx.tabulate`` leaves in every class what it inherits, and ``nnx.capture`` minds."""
    kinds = [nnx.Pytree]
    for kind in kinds:
        kinds += kind.__subclasses__()
    before = {kind: set(vars(kind)) for kind in kinds}
    yield
    for kind, names in before.items():
        for name in set(vars(kind)) - names:
            delattr(kind, name)


@pytest.mark.usefixtures("classes_given_back")
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["norms.0"], "bias": "all"}])
def test_a_wrapped_model_is_tabulated_and_runs_on(fields):
    model = made(**fields)
    y, shown = model(X), inspect.signature(model.__call__)
    table = nnx.tabulate(model, X, console_kwargs={"width": 400})
    assert "NnxRandLora" in table and "model/d/base_layer" in table
    np.testing.assert_array_equal(model(X), y)
    assert inspect.signature(model.__call__) == shown == inspect.signature(model.model.__call__)
    assert "inputs" in inspect.signature(model.model.d.__call__).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(made(**fields)(X), y)
