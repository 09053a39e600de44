"""PyTorch PEFT in the same process, both ways: its adapters here, ours there.

Real architectures, small random weights. The adapter must move the logits by a tenth of their
standard deviation, and the mistakes one would make are shown to miss the tolerance a hundredfold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from families import FAMILIES, twins

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.core.update import Update

pytestmark = pytest.mark.torch

R = {"opt": 32, "bert": 8, "gpt2": 5, "llama": 7}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pair(family, tmp_path_factory):
    return twins(family, tmp_path_factory.mktemp(family))


def settings(family):
    # opt: the settings of PEFT's published example
    return {
        "r": R[family],
        "randlora_alpha": 2 * R[family],
        "target_modules": FAMILIES[family][2],
        "projection_prng_key": 42,
        "task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM",
    }


def tolerance(pair):
    """1e-5 of the largest logit, or twice what the two unadapted models differ by."""
    ours, theirs = pair.flax_logits(), pair.torch_logits()
    between = np.abs(ours - theirs).max()
    print(f"unadapted models differ by {between:.2e}, largest logit {np.abs(theirs).max():.2e}")
    return max(1e-5 * np.abs(theirs).max(), 2 * between)


def compare(found, expected, base, allowed):
    assert np.std(expected - base) >= 0.1 * np.std(base), "the adapter hardly moves the logits"
    error = np.abs(found - expected).max()
    print(f"adapted models differ by {error:.2e} of {allowed:.2e} allowed")
    assert error <= allowed


def same_deltas(ours, peft_model):
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft_model.named_modules()
        if hasattr(module, "randlora_lambda")
    }
    assert set(ours) == set(layers)
    for name, found in ours.items():
        expected = layers[name].get_delta_weight("default").detach().float().numpy()
        expected = expected.T if layers[name].fan_in_fan_out else expected
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), name


@pytest.fixture(scope="module")
def from_peft(family, pair, tmp_path_factory):
    """A PEFT adapter with random numbers, as PEFT saves it."""
    torch.manual_seed(1)
    base = type(pair.torch).from_pretrained(pair.path, attn_implementation="eager").eval()
    model = peft.get_peft_model(base, peft.RandLoraConfig(**settings(family))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "randlora_lambda" in name:
                p.normal_(0, 0.3)
            elif "randlora_gamma" in name:
                p.mul_(1 + 0.3 * torch.randn_like(p))
            elif p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_an_adapter_of_pefts_gives_its_logits_here(pair, from_peft, apply):
    theirs, folder = from_peft
    ours = RandLoraModel.from_pretrained(pair.flax, folder, apply=apply)
    same_deltas(ours.delta_weights(), theirs)
    compare(pair.flax_logits(ours), pair.torch_logits(theirs), pair.torch_logits(), tolerance(pair))


@pytest.mark.parametrize("mistake", ["swapped flattening", "transposed delta", "dropped scaling"])
def test_known_mistakes_miss_by_a_hundredfold(pair, from_peft, mistake, monkeypatch):
    theirs, folder = from_peft
    ours = RandLoraModel.from_pretrained(pair.flax, folder, apply="merged")
    formed, factors = Update.formed, Update.factors

    def transposed(update, *given):
        delta = formed(update, *given)
        return delta.swapaxes(-1, -2) if len(set(update.matrix)) == 1 else delta

    def unscaled(update, *given):
        return formed(update, *given) / update.scaling

    def swapped(update, *given):
        r, n = update.lam.shape
        right = factors(update, *given)
        b = right.b.reshape(-1, n, r).transpose(0, 2, 1).reshape(right.b.shape)
        return right._replace(b=b)

    if mistake == "swapped flattening":
        monkeypatch.setattr(Update, "factors", swapped)
    else:
        wrong = transposed if mistake == "transposed delta" else unscaled
        monkeypatch.setattr(Update, "formed", wrong)
    if mistake == "swapped flattening" and all(
        lam.shape[1] == 1 for lam, _ in ours._store.state("default").layers.values()
    ):
        pytest.skip("a single basis has no order")
    error = np.abs(pair.flax_logits(ours) - pair.torch_logits(theirs)).max()
    assert error > 100 * tolerance(pair)


def randomised(model, seed=1):
    """Random lambda, gamma and head in a wrapped Flax model."""
    params = dict(model.params)
    rng = np.random.default_rng(seed)

    def move(path, x):
        lam = "randlora_lambda" in jax.tree_util.keystr(path)
        scale = 0.3 if lam else 0.3 * float(jnp.abs(x).max()) + 0.01
        return x + jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32)

    params["randlora"] = jax.tree_util.tree_map_with_path(move, params["randlora"])
    model.params = params
    return model


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
def test_an_adapter_of_ours_gives_its_logits_in_peft(family, pair, kind, tmp_path):
    config = RandLoraConfig(**settings(family), **({} if kind == "dense" else {kind: True}))
    ours = randomised(get_peft_model(pair.flax, config))
    expected = pair.flax_logits(ours)
    ours.save_pretrained(tmp_path)
    base = type(pair.torch).from_pretrained(pair.path, attn_implementation="eager").eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    same_deltas(ours.delta_weights(), theirs)
    compare(pair.torch_logits(theirs), expected, pair.flax_logits(), tolerance(pair))
    # and back into a fresh model of ours, the same to the bit, its bases recognised as JAX's
    back = RandLoraModel.from_pretrained(pair.flax, tmp_path)
    np.testing.assert_array_equal(pair.flax_logits(back), expected)
    assert back.peft_config["default"].projection_source == "jax"
    assert back.peft_config["default"].projection_prng_key == 42


def test_auto_classes_open_ours(family, pair, tmp_path):
    config = RandLoraConfig(**settings(family), base_model_name_or_path=pair.path)
    model = randomised(get_peft_model(pair.flax, config))
    model.save_pretrained(tmp_path)
    auto = (
        peft.AutoPeftModelForSequenceClassification
        if family == "bert"
        else peft.AutoPeftModelForCausalLM
    )
    kwargs = {"num_labels": 3} if family == "bert" else {}
    opened = auto.from_pretrained(tmp_path, attn_implementation="eager", **kwargs).eval()
    np.testing.assert_allclose(
        pair.torch_logits(opened), pair.flax_logits(model), atol=float(tolerance(pair)), rtol=0
    )
