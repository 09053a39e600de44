"""Adapters of single experts, merged into a checkpoint that has all of a layer's in one tensor."""

import os
import subprocess

import peft
import pytest
import torch
import transformers
from families import WIDTHS
from peft_side import randomise
from randlora_jax.interop.errors import AdapterFileError, TargetError
from safetensors.torch import save_file
from torch.nn import Linear, Module, ModuleList
from torch_files import load_file

from randlora_jax.commands.merge import merge
from randlora_jax.commands.to_lora import to_lora

pytestmark = pytest.mark.torch

# `make compat`: an environment with transformers 5, which has such classes of Mixtral and its kin
NEWER = os.environ.get("TUNIX_PYTHON")
ONE_HEAD = {**WIDTHS, "num_key_value_heads": 1}
GLU = ("gate_proj", "up_proj", "down_proj")
MODELS = {
    "Mixtral": (("w1", "w3", "w2"), {**ONE_HEAD, "intermediate_size": 52, "num_local_experts": 3}),
    "Qwen3Moe": (GLU, {**ONE_HEAD, "head_dim": 4, "moe_intermediate_size": 20, "num_experts": 4}),
    # a square down, and a square gate_up
    "Olmoe": (GLU, {**ONE_HEAD, "intermediate_size": 36, "num_experts": 3}),
    "Qwen2Moe": (
        GLU,
        {
            **ONE_HEAD,
            "moe_intermediate_size": 18,
            "shared_expert_intermediate_size": 28,
            "num_experts": 3,
        },
    ),
}


def stacked(state, names):
    """As transformers 5 stacks them: experts first, and up below gate."""
    found = {key: x for key, x in state.items() if ".experts." not in key}
    heads = {key.split("experts.")[0] for key in state.keys() - found.keys()}
    for head in heads:
        count = sum(
            key.startswith(f"{head}experts.") and key.endswith(f"{names[0]}.weight")
            for key in state
        )
        gate, up, down = (
            torch.stack([state[f"{head}experts.{i}.{name}.weight"] for i in range(count)])
            for name in names
        )
        head = head.replace("block_sparse_moe", "mlp")
        found[f"{head}experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{head}experts.down_proj"] = down
    return {key.replace("block_sparse_moe", "mlp"): x.contiguous() for key, x in found.items()}


