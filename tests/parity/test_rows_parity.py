"""Rows of one batch against PyTorch PEFT, row by row: there each adapter alone, here all at once.

(PEFT takes `adapter_names` for RandLoRA and ignores it, so that all rows run one adapter.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import zoo
from families import twins
from peft_side import load, save_adapter

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.models.slots import Chosen

pytestmark = pytest.mark.torch

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "bert": {  # the head is trained whole, as of any classifier
        "a": {"bias": "all"},
        "b": {"r": 7, "target_modules": ["query", "value"], "sparse": True},
    },
    "llama": {  # ten times as strong, its own rounding would be seen: 5e-6 between ways to run it
        "a": {
            "target_modules": LINEAR,
            "modules_to_save": ["norm", "lm_head"],
            "randlora_alpha": 1,
        },
        "b": {"r": 7, "target_modules": ["q_proj", "down_proj"]},
    },
}
NAMES = ["b", "a", "__base__", "a"]
SEARCH = {"max_new_tokens": 4, "pad_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module", params=ADAPTERS)
def case(request, tmp_path_factory):
    """Twins, the adapters' folders, and what PEFT makes of the batch with each alone."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    pair, folders = twins(family, folder / "base"), {}
    each = {"__base__": pair.torch_logits()}
    for name, changes in ADAPTERS[family].items():
        folders[name] = folder / name
        theirs = save_adapter(family, pair.path, folders[name], **changes)
        each[name] = pair.torch_logits(theirs)
    return family, pair, folders, each


def opened(pair, folders, stacked=True):
    names = iter(folders)
    model = RandLoraModel.from_pretrained(pair.flax, folders[first := next(names)], first)
    for name in names:
        model.load_adapter(folders[name], name)
    if stacked:
        model.stack_adapters(3)
    return model


def allowed(pair, each):
    between = np.abs(pair.flax_logits() - each["__base__"]).max()
    return max(1e-5 * np.abs(each["__base__"]).max(), 2 * between)


