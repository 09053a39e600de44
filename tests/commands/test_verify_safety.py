"""randlora-jax verify runs nothing that comes with a model, asks nothing and fetches nothing."""

import builtins
import json
import os
import socket
import subprocess
import sys

import pytest
import transformers as hf
from families import WIDTHS
from peft_side import save_both

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

CONFIG = {
    **WIDTHS,
    "intermediate_size": 52,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "tie_word_embeddings": False,
}


@pytest.fixture
def pair(tmp_path):
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    save_both(hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG)), tmp_path, **settings)
    return tmp_path


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Whatever asks or connects is noted, and fails."""
    tried = []

    def refuse(what):
        def call(*args, **kwargs):
            tried.append(what)
            raise OSError(what)

        return call

    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    monkeypatch.setattr(builtins, "input", refuse("input"))
    yield
    assert tried == []


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def run(folder, capsys):
    command = ["verify", str(folder / "adapter"), "--base", str(folder / "base"), "--json"]
    status = main(command)
    return status, json.loads(capsys.readouterr().out)


def code(base, ran):
    """Python files of all the names that transformers looks for."""
    (base / "custom_generate").mkdir()
    for name in ("configuration_my", "modeling_my", "generate", "custom_generate/generate"):
        (base / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    return {
        "AutoConfig": "configuration_my.MyConfig",
        "AutoModelForCausalLM": "modeling_my.My",
        "AutoModel": "modeling_my.My",
    }


@pytest.mark.parametrize("kind", ["my-model", "llama"])
def test_code_of_a_model_is_never_run(kind, pair, capsys):
    ran = pair / "ran"
    edit(pair / "base/config.json", model_type=kind, auto_map=code(pair / "base", ran))
    edit(pair / "base/config.json", **({"architectures": ["My"]} if kind != "llama" else {}))
    status, said = run(pair, capsys)
    assert status == 0 and not ran.exists()
    assert {x["kind"] for x in said["differences"]} >= {"delta_W"}
    assert ("code that comes with a model is never run" in said["note"]) == (kind != "llama")


def test_code_of_a_part_of_a_model_is_never_run(tmp_path, capsys):
    sizes = {**WIDTHS, "intermediate_size": 52, "num_hidden_layers": 1}
    parts = hf.BertConfig(**sizes), hf.BertConfig(**sizes)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    save_both(hf.EncoderDecoderModel(config), tmp_path, target_modules=["query"])
    path, ran = tmp_path / "base/config.json", tmp_path / "ran"
    found = json.loads(path.read_text())
    places = {key: f"me/it--{place}" for key, place in code(tmp_path / "base", ran).items()}
    for part in ("encoder", "decoder"):
        found[part] |= {"auto_map": places, "attn_implementation": "me/kernels"}
    path.write_text(json.dumps(found))
    status, said = run(tmp_path, capsys)
    assert status == 0 and not ran.exists(), said
    assert "bare" not in said["note"]


def test_an_adapter_among_the_models_files_redirects_nothing(pair, capsys):
    stray = {"peft_type": "LORA", "base_model_name_or_path": "no-such-owner/other", "r": 2}
    (pair / "base/adapter_config.json").write_text(json.dumps(stray))
    status, said = run(pair, capsys)
    assert status == 0 and said["note"] == "", said
    assert "logits" in {x["kind"] for x in said["differences"]}


def test_the_files_that_are_compared_are_those_that_are_opened(pair, capsys):
    """transformers takes other weights where config.json names them, or a variant lies there."""
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG))
    other.save_pretrained(pair / "other")
    (pair / "other/model.safetensors").rename(pair / "base/other.safetensors")
    edit(pair / "base/config.json", transformers_weights="other.safetensors")
    status, said = run(pair, capsys)
    assert status == 0 and said["note"] == "", said


@pytest.mark.long
def test_a_process_of_its_own_asks_nothing_and_connects_to_nothing(pair):
    """As users start it: with answers waiting on stdin, and before transformers is imported."""
    ran, tried = pair / "ran", pair / "tried"
    edit(pair / "base/config.json", model_type="my", auto_map=code(pair / "base", ran))
    (pair / "hook").mkdir()
    (pair / "hook/sitecustomize.py").write_text(
        "import sys\n"
        "def see(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        f"        open({str(tried)!r}, 'a').write(event)\n"
        "sys.addaudithook(see)\n"
    )
    paths = [str(pair / "hook"), os.environ.get("PYTHONPATH", "")]
    command = ["-m", "randlora_jax", "verify", str(pair / "adapter"), "--json"]
    command += ["--base", str(pair / "base")]
    done = subprocess.run(
        [sys.executable, *command],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists() and not tried.exists()
    assert json.loads(done.stdout)["good"] and "[y/N]" not in done.stderr
