"""docs/format.md is precise enough: its code reads adapters, its numbers and tables hold."""

import hashlib
import json
import math
import re
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from peft_nets import (
    PREFIX,
    WEIGHTS,
    Net,
    is_base,
    jax_adapter,
    keep_bases,
    peft_net,
    randomize,
    rewrite,
)
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest, derived_key
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError
from randlora_jax.interop.peft_dir import read_adapter, write_adapter
from randlora_jax.interop.torch_rng import torch_bases
from transformers.pytorch_utils import Conv1D

from randlora_jax.core.bases import BasisIdentity, Extents
from randlora_jax.models.basis_source import stored_pair

pytestmark = pytest.mark.torch

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def delta_weights():
    """The reader that the page shows."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert "import peft" not in code and "torch" not in code
    names: dict = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    return names["delta_weights"]


def numbers(name: str) -> np.ndarray:
    """A matrix of integers that the page gives as `name = [[...]]`."""
    (text,) = re.findall(rf"{re.escape(name)} *= (\[\[.*?\]\])", PAGE)
    return np.array(json.loads(text), np.float32)


def layers_of(model: torch.nn.Module) -> dict:
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "randlora_lambda")
    }


def same_as_peft(delta_weights, folder: Path, base: torch.nn.Module) -> None:
    layers = layers_of(peft.PeftModel.from_pretrained(base, folder))
    shapes = {name: (x.out_features, x.in_features) for name, x in layers.items()}
    found = delta_weights(folder, shapes)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach().numpy()
        expected = expected.T if layer.fan_in_fan_out else expected
        assert found[name].shape == shapes[name]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"modules_to_save": ["head"]}])
def test_the_reader_on_files_of_pefts_and_of_ours(tmp_path, delta_weights, kind):
    peft_net(tmp_path / "peft", **kind)
    same_as_peft(delta_weights, tmp_path / "peft", Net())
    write_adapter(tmp_path / "ours", read_adapter(tmp_path / "peft"))
    same_as_peft(delta_weights, tmp_path / "ours", Net())


def test_the_reader_on_bases_of_our_own(tmp_path, delta_weights, rng):
    write_adapter(tmp_path, jax_adapter(rng))
    same_as_peft(delta_weights, tmp_path, Net())


def test_the_reader_on_conv1d(tmp_path, delta_weights):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(Conv1D(7, 5), Conv1D(4, 7), Conv1D(4, 4))

    model = peft.get_peft_model(
        net(), peft.RandLoraConfig(r=3, target_modules=["0", "1", "2"], fan_in_fan_out=True)
    )
    randomize(model)
    model.save_pretrained(tmp_path)
    same_as_peft(delta_weights, tmp_path, net())


@pytest.fixture
def case() -> Adapter:
    """The case to check against."""
    b = np.fromfunction(lambda i, b, k: i + 2 * b - k, (4, 2, 2)).astype(np.float32)
    return Adapter(
        config=RandLoraConfig(r=2, randlora_alpha=4, target_modules=["0"]),
        layers={"0": (numbers("lambda"), numbers("gamma"))},
        bases=(numbers("A[:, 0, :]")[:, None], b),
    )


def test_the_case_to_check_against(tmp_path, delta_weights, case):
    write_adapter(tmp_path, case)
    base = torch.nn.Sequential(torch.nn.Linear(3, 4))
    (layer,) = layers_of(peft.PeftModel.from_pretrained(base, tmp_path)).values()
    second, first = layer.get_scaled_bases("default")  # A_flat and B_flat where in <= out
    np.testing.assert_array_equal(second.detach(), numbers("A_flat"))
    np.testing.assert_array_equal(first.detach(), numbers("B_flat"))
    np.testing.assert_array_equal(layer.get_delta_weight("default").detach(), numbers("delta_W"))
    np.testing.assert_array_equal(delta_weights(tmp_path, {"0": (4, 3)})["0"], numbers("delta_W"))


def test_the_digest_and_the_key(tmp_path, case):
    (recipe,) = re.findall(r"digest = (sha256.*)\n", PAGE)
    a, b = case.bases
    digest = eval(recipe, {"sha256": hashlib.sha256, "A": a, "B": b})
    (written,) = re.findall(r"digest = ([0-9a-f]{64})\n", PAGE)
    (key,) = re.findall(r"key +\= (\d+)\n", PAGE)
    assert bases_digest(a, b) == digest == written
    assert derived_key(digest) == int(digest[:16], 16) >> 2 == int(key)
    for source, expected in (("jax", int(key)), ("file:0123", int(key)), ("torch:x", 5)):
        case.config = RandLoraConfig(
            r=2, randlora_alpha=4, target_modules=["0"], projection_prng_key=5
        )
        case.provenance = Provenance(source, 5, "dense", digest, {"0": (4, 3)})
        write_adapter(tmp_path, case)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["projection_prng_key"] == expected


def test_the_metadata(tmp_path, rng):
    (example,) = re.findall(r"    (\{\"version\".*\})\n", PAGE)
    assert Provenance.from_json(example, "docs/format.md").to_json() == example
    table = PAGE[PAGE.index("### Our metadata") : PAGE.index(example)]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == json.loads(example).keys()
    write_adapter(tmp_path, jax_adapter(rng))
    raw = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"].keys() == {"format", "randlora_jax"}


def test_the_config_fields():
    section = PAGE[PAGE.index("## adapter_config.json") :]
    rows = dict(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \|", section, re.M))
    default = {k: v for names, v in rows.items() for k in re.findall(r"`(\w+)`", names)}
    described = re.findall(r"`(\w+)`", section[section.index("The rest describes") :][:200])
    theirs = peft.RandLoraConfig().to_dict()
    ours = RandLoraConfig().to_dict()
    assert default.keys() | set(described) == theirs.keys() | {"peft_type"}
    for field, value in default.items():
        if field != "peft_type":
            stated = json.loads(value if value != "`none`" else '"none"')
            assert theirs[field] == ours[field] == stated, field


# --- where the bases lie --------------------------------------------------------------------------


def bert() -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return transformers.BertModel(config).eval()


def hidden(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(10)[None]).last_hidden_state.numpy()


def by_peft(folder: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(bert(), folder)


def by_transformers(folder: Path) -> torch.nn.Module:
    model = bert()
    model.load_adapter(folder)
    return model


ONE = f"{PREFIX}encoder.layer.1.output.dense."
WHERE = {  # row of the table: which copies stay, save_projection, do PEFT and transformers draw
    "top level and every layer": (lambda key: True, True, [False, False]),
    "top level only": (lambda key: not key.startswith(PREFIX), True, [False, True]),
    "one layer only": (lambda key: key.startswith(ONE), True, [False, False]),
    "nowhere, `save_projection` false": (lambda key: False, False, [True, True]),
    "nowhere, `save_projection` true": (lambda key: False, True, [True, True]),
    "anywhere, `save_projection` false": (lambda key: True, False, [True, True]),
}


def test_every_row_is_tested():
    table = PAGE[PAGE.index("| variant |") : PAGE.index('- "First" is')]
    rows = re.findall(r"^\| ([^|]*?) \|", table, re.M)
    assert rows[1:] == list(WHERE)


@pytest.mark.parametrize("row", WHERE)
def test_where_bases_are_found(tmp_path, row):
    """The file's bases are twice those of the key, so that one sees which were taken."""
    model = peft.get_peft_model(bert(), peft.RandLoraConfig(r=4, target_modules=["dense"]))
    randomize(model)
    drawn = hidden(model)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: x * 2 if is_base(k) else x for k, x in t.items()})
    files = hidden(by_peft(tmp_path))
    assert abs(files - drawn).max() > 1e-2

    wanted, save_projection, draws = WHERE[row]
    rewrite(tmp_path, lambda tensors: keep_bases(tensors, wanted))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"save_projection": save_projection}
    path.write_text(json.dumps(config))
    for route, is_drawn in zip((by_peft, by_transformers), draws, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = hidden(route(tmp_path))
        np.testing.assert_allclose(found, drawn if is_drawn else files, atol=1e-6, rtol=0)
    if row.startswith("anywhere"):
        with pytest.raises(AdapterFileError, match="expected no bases"):
            read_adapter(tmp_path)
    else:
        adapter = read_adapter(tmp_path)
        assert (adapter.bases is None) == row.startswith("nowhere")
        if row == "nowhere, `save_projection` true":
            with pytest.raises(ConfigError, match="Draw them first"):
                write_adapter(tmp_path / "out", adapter)


# --- the draws, written anew from the page --------------------------------------------------------

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("generation", ["bf16-24bit", "bf16-8bit"])
def test_pytorchs_dense_draw(generation):
    r, low, high, key = 4, 10, 23, 2**40 + 5
    words = np.random.RandomState(key & 0xFFFFFFFF)

    def one_draw(shape: tuple, fan: int) -> np.ndarray:
        bound = math.sqrt(3) * (math.sqrt(2 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan))
        w = words.randint(0, 2**32, math.prod(shape), dtype=np.uint32).reshape(shape)
        lo, hi = np.float32(-bound), np.float32(bound)
        if generation == "bf16-8bit":
            lo, hi = (np.float32(x.astype(BF16)) for x in (lo, hi))
            return ((w % 2**8) * np.float32(2**-8) * (hi - lo) + lo).astype(BF16)
        x = (w % 2**24) * 2.0**-24 * np.float64(hi - lo) + np.float64(lo)
        x = x.astype(np.float32).astype(BF16)
        return np.where(x == hi.astype(BF16), lo.astype(BF16), x)

    def divided(x: np.ndarray) -> np.ndarray:
        deviation = x.astype(np.float64).std(ddof=1).astype(BF16).astype(np.float32)
        return (x.astype(np.float32) / deviation).astype(BF16)

    a = divided(one_draw((r, 1, low), low))
    b = divided(np.concatenate([one_draw((high, 1, r), r) for _ in range(3)], axis=1))
    expected = torch_bases(key, r, low, high, generation=generation)
    np.testing.assert_array_equal(a, expected[0])
    np.testing.assert_array_equal(b, expected[1])


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_pytorchs_sparse_draw(kind, dtype):
    r, low, high, key = 4, 10, 23, -3
    s = 3 if kind == "sparse" else math.sqrt(low)
    words = np.random.RandomState(key & 0xFFFFFFFF)
    found = []
    for shape in ((r, 1, low), (high, 3, r)):
        w = words.randint(0, 2**32, math.prod(shape), dtype=np.uint32).reshape(shape)
        u = (w % 2**24).astype(np.float32) * np.float32(2**-24)
        x = (u > np.float32(1 - 1 / (2 * s))) * 1.0 - (u < np.float32(1 / (2 * s)))
        x = x.astype(np.float32) / np.float32(x.std(ddof=1))
        found.append(x.astype(dtype).astype(np.float32))
    for x, expected in zip(
        found, torch_bases(key, r, low, high, kind=kind, base_dtype=dtype), strict=True
    ):
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
def test_jaxs_draw(kind):
    r, low, high, key = 4, 10, 23, -3
    s = {"dense": 0, "sparse": 3, "very_sparse": math.sqrt(low)}[kind]
    halves = np.array([(key % 2**64) >> 32, key % 2**32], np.uint32)
    root = jax.random.wrap_key_data(halves, impl="threefry2x32")

    def numbers_of(side: int, count: int, shape: tuple) -> np.ndarray:
        side_key = jax.random.fold_in(root, side)
        with jax.threefry_partitionable(True):
            w = np.stack(
                [jax.random.bits(jax.random.fold_in(side_key, i), shape) for i in range(count)]
            )
        if kind == "dense":
            unit = (w >> 8).astype(np.float32) * np.float32(2**-23) - np.float32(1)
            return (unit * np.float32(math.sqrt(3))).astype(BF16)
        edge = round(2**32 / (2 * s))
        sign = (w >= 2**32 - edge) * 1.0 - (w < edge)
        return (sign.astype(np.float32) * np.float32(math.sqrt(s))).astype(BF16)

    identity = BasisIdentity("jax", key, kind, r, s)
    a, b = stored_pair(identity, Extents(high, 3, low), {})
    np.testing.assert_array_equal(numbers_of(0, r, (low,))[:, None], a)
    np.testing.assert_array_equal(numbers_of(1, 3, (high, r)).transpose(1, 0, 2), b)
