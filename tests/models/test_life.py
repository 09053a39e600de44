"""The life of an adapter, step by step beside PEFT's."""

import numpy as np
import peft
import pytest
import torch
from mlp import KINDS, assert_same, torch_net, torch_run

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

pytestmark = pytest.mark.torch

FIRST = {"r": 5, "randlora_alpha": 10, "target_modules": ["tall", "square", "wide"]}
SECOND = {"r": 5, "randlora_alpha": 15, "target_modules": ["square"], "modules_to_save": ["head"]}


class Pair:
    """One of our models and PEFT's, given the same adapters."""

    def __init__(self, kind, folder):
        self.make, self.run_ours, self.randomise = KINDS[kind]
        self.folder = folder
        self.theirs = None
        self.ours = get_peft_model(
            self.make(torch_net()), RandLoraConfig(**FIRST, projection_source="torch:bf16-24bit")
        )

    def load(self):
        """PEFT's model with everything of ours, through files."""
        self.ours.save_pretrained(self.folder)
        self.theirs = peft.PeftModel.from_pretrained(torch_net(), self.folder)
        for name in self.ours.peft_config:
            if name != "default":
                self.theirs.load_adapter(self.folder / name, name)
        return self

    def same(self):
        base = torch_run(torch_net())
        assert_same(self.run_ours(self.ours), torch_run(self.theirs), base)


@pytest.fixture(params=sorted(KINDS))
def pair(request, tmp_path):
    """Two adapters with random numbers."""
    pair = Pair(request.param, tmp_path)
    pair.randomise(pair.ours, np.random.default_rng(1))
    config = RandLoraConfig(**SECOND, projection_source="torch:bf16-24bit")
    pair.ours.add_adapter("second", config)
    pair.ours.set_adapter("second")
    pair.randomise(pair.ours, np.random.default_rng(2))
    pair.ours.set_adapter("default")
    return pair


def test_the_first_adapter_is_active_and_others_wait(pair):
    assert pair.ours.active_adapters == ["default"]
    before = pair.run_ours(pair.ours)
    pair.ours.add_adapter("third", RandLoraConfig(**FIRST, projection_source="torch:bf16-24bit"))
    np.testing.assert_array_equal(pair.run_ours(pair.ours), before)


@pytest.mark.parametrize("chosen", ["default", "second"])
def test_set_adapter(pair, chosen):
    pair.ours.set_adapter(chosen)
    if chosen == "second":  # alone in a PEFT model, so that its own bases are drawn
        pair.ours.delete_adapter("default")
        pair.ours.save_pretrained(pair.folder)
        pair.theirs = peft.PeftModel.from_pretrained(torch_net(), pair.folder / "second")
    else:
        pair.load()
    pair.same()


def test_several_active_adapters_add_up(pair):
    pair.ours.set_adapter(["default", "second"])
    both = pair.run_ours(pair.ours)
    net = torch_net()
    with torch.no_grad():
        for name in ("default", "second"):
            for layer, delta in pair.ours.delta_weights(name).items():
                getattr(net, layer).weight += torch.tensor(delta)
    # the head is trained whole by the second adapter; take it from the merged model
    merged = pair.ours.merge_and_unload()
    leaves = (
        merged.variables["params"]["head"]
        if hasattr(merged, "variables")
        else {"kernel": merged.head.kernel[...], "bias": merged.head.bias[...]}
    )
    with torch.no_grad():
        net.head.weight[:] = torch.tensor(np.array(leaves["kernel"]).T)
        net.head.bias[:] = torch.tensor(np.array(leaves["bias"]))
    np.testing.assert_allclose(both, torch_run(net), rtol=1e-4, atol=1e-5)


def test_only_active_adapters_train(pair):
    sizes = {"default": 0, "second": 0}
    for name in sizes:
        pair.ours.set_adapter(name)
        sizes[name] = pair.ours.get_nb_trainable_parameters()[0]
    pair.load()
    for name, size in sizes.items():
        pair.theirs.set_adapter(name)
        assert pair.theirs.get_nb_trainable_parameters()[0] == size
    pair.ours.set_adapter("default", inference_mode=True)
    assert pair.ours.get_nb_trainable_parameters()[0] == 0


def test_disable_adapter_is_the_base_model_to_the_bit(pair):
    base = pair.run_ours(get_peft_model(pair.make(torch_net()), RandLoraConfig(**FIRST)))
    adapted = pair.run_ours(pair.ours)
    with pair.ours.disable_adapter():
        np.testing.assert_array_equal(pair.run_ours(pair.ours), base)
    np.testing.assert_array_equal(pair.run_ours(pair.ours), adapted)
    pair.ours.merge_adapter()
    with pair.ours.disable_adapter():
        np.testing.assert_array_equal(pair.run_ours(pair.ours), base)
    assert pair.ours._registry.merged == ("default",)


