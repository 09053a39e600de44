"""Layers found under the names of every generation of transformers."""

import numpy as np
import pytest
import torch
from randlora_jax.interop.base_model import BaseModel, base_shapes
from randlora_jax.interop.checkpoint_names import spelling
from randlora_jax.interop.errors import TargetError
from randlora_jax.interop.tensor_writer import write_tensors
from safetensors.torch import save_file
from torch_files import load_file
from vision_language import MODELS, model

pytestmark = pytest.mark.torch


def linears(module):
    return {name: x for name, x in module.named_modules() if isinstance(x, torch.nn.Linear)}


def write(folder, shapes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", arrays, {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", sorted(MODELS))
def test_every_linear_layer_by_all_names_of_its_class(family, tmp_path):
    """Of the class and its inner model, with files as transformers saves them and as they are."""
    found = model(family)
    found.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    stored = load_file(file)
    assert stored.keys() != found.state_dict().keys()
    older = {}
    with BaseModel(tmp_path / "saved") as base:
        for part in (found, found.model):
            base.names.fit(linears(part))
            for name, module in linears(part).items():
                key = base.layer(name).stored.key
                assert torch.equal(stored[key], module.weight), name
                older[key.removesuffix(".weight")] = tuple(module.weight.shape)
        text = {f"model.{name}": x for name, x in linears(found.model.language_model).items()}
        base.names.fit(text)  # a class of the language model alone
        for name, module in text.items():
            assert torch.equal(stored[base.layer(name).stored.key], module.weight), name
        base.names.fit(older)  # classes of before 4.52 call them as files do
        assert all(base.layer(name).stored.key == f"{name}.weight" for name in older)
    tied = {k: v.clone() for k, v in found.state_dict().items() if k != "lm_head.weight"}
    save_file(tied, file, {"format": "pt"})
    older = {name: shape for name, shape in older.items() if "lm_head" not in name}
    assert base_shapes(tmp_path / "saved", older) == older


NEWER = {  # names in transformers 5.12, and in the files that it writes
    "model.vision_tower.encoder.layers.0.self_attn.q_proj": (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    ),
    "model.language_model.layers.0.mlp.up_proj": "language_model.model.layers.0.mlp.up_proj",
    "vit.layers.0.attention.q_proj": "vit.encoder.layer.0.attention.attention.query",
    "vit.layers.0.attention.o_proj": "vit.encoder.layer.0.attention.output.dense",
    "vit.layers.0.mlp.fc1": "vit.encoder.layer.0.intermediate.dense",
    "vit.layers.0.mlp.fc2": "vit.encoder.layer.0.output.dense",
    "model.encoder.layers.0.self_attn.o_proj": "model.encoder.layers.0.self_attn.out_proj",
    "model.encoder.layers.0.mlp.fc1": "model.encoder.layers.0.fc1",
    "segformer.stages.1.blocks.0.attention.q_proj": (
        "segformer.encoder.block.1.0.attention.self.query"
    ),
    "segformer.stages.1.blocks.0.mlp.fc2": "segformer.encoder.block.1.0.mlp.dense2",
}


@pytest.mark.parametrize("newer, stored", NEWER.items())
def test_names_of_transformers_5(newer, stored, tmp_path):
    write(tmp_path, {f"{stored}.weight": (4, 3), "model.norm.weight": (3,)})
    for name in (newer, stored):
        assert base_shapes(tmp_path, [name]) == {name: (4, 3)}


def test_a_prefix_and_another_spelling_at_once(tmp_path):
    write(tmp_path, {"encoder.layer.0.attention.attention.query.weight": (4, 3)})
    name = "vit.layers.0.attention.q_proj"
    assert base_shapes(tmp_path, [name]) == {name: (4, 3)}


def test_one_spelling_of_two_tensors_is_refused(tmp_path):
    both = ["model.language_model.layers.0.up.weight", "language_model.model.layers.0.up.weight"]
    write(tmp_path, dict.fromkeys(both, (4, 3)))
    assert spelling(both[0]) == spelling(both[1])
    for key in both:  # as it stands, each is itself
        assert base_shapes(tmp_path, [key.removesuffix(".weight")])
    with pytest.raises(TargetError, match=r"'layers\.0\.up\.weight' could be 'lang.* or 'model"):
        base_shapes(tmp_path, ["layers.0.up"])


def test_towers_are_told_apart(tmp_path):
    names = ["vision_tower.encoder.layers.0.q", "language_model.model.layers.0.q"]
    write(tmp_path, {f"{names[0]}.weight": (4, 3), f"{names[1]}.weight": (6, 5)})
    wanted = {"model.vision_tower.encoder.layers.0.q": (4, 3)}
    wanted["model.language_model.layers.0.q"] = (6, 5)
    assert base_shapes(tmp_path, wanted) == wanted
    with pytest.raises(TargetError, match="has no tensor"):
        base_shapes(tmp_path, ["model.audio_tower.layers.0.q"])


def test_experts_that_are_stacked_are_refused_by_name(tmp_path):
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    write(tmp_path, {stack: (2, 8, 3), "model.layers.0.mlp.gate.weight": (2, 3)})
    for experts in ("mlp.experts", "block_sparse_moe.experts"):
        with pytest.raises(TargetError, match=r"experts\.1\.gate_proj.*experts\.gate_up_proj"):
            base_shapes(tmp_path, [f"model.layers.0.{experts}.1.gate_proj"])
    assert base_shapes(tmp_path, ["model.layers.0.mlp.gate"])
