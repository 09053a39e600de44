"""Bases that PyTorch did not draw, in files that PEFT opens and never mixes with its own."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import peft
import pytest
from peft_nets import TARGETS, WEIGHTS, Net, jax_adapter, peft_net
from randlora_jax.interop.adapter import Adapter, bases_digest, derived_key
from randlora_jax.interop.config import CONFIG_NAME
from randlora_jax.interop.errors import AdapterFileError, ConfigError
from randlora_jax.interop.peft_dir import read_adapter, write_adapter
from safetensors import safe_open

pytestmark = pytest.mark.torch


def delta_of(adapter: Adapter, name: str, out: int) -> np.ndarray:
    """The update by the definition: lambda and gamma scale A, B is summed over bases and ranks."""
    lam, gamma = (x.astype(np.float64) for x in adapter.layers[name])
    a, b = (x.astype(np.float64) for x in adapter.bases)
    n, low = gamma.shape
    high = max(adapter.provenance.shapes[name])
    scaled = np.einsum("kb,kj,bj->kbj", lam, a[:, 0, :low], gamma)  # rank slow, basis fast
    flat_b = b[:high, :n].reshape(high, -1)  # basis slow, rank fast
    m = flat_b @ scaled.reshape(-1, low) * adapter.config.scaling
    return m if m.shape[0] == out else m.T


def test_bases_of_our_own_in_peft(tmp_path, rng):
    adapter = jax_adapter(rng)
    write_adapter(tmp_path, adapter)
    opened = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for name in TARGETS:
        layer = opened.base_model.model.get_submodule(name)
        expected = delta_of(adapter, name, layer.out_features)
        found = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    again = read_adapter(tmp_path)
    assert again.provenance == adapter.provenance
    assert again.config.projection_prng_key == derived_key(adapter.provenance.digest) < 2**62
    write_adapter(tmp_path, again)  # the key is derived, not derived once more
    assert read_adapter(tmp_path).config == again.config


def test_peft_refuses_our_bases_beside_its_own(tmp_path, rng):
    write_adapter(tmp_path / "ours", jax_adapter(rng))
    peft_net(tmp_path / "theirs")
    for first, second in (("ours", "theirs"), ("theirs", "ours")):
        model = peft.PeftModel.from_pretrained(Net(), tmp_path / first)
        with pytest.raises(ValueError, match="PRNG"):
            model.load_adapter(tmp_path / second, adapter_name="other")


def test_what_cannot_be_written(tmp_path, rng):
    adapter = jax_adapter(rng)
    torch_config = dataclasses.replace(
        adapter.config, projection_source="torch", save_projection=False
    )
    with pytest.raises(ConfigError, match="only PyTorch's own bases can be drawn again"):
        write_adapter(tmp_path, dataclasses.replace(adapter, config=torch_config))
    other = (adapter.bases[0] * 2, adapter.bases[1])
    with pytest.raises(AdapterFileError, match="digest"):
        write_adapter(tmp_path, dataclasses.replace(adapter, bases=other))
    wide = dataclasses.replace(adapter.provenance, shapes=dict.fromkeys(TARGETS, (12, 7)))
    with pytest.raises(AdapterFileError, match=r"layer\.10\.randlora_gamma': expected 7, found 10"):
        write_adapter(tmp_path, dataclasses.replace(adapter, provenance=wide))
    lam, gamma = adapter.layers["layer.2"]
    for bad in ((lam.astype(np.float64), gamma), (lam, gamma * np.nan), (lam, gamma.T)):
        broken = dataclasses.replace(adapter, layers=adapter.layers | {"layer.2": bad})
        with pytest.raises(AdapterFileError, match=r"layer\.2\.randlora_(lambda|gamma)"):
            write_adapter(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []

    write_adapter(tmp_path, adapter)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(replaced):
        assert replaced.overwritten == (CONFIG_NAME, WEIGHTS) and not replaced.removed
        raise AdapterFileError("may not be overwritten")

    stronger = dataclasses.replace(adapter.config, randlora_alpha=99)
    with pytest.raises(AdapterFileError, match="may not be overwritten"):
        write_adapter(tmp_path, dataclasses.replace(adapter, config=stronger), allow=refuse)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_bases_without_loss_only(tmp_path, rng):
    """float32 that bfloat16 cannot hold stays float32; float16 stays float16."""
    adapter = dataclasses.replace(jax_adapter(rng), provenance=None)
    for bases in (adapter.bases, tuple(x.astype(np.float16) for x in adapter.bases)):
        write_adapter(tmp_path, dataclasses.replace(adapter, bases=bases))
        for found, expected in zip(read_adapter(tmp_path).bases, bases, strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_digest_knows_numbers_and_shapes_not_dtypes(rng):
    a = rng.normal(size=(2, 1, 8)).astype(ml_dtypes.bfloat16)
    b = rng.normal(size=(9, 4, 2)).astype(ml_dtypes.bfloat16)
    digest = bases_digest(a, b)
    assert digest == bases_digest(a.astype(np.float32), np.asfortranarray(b.astype(np.float32)))
    assert digest != bases_digest(a.reshape(1, 2, 8), b)
    assert digest != bases_digest(-a, b)
    known = bases_digest(np.arange(4.0).reshape(2, 1, 2), np.arange(8.0).reshape(4, 1, 2))
    assert known.startswith("c9f8ac34da5a1b5f")
    assert derived_key("f" * 64) == 2**62 - 1


def test_metadata_is_one_readable_line(tmp_path, rng):
    adapter = jax_adapter(rng)
    write_adapter(tmp_path, adapter)
    with safe_open(tmp_path / WEIGHTS, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "randlora_jax"} and metadata["format"] == "pt"
    recorded = json.loads(metadata["randlora_jax"])
    assert recorded["version"] == 1 and recorded["projection_prng_key"] == 42
    assert recorded["shapes"]["layer.2"] == [10, 7]