def rows_of(each, names=NAMES):
    return np.stack([each[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("stacked", [True, False])
def test_rows_are_pefts(case, stacked):
    _, pair, folders, each = case
    expected = rows_of(each)
    model = opened(pair, folders, stacked)
    found = np.asarray(model(**pair.inputs, adapter_names=NAMES).logits)
    tolerance = allowed(pair, each)
    print(f"rows differ by {np.abs(found - expected).max():.2e} of {tolerance:.2e} allowed")
    assert np.abs(found - expected).max() <= tolerance
    np.testing.assert_array_equal(found[2], pair.flax_logits()[2])
    for a, b in (("a", "b"), ("a", "__base__"), ("b", "__base__")):
        assert np.abs(each[a] - each[b]).max() > 1000 * tolerance
    alone = {}
    for name in folders:
        model.set_adapter(name)
        alone[name] = pair.flax_logits(model)
    alone = rows_of({**alone, "__base__": pair.flax_logits()})
    assert np.abs(found - alone).max() <= 1e-6 * np.abs(alone).max()


def test_rows_shifted_by_one_are_seen(case, monkeypatch):
    _, pair, folders, each = case
    of = Chosen.of.__func__

    def shifted(cls, stack, table, rows):
        return Chosen(*(jnp.roll(x, 1, 0) for x in of(cls, stack, table, rows)))

    monkeypatch.setattr(Chosen, "of", classmethod(shifted))
    found = opened(pair, folders)(**pair.inputs, adapter_names=NAMES).logits
    assert np.abs(found - rows_of(each)).max() > 1000 * allowed(pair, each)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_generated_rows_are_pefts_in_one_program(case):
    family, pair, folders, _ = case
    prompt = pair.inputs["input_ids"][:, :5]
    mask = torch.ones(prompt.shape, dtype=torch.long)
    each = {}
    for name in ("__base__", *folders):
        theirs = load(family, pair.path)
        if name != "__base__":
            theirs = peft.PeftModel.from_pretrained(theirs, folders[name]).eval()
        given = {"input_ids": torch.tensor(prompt), "attention_mask": mask}
        made = theirs.generate(**given, do_sample=False, **SEARCH).numpy()
        each[name] = np.pad(made, ((0, 0), (0, 9 - made.shape[1])), constant_values=1)
    assert not any(np.array_equal(each[a], each[b]) for a, b in ("ab", ("a", "__base__")))
    model, traces = opened(pair, folders), []

    @jax.jit
    def generate(params, rows):
        traces.append(1)
        return model.generate(prompt, params=params, adapter_names=rows, **SEARCH).sequences

    for names in (NAMES, NAMES[::-1], ["a"] * 4, ["__base__"] * 4):
        found = generate(model.params, model.rows(names))
        np.testing.assert_array_equal(found, rows_of(each, names))
    assert len(traces) == 1
    model.delete_adapter("b")
    model.load_adapter(folders["b"], "again")
    found = generate(model.params, model.rows(["again"] * 4))
    np.testing.assert_array_equal(found, each["b"])
    assert len(traces) == 1
    with pytest.raises(ConfigError, match="has 3: expected one name for each row"):
        model.generate(prompt, adapter_names=["a"] * 3, **SEARCH)
    # named, and without jit
    found = model.generate(prompt, adapter_names=["a", "again", "a", "a"], **SEARCH).sequences
    np.testing.assert_array_equal(
        found, rows_of({**each, "again": each["b"]}, ["a", "again", "a", "a"])
    )


@pytest.mark.long
@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_every_beam_of_a_row_has_its_adapter(case):
    _, pair, folders, _ = case
    prompt, model = pair.inputs["input_ids"][:, :5], opened(pair, folders)

    @jax.jit
    def search(params, rows=None):
        settings = {"params": params, "num_beams": 3, **SEARCH}
        return model.generate(prompt, adapter_names=rows, **settings).sequences

    each = {"__base__": pair.flax.generate(prompt, num_beams=3, **SEARCH).sequences}
    for name in folders:
        model.set_adapter(name)
        each[name] = search(model.params)
    assert not np.array_equal(each["a"], each["b"])
    np.testing.assert_array_equal(search(model.params, model.rows(NAMES)), rows_of(each))


@pytest.mark.long
def test_the_encoder_sees_each_row_once(tmp_path, monkeypatch):
    pair = zoo.twins("bart", tmp_path)
    ids, names = zoo.IDS, ["b", "__base__", "a"]
    settings = {"max_length": 6, "pad_token_id": 1, "eos_token_id": 2}
    configs = {"a": ["k_proj", "out_proj"], "b": ["v_proj", "fc2"]}
    model = None
    for seed, (name, targets) in enumerate(configs.items()):
        config = RandLoraConfig(r=5, randlora_alpha=25, target_modules=targets, init_weights=False)
        key = jax.random.key(seed)
        if model is None:
            model = get_peft_model(pair.flax, config, name, rngs=key)
        else:
            model.add_adapter(name, config, rngs=key)
    model.stack_adapters()

    def search(params, rows=None):
        given = {"params": params, "adapter_names": rows, "num_beams": 2, **settings}
        return model.generate(ids, **given).sequences

    each = {"__base__": pair.flax.generate(ids, num_beams=2, **settings).sequences}
    alone = jax.jit(search)
    for name in configs:
        model.set_adapter(name)
        each[name] = alone(model.params)
    for i, name in enumerate(names):
        others = [each[other][i] for other in names if other != name]
        assert not any(np.array_equal(each[name][i], other) for other in others)
    given = model.params, model.rows(names)
    np.testing.assert_array_equal(jax.jit(search)(*given), rows_of(each, names))

    def tiled(chosen, times):
        return Chosen(*(jnp.tile(x, (times, 1)) for x in chosen))

    monkeypatch.setattr(Chosen, "repeated", tiled)
    mistaken = jax.jit(lambda *given: search(*given))(*given)
    assert not np.array_equal(mistaken, rows_of(each, names))