def stack(folder, names, turn=False):
    """Stack a checkpoint's experts; turned, each as its transpose."""
    state = stacked(load_file(folder / "model.safetensors"), names)
    if turn:
        state = {k: x.mT.contiguous() if ".experts." in k else x for k, x in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def prepare(family, folder, dtype=torch.float32, unload=True, **settings):
    """The base model with experts apart, an adapter of PEFT's, and the weights it merges."""
    names, config = MODELS[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    model.save_pretrained(folder / "base")
    given = {"target_modules": [*names, "q_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(model, peft.RandLoraConfig(r=5, randlora_alpha=10, **given))
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload() if unload else None


def merged(folder):
    report = merge(folder / "adapter", base=folder / "base", out=folder / "out")
    return report, load_file(folder / "out" / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert (found[key] - x).abs().max() <= 1e-6 * x.abs().max(), key


@pytest.mark.parametrize("nbytes", [1, 3000, 1 << 24])
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_each_expert_is_merged_into_its_slice(family, turn, nbytes, tmp_path, monkeypatch):
    monkeypatch.setattr("randlora_jax.interop.numpy_delta.BLOCK", nbytes)
    monkeypatch.setattr("randlora_jax.commands.merge.BLOCK", nbytes)
    names = MODELS[family][0]
    expected = stacked(prepare(family, tmp_path).state_dict(), names)
    stack(tmp_path / "base", names, turn)
    before = load_file(tmp_path / "base" / "model.safetensors")
    whole = [f"{name}.weight" for name in names]  # of Qwen 2's shared experts
    _, found = merged(tmp_path)
    for key in expected:
        if turn and ".experts." in key:
            expected[key] = expected[key].mT
        changed = ".experts." in key or key.endswith(("q_proj.weight", *whole))
        assert torch.equal(before[key], expected[key]) != changed, key
    assert_same(found, expected)


def test_only_the_experts_that_were_adapted_change(tmp_path):
    target = r".*layers\.1\..*experts\.(0\.w2|2\.w3)"
    expected = prepare("Mixtral", tmp_path, target_modules=target).state_dict()
    stack(tmp_path / "base", MODELS["Mixtral"][0])
    before = load_file(tmp_path / "base" / "model.safetensors")
    report, found = merged(tmp_path)
    assert report.data["layers"] == [
        f"model.layers.1.block_sparse_moe.experts.{x}" for x in ("0.w2", "2.w3")
    ]
    assert_same(found, stacked(expected, MODELS["Mixtral"][0]))
    stack_of = "model.layers.1.mlp.experts."
    for key, x in found.items():
        same = (x == before[key]).flatten(1).all(1) if x.ndim == 3 else torch.equal(x, before[key])
        changed = {f"{stack_of}down_proj": [0], f"{stack_of}gate_up_proj": [2]}.get(key, [])
        assert (~same).nonzero().flatten().tolist() == changed if x.ndim == 3 else same, key
    gate, _ = (found[f"{stack_of}gate_up_proj"] == before[f"{stack_of}gate_up_proj"]).chunk(2, 1)
    assert gate.all()


def test_sums_in_half_precision_are_rounded_once(tmp_path):
    prepare("Qwen3Moe", tmp_path, torch.bfloat16)
    wide = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path / "base", torch_dtype=torch.float32
    )
    wide = peft.PeftModel.from_pretrained(wide, tmp_path / "adapter").merge_and_unload()
    stack(tmp_path / "base", GLU)
    _, found = merged(tmp_path)
    exact = stacked(wide.state_dict(), GLU)
    off = sum((x != exact[key].to(x.dtype)).sum().item() for key, x in found.items())
    assert off <= 1e-3 * sum(x.numel() for x in found.values())  # ties, tipped by float32


class Glu(Module):
    """An expert whose matrices are layers of their own."""

    def __init__(self, wide, inner):
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(wide, inner, bias=False) for _ in range(2))
        self.down_proj = Linear(inner, wide, bias=False)

    def forward(self, x):
        gated = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)


class Apart(Module):
    """`Glu`s under the names that a model's have."""

    def __init__(self, count, wide, inner):
        super().__init__()
        torch.manual_seed(3)
        parent = self
        for name in ("model", "layers", "0", "feed_forward"):
            parent.add_module(name, Module())
            parent = getattr(parent, name)
        parent.experts = ModuleList(Glu(wide, inner) for _ in range(count))

    def forward(self, x):  # (experts, tokens, wide)
        experts = self.get_submodule("model.layers.0.feed_forward.experts")
        return torch.stack([expert(part) for expert, part in zip(experts, x, strict=True)])


@pytest.mark.parametrize("wide, inner", [(8, 12), (8, 8), (8, 4)])
def test_llama_4_computes_with_its_own_stacks_what_peft_does_with_experts_apart(
    wide, inner, tmp_path
):
    """Its stacks hold transposes, and transformers' class says which half is gate's."""
    config = transformers.Llama4TextConfig(
        hidden_size=wide, intermediate_size=inner, num_local_experts=3, num_hidden_layers=1
    )
    apart = Apart(3, wide, inner)
    x = torch.linspace(-3, 3, 3 * 5 * wide).reshape(3, 5, wide)
    state = {key: value.clone() for key, value in apart.state_dict().items()}
    (tmp_path / "base").mkdir()
    config.save_pretrained(tmp_path / "base")
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    stack(tmp_path / "base", GLU, turn=True)
    before = apart(x)
    settings = peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=list(GLU))
    model = peft.get_peft_model(apart, settings)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    _, found = merged(tmp_path)
    theirs = transformers.models.llama4.modeling_llama4.Llama4TextExperts(config)
    head = "model.layers.0.feed_forward.experts."
    theirs.load_state_dict({key.removeprefix(head): x for key, x in found.items()})
    with torch.no_grad():
        got, expected = theirs(x.reshape(-1, wide)).reshape(x.shape), model(x)
    assert (expected - before).std() > 0.1 * before.std()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("turn", [False, True])
def test_to_lora_of_stacked_experts_is_that_of_experts_apart(turn, tmp_path):
    prepare("Qwen3Moe", tmp_path)
    arguments = {"choose": lambda shares: 4}
    to_lora(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "apart", **arguments)
    stack(tmp_path / "base", GLU, turn)
    to_lora(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out", **arguments)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        found, expected = ((tmp_path / x / name).read_bytes() for x in ("out", "apart"))
        assert found == expected


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt_oss", "one_of_tomorrow", None])
def test_where_experts_lie_must_be_known_of_the_type(kind, tmp_path):
    prepare("Qwen3Moe", tmp_path)
    stack(tmp_path / "base", GLU)
    config = tmp_path / "base" / "config.json"
    named = "null" if kind is None else f'"{kind}"'
    config.write_text(config.read_text().replace('"qwen3_moe"', named))
    with pytest.raises(TargetError, match=rf"not known of model type .?{kind}.*experts apart"):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_the_base_model_lacks(tmp_path):
    prepare("Qwen3Moe", tmp_path)
    state = stacked(load_file(tmp_path / "base" / "model.safetensors"), GLU)
    fewer = {key: x[:3].clone() if ".experts." in key else x for key, x in state.items()}
    save_file(fewer, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=r"has no tensor .*experts\.3\..*"):
        merged(tmp_path)


def test_stacks_that_do_not_fit_each_other(tmp_path):
    prepare("Qwen3Moe", tmp_path)
    stack(tmp_path / "base", GLU)
    state = load_file(tmp_path / "base" / "model.safetensors")
    for layer in (0, 1):  # neither (2 I, H) with (H, I) nor (H, 2 I) with (I, H)
        key = f"model.layers.{layer}.mlp.experts.down_proj"
        state[key] = state[key].mT.contiguous()
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=r"experts\.0\..*not known"):
        merged(tmp_path)


def test_experts_that_an_adapter_lacks_though_its_config_promises_them(tmp_path):
    prepare("Mixtral", tmp_path, target_modules=["w1"])
    stack(tmp_path / "base", MODELS["Mixtral"][0])
    merged(tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    lost = {k: x for k, x in load_file(weights).items() if "layers.1" not in k or "s.1.w1" not in k}
    save_file(lost, weights, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"layers\.1\..*experts\.1\.w1"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "again")


def test_an_expert_trained_whole(tmp_path):
    prepare("Mixtral", tmp_path, target_modules=["q_proj"], modules_to_save=["experts.1.w1"])
    stack(tmp_path / "base", MODELS["Mixtral"][0])
    with pytest.raises(TargetError, match=r"1\.w1\.weight.*trained whole.*gate_up_proj"):
        merged(tmp_path)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_stacks_trained_whole_and_a_checkpoint_with_experts_apart(family, turn, tmp_path):
    """In transformers 5 the adapter has stacks, whatever the files of the base model have."""
    names = MODELS[family][0]
    module = {"Mixtral": "block_sparse_moe", "Olmoe": "mlp"}[family]
    whole = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    prepare(family, tmp_path, unload=False, **whole)  # PEFT cannot
    report = merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "apart")
    assert len(report.data["replaced"]) == 2 * (1 + 3 * 3) and not report.data["added"]
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(module, "mlp"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = stacked(load_file(file), names)
    if turn:
        state = {k: x.mT.contiguous() if ".experts." in k else x for k, x in state.items()}
    save_file(state, file, {"format": "pt"})
    again, found = merged(tmp_path)
    assert again.data == report.data
    assert_same(found, load_file(tmp_path / "apart" / "model.safetensors"))
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace(f'"{family.lower()}"', '"one_of_tomorrow"'))
    with pytest.raises((AdapterFileError, TargetError), match=r"experts"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out-2")


# --- transformers 5 -------------------------------------------------------------------------------

SAVE = """
import sys, transformers
name, *folders = sys.argv[1:]
for folder in folders:
    model = getattr(transformers, name).from_pretrained(folder, dtype="float32")
    model.save_pretrained(folder + "-5", save_original_format=False)
"""


@pytest.mark.skipif(NEWER is None, reason="make compat has transformers 5")
@pytest.mark.parametrize("family", MODELS)
def test_files_of_transformers_5(family, tmp_path):
    """Merging and then fusing, as it does, is fusing and then merging."""
    prepare(family, tmp_path).save_pretrained(tmp_path / "merged")
    folders = [str(tmp_path / name) for name in ("base", "merged")]
    subprocess.run([NEWER, "-c", SAVE, f"{family}ForCausalLM", *folders], check=True)
    merge(tmp_path / "adapter", base=tmp_path / "base-5", out=tmp_path / "out")
    found, expected = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "merged-5"))
    assert any(key.endswith("experts.gate_up_proj") for key in found)
    assert_same(found, expected)
