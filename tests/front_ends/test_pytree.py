"""Any other library's params: W + delta_W before its own apply, against PyTorch PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from mlp import SIZES, TARGETS, X, assert_same, torch_net, torch_run

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

SETTINGS = {"r": 5, "randlora_alpha": 10, "target_modules": TARGETS}
VIEWS = {"net/(tall|wide|head)": "i o", "net/square": "o i"}
NAMES = {r"net/(\w+)": r"\1"}


def params_of(twin):
    """As a library might hold them: one kernel the other way round, biases named b."""
    tree = {}
    for name in [*SIZES, "head"]:
        weight = twin.get_submodule(name).weight.detach().numpy()
        kernel = weight if name == "square" else weight.T
        tree[name] = {
            "w": jnp.asarray(kernel),
            "b": jnp.asarray(twin.get_submodule(name).bias.detach().numpy()),
        }
    return {"net": tree}


def forward(params, x):
    for name in [*SIZES, "head"]:
        layer = params["net"][name]
        kernel = layer["w"].T if name == "square" else layer["w"]
        x = x @ kernel + layer["b"]
        x = x if name == "head" else jnp.tanh(x)
    return x


def run(model):
    return np.asarray(jax.jit(lambda v: forward(model.merged(v), X))(model.variables))


def wrapped(**more):
    return get_peft_model(
        params_of(torch_net()), RandLoraConfig(**SETTINGS, **more), views=VIEWS, names=NAMES
    )


def moved(model):
    rng = np.random.default_rng(0)
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    trained = jax.tree.map(move, model.variables["randlora"])
    model.variables = {**model.variables, "randlora": trained}
    return model


@pytest.mark.parametrize("bias", ["none", "all"])
def test_ours_opens_in_peft_and_comes_back(bias, tmp_path):
    model = wrapped(bias=bias)
    plain = np.asarray(jax.jit(lambda p: forward(p, X))(params_of(torch_net())))
    np.testing.assert_array_equal(run(model), plain)
    moved(model).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_net(), tmp_path)
    assert_same(run(model), torch_run(theirs), torch_run(torch_net()))
    again = RandLoraModel.from_pretrained(
        params_of(torch_net()), tmp_path, views=VIEWS, names=NAMES
    )
    np.testing.assert_array_equal(run(again), run(model))
    released = model.merge_and_unload()
    np.testing.assert_allclose(forward(released, X), run(again), rtol=1e-5, atol=1e-5)


def test_pefts_opens_here(tmp_path):
    theirs = peft.get_peft_model(torch_net(), peft.RandLoraConfig(**SETTINGS))
    torch.manual_seed(1)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    ours = RandLoraModel.from_pretrained(params_of(torch_net()), tmp_path, views=VIEWS, names=NAMES)
    assert_same(run(ours), torch_run(theirs), torch_run(torch_net()))


def test_optax_sees_the_trained_leaves_alone():
    model, tx = wrapped(), optax.adam(1e-2)
    frozen = dict(model.variables)
    trained = frozen.pop("randlora")

    @jax.jit
    def step(trained, state, frozen):
        def loss(trained):
            return (forward(model.merged({**frozen, "randlora": trained}), X) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    state, losses = tx.init(trained), []
    for _ in range(20):
        trained, state, value = step(trained, state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    model.variables = {**frozen, "randlora": trained}
    assert model.get_nb_trainable_parameters()[0] == sum(x.size for x in jax.tree.leaves(trained))


def test_what_a_pytree_cannot_do_is_said():
    params = params_of(torch_net())
    with pytest.raises(ConfigError, match="cannot wrap a dict"):
        get_peft_model(params, RandLoraConfig(**SETTINGS))
    with pytest.raises(ConfigError, match="cannot wrap a dict"):
        get_peft_model({"f": jnp.tanh}, RandLoraConfig(**SETTINGS), views=VIEWS)
    with pytest.raises(ConfigError, match="a layer's input"):
        wrapped(randlora_dropout=0.1)
    with pytest.raises(ConfigError, match="a layer's input"):
        get_peft_model(params, RandLoraConfig(**SETTINGS), views=VIEWS, apply="factored")


def test_what_is_said_of_a_pytree_is_what_it_does():
    """It has no layers to look into, so not even one token is factored."""
    assert all("forward: W + delta_W" in line for line in wrapped().explain(1).splitlines())


def test_off_it_is_the_params_until_enabled():
    model = moved(wrapped())
    adapted = run(model)
    model.disable_adapter_layers()
    np.testing.assert_array_equal(run(model), jax.jit(forward)(model.params, X))
    assert not model.split()[0]
    model.enable_adapter_layers()
    np.testing.assert_array_equal(run(model), adapted)


def test_two_layers_of_one_name_are_refused():
    kernel = jnp.ones((8, 6))
    params = {"a.b": {"w": kernel}, "a": {"b": {"w": kernel}}}
    with pytest.raises(ConfigError, match=r"'a(\.|/)b/w' and 'a(\.|/)b/w' .* both called 'a\.b'"):
        get_peft_model(
            params, RandLoraConfig(r=4, target_modules="all-linear"), views={".*": "i o"}
        )


def test_a_flat_dict_of_pytorchs_names_is_a_tree_with_dots_between_the_parts(tmp_path):
    """As `safetensors` gives it."""
    twin = torch_net()
    flat = {name: jnp.asarray(leaf.detach().numpy()) for name, leaf in twin.named_parameters()}
    params = unflatten_dict(flat, sep=".")
    config = RandLoraConfig(**SETTINGS, bias="all")
    model = moved(get_peft_model(params, config, views={".*/weight": "o i"}))
    model.save_pretrained(tmp_path, names={".*": r"\g<0>"})
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    changed = flatten_dict(model.merged(model.variables), sep=".")
    moved_twin = torch_net()
    moved_twin.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in changed.items()})
    assert_same(torch_run(moved_twin), torch_run(theirs), torch_run(torch_net()))
