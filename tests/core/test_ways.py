"""How a layer may run, and the reason against every other way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.core.contraction import LAST_AXES
from randlora_jax.core.cost import Sizes, explained
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.ways import ExecutionOptions, Way, possible_ways, require_a_way

IN_KERNEL, FORMED, FACTORED = Way


def ways(*, kernel=jnp.float32, call=LAST_AXES, dtype=jnp.float32, apply="auto", drops=False):
    array = jax.ShapeDtypeStruct((4, 6), kernel)
    return possible_ways(
        Kernel(array, KernelLayout("i o")), call, dtype, ExecutionOptions(apply), drops=drops
    )


@pytest.mark.parametrize(
    ("situation", "left", "reason"),
    [
        ({}, (IN_KERNEL, FORMED, FACTORED), None),
        ({"apply": "merged"}, (IN_KERNEL, FORMED), "apply='merged'"),
        ({"apply": "factored"}, (FACTORED,), "apply='factored'"),
        ({"drops": True}, (FORMED, FACTORED), "adapter dropout"),
        ({"dtype": jnp.bfloat16}, (FORMED, FACTORED), "rounding of W to bfloat16"),
        ({"kernel": jnp.bfloat16}, (FORMED, FACTORED), "rounding of W to bfloat16"),
        ({"kernel": jnp.float16, "drops": True}, (FORMED, FACTORED), "adapter dropout"),
        ({"dtype": jnp.bfloat16, "apply": "merged"}, (IN_KERNEL, FORMED), "apply='merged'"),
        ({"kernel": jnp.bfloat16, "apply": "merged"}, (IN_KERNEL, FORMED), "apply='merged'"),
        ({"call": None}, (IN_KERNEL,), "not known to be a sum"),
        ({"call": None, "dtype": jnp.bfloat16}, (IN_KERNEL,), "not known to be a sum"),
        ({"kernel": jnp.int8}, (FORMED, FACTORED), "int8 numbers"),
    ],
)
def test_what_is_possible(situation, left, reason):
    found = ways(**situation)
    assert found.forward == left and set(found.against) == set(Way) - set(left)
    assert reason is None or any(reason in text for text in found.against.values())
    require_a_way("here", found)


@pytest.mark.parametrize(
    ("situation", "reasons"),
    [
        ({"call": None, "drops": True}, ["not known to be a sum", "adapter dropout"]),
        ({"call": None, "apply": "factored"}, ["not known to be a sum", "apply='factored'"]),
        ({"call": None, "kernel": jnp.int4}, ["not known to be a sum", "int4 numbers"]),
    ],
)
def test_no_way_is_one_error_with_every_reason(situation, reasons):
    with pytest.raises(ConfigError) as error:
        require_a_way("blocks.0.up", ways(**situation))
    assert "'blocks.0.up'" in str(error.value)
    assert all(reason in str(error.value) for reason in reasons)
    assert all(way.value in str(error.value) for way in Way)


def test_the_gradient_beside_takes_the_place_of_that_through_the_kernel():
    """It has the same value, and its rows can be merged first."""
    assert ways().trained == (FORMED, FACTORED)
    assert ways(dtype=jnp.bfloat16, apply="merged").trained == (FORMED,)
    assert ways(call=None).trained == (IN_KERNEL,)


def test_what_the_only_way_loses_is_told():
    caution = ways(call=None, kernel=jnp.bfloat16).caution
    assert "drown in the rounding of W to bfloat16" in caution and "layer_types=" in caution
    sizes = Sizes.in_dtype(jnp.bfloat16, 64, 8, 8, 8)
    assert caution in explained("own", ways(call=None, kernel=jnp.bfloat16), sizes)
    assert not ways(call=None).caution and not ways(dtype=jnp.bfloat16).caution


def test_the_gradient_of_the_input_has_no_small_part_to_lose():
    assert ways(dtype=jnp.bfloat16).inputs == (IN_KERNEL, FORMED, FACTORED)
    assert ways(dtype=jnp.bfloat16, drops=True).inputs == (FORMED, FACTORED)
    assert ways(dtype=jnp.bfloat16, apply="factored").inputs == (FACTORED,)
    assert ways(kernel=jnp.bfloat16, dtype=jnp.bfloat16).inputs == (IN_KERNEL, FORMED, FACTORED)
    # but a layer that holds fewer bits than it multiplies with would have a rounded one
    assert ways(kernel=jnp.bfloat16).inputs == (FORMED, FACTORED)


def test_a_kernel_that_refuses_takes_nothing():
    with pytest.raises(ConfigError, match="int8 numbers"):
        Kernel(jnp.zeros((4, 6), jnp.int8), KernelLayout("i o")).taking([])


class Own(nnx.Module):
    """Not a plain sum, as far as anyone can tell."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(rngs.normal((4, 6)))

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel[...])


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.own, self.half = Own(rngs), nnx.Linear(6, 5, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.half(self.own(x))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, dtype=jnp.bfloat16, name="half")(x)


CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["own", "half"])


def test_explain_knows_types_and_what_layers_multiply_in():
    """Float32 params under dtype=bfloat16, and a layer of unknown type, as they run."""
    model = get_peft_model(Nnx(), CONFIG, views={"own": "i o"})
    half, own = sorted(model.explain(64).splitlines())
    assert own.startswith("own") and "forward: W + delta_W" in own and "not factored" in own
    assert (
        half.startswith("half")
        and "not W + delta_W: in the output, a small delta_W would drown" in half
    )


def test_a_linen_layer_tells_its_dtype_once_it_has_run():
    module, x = Linen(), jnp.ones((3, 4))
    config = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["half"])
    model = get_peft_model(module.bind(module.init(jax.random.key(0), x)), config)
    model(x)
    assert "not W + delta_W: in the output, a small delta_W would drown" in model.explain(64)