def test_adapters_are_off_until_they_are_enabled(pair):
    """Step by step as PEFT's, which stay off through `set_adapter`, too."""
    pair.load()
    base = pair.run_ours(get_peft_model(pair.make(torch_net()), RandLoraConfig(**FIRST)))
    adapted = pair.run_ours(pair.ours)
    both = pair.ours, pair.theirs
    for step in (
        lambda model: model.disable_adapter_layers(),
        lambda model: model.set_adapter("second"),
        lambda model: model.set_adapter("default"),
    ):
        for model in both:
            step(model)
        assert pair.ours.active_adapters == pair.theirs.active_adapters
        np.testing.assert_array_equal(pair.run_ours(pair.ours), base)
        np.testing.assert_allclose(torch_run(pair.theirs), base, rtol=1e-5, atol=1e-6)
    with pair.ours.disable_adapter():
        pass  # no way to switch them on
    np.testing.assert_array_equal(pair.run_ours(pair.ours), base)
    assert pair.ours.get_nb_trainable_parameters()[0] == 0
    assert "adapters are off" in repr(pair.ours)
    with pytest.raises(ConfigError, match=r"merge_and_unload: the adapters are off.*enable_ad"):
        pair.ours.merge_and_unload()
    for model in both:
        model.enable_adapter_layers()
    np.testing.assert_array_equal(pair.run_ours(pair.ours), adapted)
    pair.same()
    counts = [model.get_nb_trainable_parameters()[0] for model in both]
    assert counts[0] == counts[1] > 0


def test_switching_off_unmerges_as_in_peft(pair):
    base = pair.run_ours(get_peft_model(pair.make(torch_net()), RandLoraConfig(**FIRST)))
    pair.load()
    for model in (pair.ours, pair.theirs):
        model.merge_adapter()
        model.disable_adapter_layers()
    np.testing.assert_array_equal(pair.run_ours(pair.ours), base)
    np.testing.assert_allclose(torch_run(pair.theirs), base, rtol=1e-4, atol=1e-5)
    for model in (pair.ours, pair.theirs):
        model.enable_adapter_layers()
    assert pair.ours.merged_bytes == 0
    assert not pair.theirs.base_model.model.square.merged
    pair.same()


def test_delete_adapter(pair):
    with pytest.warns(UserWarning, match="'second' is"):
        pair.ours.delete_adapter("default")
    assert pair.ours.active_adapters == ["second"] and list(pair.ours.peft_config) == ["second"]
    assert pair.ours.targeted_module_names == ["square"]
    with pytest.raises(ConfigError, match="no adapter named 'default'"):
        pair.ours.set_adapter("default")
    assert pair.ours.get_nb_trainable_parameters()[0] > 0


def test_what_is_chosen_while_adapters_are_off_stays(pair):
    pair.load()
    for model in (pair.ours, pair.theirs):
        with model.disable_adapter():
            model.set_adapter("second")
    assert pair.ours.active_adapters == pair.theirs.active_adapters == ["second"]
    counts = [model.get_nb_trainable_parameters()[0] for model in (pair.ours, pair.theirs)]
    assert counts[0] == counts[1] > 0
    with (
        pytest.warns(UserWarning, match="was deleted; now 'default' is"),
        pair.ours.disable_adapter(),
    ):
        pair.ours.delete_adapter("second")
    assert pair.ours.active_adapters == ["default"]


def test_where_none_is_active_an_adapter_more_is_not(pair):
    theirs = peft.get_peft_model(torch_net(), peft.RandLoraConfig(**FIRST))
    theirs.base_model.set_adapter([])
    theirs.add_adapter("third", peft.RandLoraConfig(**FIRST))
    pair.ours.set_adapter([])
    with pytest.warns(UserWarning, match="no adapter is active: nothing to do"):
        pair.ours.merge_adapter()
    base = pair.run_ours(pair.ours)
    pair.ours.add_adapter("third", RandLoraConfig(**FIRST, projection_source="torch:bf16-24bit"))
    assert pair.ours.active_adapters == theirs.base_model.active_adapters == []
    pair.ours.delete_adapter("third")
    assert pair.ours.active_adapters == []
    np.testing.assert_array_equal(pair.run_ours(pair.ours), base)


def test_whoever_takes_over_is_peft_s_choice(pair):
    pair.ours.add_adapter("also", RandLoraConfig(**FIRST, projection_source="torch:bf16-24bit"))
    pair.load()
    both = pair.ours, pair.theirs
    pair.ours.set_adapter("default", inference_mode=True)
    pair.theirs.base_model.set_adapter("default", inference_mode=True)
    for model in both:
        with pytest.warns(UserWarning, match="active"):
            model.delete_adapter("default")
    assert pair.ours.active_adapters == pair.theirs.active_adapters == ["also"]
    counts = [model.get_nb_trainable_parameters()[0] for model in both]
    assert counts[0] == counts[1] > 0


