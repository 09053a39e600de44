"""PEFT's wrappers in state-dict keys are put in and taken out as PEFT does it."""

import numpy as np
import peft
import pytest
from peft_nets import TARGETS, Net, peft_net, peft_settings
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.keys import PREFIX, file_key, trained_tensors
from randlora_jax.interop.peft_dir import read_adapter

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    "config",
    [
        {"bias": "all", "modules_to_save": ["head"]},
        {"bias": "randlora_only", "modules_to_save": ["head.dense"]},
    ],
)
def test_keys_go_there_and_back(tmp_path, config):
    peft_net(tmp_path, **config)
    saved = read_adapter(tmp_path).saved
    trained = trained_tensors(saved)
    assert trained.keys() <= Net().state_dict().keys()
    assert {f"{name}.bias" for name in TARGETS} <= trained.keys()
    frozen = {key for key in saved if "original_module" in key}
    assert {file_key(key, TARGETS) for key in trained} == saved.keys() - frozen
    assert bool(frozen) == (config["bias"] == "all")


def test_a_state_dict_of_pefts_model_has_the_base_models_keys():
    model = peft.get_peft_model(Net(), peft_settings(modules_to_save=["head"]))
    state = {key.removeprefix(PREFIX): x for key, x in model.state_dict().items()}
    found = {key: x for key, x in trained_tensors(state).items() if "randlora_" not in key}
    assert found.keys() == Net().state_dict().keys()
    trained = model.base_model.model.head.modules_to_save["default"].dense.weight
    assert found["head.dense.weight"].data_ptr() == trained.data_ptr()  # not the frozen one


def test_two_keys_of_one_tensor_are_refused():
    with pytest.raises(AdapterFileError, match=r"'a\.bias' twice, as 'a\.base_layer\.bias' too"):
        trained_tensors({"a.bias": np.zeros(3), "a.base_layer.bias": np.zeros(3)})
