"""Training against PEFT: gradients, optimizer steps and low precision, on real architectures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from families import FAMILIES, twins

from randlora_jax import RandLoraModel

pytestmark = pytest.mark.torch

LABELS = np.array([0, 2, 1, 2])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return twins("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def both(pair, tmp_path):
    """The same random adapter, trainable, in PEFT and here."""
    torch.manual_seed(1)
    base = type(pair.torch).from_pretrained(pair.path, attn_implementation="eager")
    config = peft.RandLoraConfig(
        r=8,
        randlora_alpha=16,
        target_modules=FAMILIES["bert"][2],
        modules_to_save=["classifier"],
    )
    theirs = peft.get_peft_model(base, config).eval()  # eval: no dropout of the base model
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "randlora_lambda" in name:
                p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    return theirs, RandLoraModel.from_pretrained(pair.flax, tmp_path, is_trainable=True)


def torch_loss(model, pair):
    inputs = {k: torch.tensor(v) for k, v in pair.inputs.items()}
    return torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor(LABELS))


def flax_loss(model, pair, frozen, trained):
    logits = model(**pair.inputs, params={**frozen, "randlora": trained}).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def torch_leaves(model, grad=False):
    """{(module, leaf): array in Flax's layout} of what PEFT trains."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            x = (p.grad if grad else p).detach().numpy()
            name = name.removeprefix("base_model.model.").replace(".modules_to_save", "")
            name = name.removesuffix(".default").replace(".default", "")
            module, leaf = name.rsplit(".", 1)
            found[module, {"weight": "kernel"}.get(leaf, leaf)] = x.T if leaf == "weight" else x
    return found


def flax_leaves(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree["default"])[0]
    names = [[key.key for key in path] for path, _ in flat]
    return {(".".join(n[:-1]), n[-1]): x for n, (_, x) in zip(names, flat, strict=True)}


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        error = np.abs(np.asarray(ours[key]) - expected).max()
        assert error <= tolerance * np.abs(expected).max(), (key, error)


@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_are_those_of_autograd(pair, both, jitted):
    theirs, ours = both
    loss = torch_loss(theirs, pair)
    loss.backward()
    frozen = dict(ours.params)
    trained = frozen.pop("randlora")
    f = jax.value_and_grad(lambda t, f: flax_loss(ours, pair, f, t))
    value, grads = (jax.jit(f) if jitted else f)(trained, frozen)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    close(flax_leaves(grads), torch_leaves(theirs, grad=True), 1e-4)


def test_optimizer_steps_are_those_of_torch(pair, both):
    theirs, ours = both
    settings = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.01}
    theirs_opt = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=3e-3, **settings
    )
    ours_opt = optax.adamw(3e-3, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.01)
    frozen = dict(ours.params)
    trained = frozen.pop("randlora")
    state = ours_opt.init(trained)

    @jax.jit
    def step(trained, state, frozen):
        value, grads = jax.value_and_grad(lambda t: flax_loss(ours, pair, frozen, t))(trained)
        updates, state = ours_opt.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    for _ in range(6):
        trained, state, value = step(trained, state, frozen)
        theirs_opt.zero_grad()
        loss = torch_loss(theirs, pair)
        loss.backward()
        theirs_opt.step()
        np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    close(flax_leaves(trained), torch_leaves(theirs), 1e-3)
    found = pair.flax_logits(ours, params={**frozen, "randlora": trained})
    expected = pair.torch_logits(theirs)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bfloat16_loses_no_more_than_in_peft(family, tmp_path):
    name, _, targets = FAMILIES[family]
    pair = twins(family, tmp_path / "base")
    config = peft.RandLoraConfig(r=8, randlora_alpha=16, target_modules=targets)
    exact = peft.get_peft_model(pair.torch, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for key, p in exact.named_parameters():
            if "randlora_lambda" in key:
                p.normal_(0, 0.3)
    exact.save_pretrained(tmp_path / "adapter")
    wanted = pair.torch_logits(exact)

    make = getattr(transformers, name).from_pretrained
    low = make(pair.path, attn_implementation="eager", dtype=torch.bfloat16).eval()
    theirs = peft.PeftModel.from_pretrained(low, tmp_path / "adapter").eval()
    with torch.no_grad():
        inputs = {k: torch.tensor(v) for k, v in pair.inputs.items()}
        their_error = theirs(**inputs).logits.float().numpy() - wanted

    flax = getattr(transformers, f"Flax{name}").from_pretrained(
        pair.path, from_pt=True, dtype=jnp.bfloat16
    )
    flax.params = flax.to_bf16(flax.params)
    ours = RandLoraModel.from_pretrained(flax, tmp_path / "adapter")
    out = ours(**pair.inputs).logits
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32) - wanted
    ratio = np.sqrt((error**2).mean() / (their_error**2).mean())
    print(f"{family}: our bf16 error is {ratio:.2f} of PEFT's")
    assert ratio <= 1.5