def test_a_delta_under_a_kernel_that_another_trained_whole_is_not_merged(pair):
    more = {**FIRST, "target_modules": ["square", "head"]}
    pair.ours.add_adapter("onto", RandLoraConfig(**more, projection_source="torch:bf16-24bit"))
    pair.ours.set_adapter("onto")
    pair.randomise(pair.ours, np.random.default_rng(3))
    alone = pair.run_ours(pair.ours)
    pair.ours.set_adapter(["second", "onto"])
    together = pair.run_ours(pair.ours)
    for merge in (
        pair.ours.merge_adapter,
        pair.ours.merge_and_unload,
        lambda: pair.ours.merge_adapter(["onto"]),
    ):
        with pytest.raises(ConfigError, match=r"'head': adapter 'second' trained .* 'onto' adapts"):
            merge()
        np.testing.assert_array_equal(pair.run_ours(pair.ours), together)
    pair.ours.merge_adapter(["second"])
    np.testing.assert_allclose(pair.run_ours(pair.ours), together, rtol=1e-4, atol=1e-5)
    pair.ours.unmerge_adapter()
    base = pair.ours.merge_and_unload(adapter_names=["onto"])
    found = pair.run_ours(get_peft_model(base, RandLoraConfig(**FIRST)))
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_merge_and_unmerge_go_back_to_the_very_bits(pair):
    adapted = pair.run_ours(pair.ours)
    kernels = dict(pair.ours._store.base_leaves())
    pair.load()
    pair.theirs.merge_adapter()
    pair.ours.merge_adapter(safe_merge=True)
    pair.same()
    assert pair.ours.merged_bytes == sum(4 * a * b for a, b in [(7, 24), (24, 24), (24, 10)])
    np.testing.assert_allclose(pair.run_ours(pair.ours), adapted, rtol=1e-4, atol=1e-5)
    assert pair.ours.get_nb_trainable_parameters()[0] == 0
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        pair.ours.set_adapter("second")
    with pytest.warns(UserWarning, match="merged already"):
        pair.ours.merge_adapter()
    pair.ours.unmerge_adapter()
    for path, kernel in pair.ours._store.base_leaves().items():
        np.testing.assert_array_equal(kernel, kernels[path])
    np.testing.assert_array_equal(pair.run_ours(pair.ours), adapted)
    with pytest.warns(UserWarning, match="nothing to do"):
        pair.ours.unmerge_adapter()


def kernels(model):
    """Of the adapted layers."""
    base = model._store.base_leaves()
    layers = model._registry.layers
    return {n: base[layers[n].kernel_path] for n in ("tall", "square", "wide")}


def put(model, arrays):
    """What `nnx.update` or new variables do."""
    layers = model._registry.layers
    model._store.set_base_leaves({layers[name].kernel_path: x for name, x in arrays.items()})


def test_what_changes_while_merged_stays_changed_as_in_peft(pair):
    before = kernels(pair.load().ours)
    for model in (pair.ours, pair.theirs):
        model.merge_adapter()
    put(pair.ours, {"square": kernels(pair.ours)["square"] * 1.5})
    with torch.no_grad():
        pair.theirs.base_model.model.square.base_layer.weight *= 1.5
    pair.same()
    with pytest.warns(UserWarning, match=r"'square\S*': changed while 'default' was merged"):
        pair.ours.unmerge_adapter()
    pair.theirs.unmerge_adapter()
    pair.same()
    after = kernels(pair.ours)
    for name in ("tall", "wide"):
        np.testing.assert_array_equal(after[name], before[name])
    assert np.abs(after["square"] - before["square"]).max() > 0.01


def test_a_change_between_two_merges_stays(pair):
    before = kernels(pair.ours)
    pair.ours.merge_adapter(["default"])
    put(pair.ours, {name: x + 1 for name, x in kernels(pair.ours).items() if name != "tall"})
    pair.ours.merge_adapter(["second"])
    with pytest.warns(UserWarning, match=r"changed while 'default', 'second' was merged"):
        pair.ours.unmerge_adapter()
    after = kernels(pair.ours)
    for name in ("square", "wide"):
        np.testing.assert_allclose(after[name], before[name] + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after["tall"], before["tall"])


@pytest.mark.parametrize("undone", [True, False])
def test_the_same_numbers_are_no_change(pair, undone, recwarn):
    """Of merged kernels, in other arrays; or of the original ones, put there by hand."""
    before = kernels(pair.ours)
    pair.ours.merge_adapter(["default"])
    pair.ours.merge_adapter(["second"])
    put(pair.ours, {n: x.copy() for n, x in (before if undone else kernels(pair.ours)).items()})
    recwarn.clear()
    pair.ours.unmerge_adapter()
    assert not recwarn.list
    for name, kernel in kernels(pair.ours).items():
        np.testing.assert_array_equal(kernel, before[name])


def test_a_broken_adapter_is_not_merged(pair):
    state = pair.ours._store.state("default")
    lam, gamma = state.layers["square"]
    state.layers["square"] = (lam * np.inf, gamma)
    registry = pair.ours._registry
    pair.ours._store.install(registry, registry.specs["default"], state, None)
    pair.ours._follow(registry)
    kernels = dict(pair.ours._store.base_leaves())
    with pytest.raises(ConfigError, match="not finite"):
        pair.ours.merge_adapter(safe_merge=True)
    for path, kernel in pair.ours._store.base_leaves().items():
        np.testing.assert_array_equal(kernel, kernels[path])


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_the_model_comes_back(pair, how):
    pair.ours.set_adapter("second")
    pair.ours.delete_adapter("default")
    expected = pair.run_ours(pair.ours)
    pair.ours.save_pretrained(pair.folder)
    theirs = peft.PeftModel.from_pretrained(torch_net(), pair.folder / "second")
    base = getattr(pair.ours, how)()
    assert type(base) is type(pair.make(torch_net()))
    # wrapped again with an adapter that changes nothing, only to run it alike
    found = pair.run_ours(get_peft_model(base, RandLoraConfig(**FIRST)))
    if how == "merge_and_unload":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert_same(found, torch_run(getattr(theirs, how)()), torch_run(torch_net()))


def test_adapters_of_other_rank_kind_and_width_live_side_by_side(pair):
    """Where PEFT raises or quietly uses the first adapter's bases."""
    other = {"r": 3, "target_modules": ["tall", "square", "wide", "head"], "sparse": True}
    pair.ours.add_adapter("wider", RandLoraConfig(**other, projection_source="torch"))
    pair.ours.set_adapter("wider")
    pair.randomise(pair.ours, np.random.default_rng(3))
    pair.ours.save_pretrained(pair.folder)
    theirs = peft.PeftModel.from_pretrained(torch_net(), pair.folder / "wider")
    base = torch_run(torch_net())
    assert_same(pair.run_ours(pair.ours), torch_run(theirs), base)
    # a narrower one in PEFT's model would silently compute with other numbers
    pair.ours.set_adapter("second")
    alone = peft.PeftModel.from_pretrained(torch_net(), pair.folder / "second")
    assert_same(pair.run_ours(pair.ours), torch_run(alone), base)


def test_keys_must_agree_as_in_peft(pair):
    with pytest.raises(ConfigError, match="projection_prng_key"):
        pair.ours.add_adapter("x", RandLoraConfig(**FIRST, projection_prng_key=1))
    with pytest.raises(ConfigError, match="save_projection"):
        config = RandLoraConfig(
            **FIRST, projection_source="torch:bf16-24bit", save_projection=False
        )
        pair.ours.add_adapter("x", config)
    with pytest.raises(ConfigError, match="already here"):
        pair.ours.add_adapter("second", RandLoraConfig(**FIRST))


@pytest.mark.parametrize("trained", [{"modules_to_save": ["head"]}, {"bias": "all"}])
def test_two_adapters_that_trained_the_same_whole_are_not_applied_at_once(pair, trained):
    config = RandLoraConfig(**FIRST, **trained, projection_source="torch:bf16-24bit")
    pair.ours.add_adapter("third", config)
    alone = pair.run_ours(pair.ours)
    for refused in (pair.ours.set_adapter, lambda names: pair.ours.merge_and_unload(False, names)):
        with pytest.raises(ConfigError, match="'second' and 'third' both trained 'head"):
            refused(["second", "third"])
    np.testing.assert_array_equal(pair.run_ours(pair.ours), alone)
    if "bias" in trained:
        return  # PEFT does not even load it beside another
    pair.load()
    with pytest.raises(ValueError, match="Only one adapter"):
        pair.theirs.base_model.set_adapter(["second", "third"])
    pair.ours.set_adapter(["default", "third"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "trained",
    [
        {},
        {"bias": "all"},
        {"bias": "randlora_only"},
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["head"], "bias": "all"},
    ],
)
def test_parameters_are_counted_as_peft_counts_them(kind, trained):
    make, _, _ = KINDS[kind]
    ours = get_peft_model(make(torch_net()), RandLoraConfig(**FIRST, **trained))
    theirs = peft.get_peft_model(torch_net(), peft.RandLoraConfig(**FIRST, **trained))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
