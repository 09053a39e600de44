"""The randlora-jax command: what it imports, how it ends, and what `inspect` says."""

import json
import os
import subprocess
import sys
import time
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft_nets import Net, change_config, jax_adapter, peft_net, rewrite
from peft_side import save_adapter, save_base
from randlora_jax.interop.peft_dir import write_adapter
from randlora_jax.interop.torch_rng import Generation, generation_of

from randlora_jax import __version__
from randlora_jax.commands.command_line import COMMANDS
from randlora_jax.commands.compact import compact
from randlora_jax.commands.main import main
from randlora_jax.commands.report import progress, size

pytestmark = pytest.mark.torch

WEIGHTS = "adapter_model.safetensors"


def ask(capsys, *arguments):
    """A command's report, as JSON."""
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base model and a PEFT adapter of all its linear layers."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_base("llama", folder / "base")
    return folder / "base", folder / "adapter", save_adapter("llama", base, folder / "adapter")


def test_the_command_is_installed_by_its_name():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, _, function = tomllib.loads(text)["project"]["scripts"]["randlora-jax"].partition(":")
    assert getattr(import_module(module), function) is main


LIGHT = {
    "--help": ["--help"],
    "--version": ["--version"],
    "inspect": ["inspect", "{adapter}"],
    "inspect --base": ["inspect", "{adapter}", "--base", "{base}"],
    "compact": ["compact", "{adapter}", "{tmp}/out"],
    "drop": ["compact", "{adapter}", "{tmp}/out", "--drop-bases", "--json"],
}


@pytest.mark.parametrize("command", LIGHT)
def test_looking_at_files_loads_no_framework(tmp_path, command, llama):
    base, adapter, _ = llama
    line = [x.format(tmp=tmp_path, adapter=adapter, base=base) for x in LIGHT[command]]
    program = (
        "import sys\n"
        "from randlora_jax.commands.main import main\n"
        f"try: status = main({line})\n"
        "except SystemExit as end: status = end.code\n"
        "loaded = {'jax', 'jaxlib', 'flax', 'torch', 'transformers', 'peft', 'matplotlib'}\n"
        "sys.exit(f'{status} {loaded & sys.modules.keys()}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "0 set()"
    assert done.stdout


def test_the_command_tells_its_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"randlora-jax {__version__}\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_teaches_by_example(capsys, command):
    name = command and import_module(f"randlora_jax.commands.{command}").__doc__.split("`")[2]
    name = name and name.removeprefix("randlora-jax ")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"] if name else ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.count(f"randlora-jax {name or ''}".rstrip() + " ") >= 2


MISUSED = {
    "no command": [],
    "unknown command": ["explode"],
    "no such directory": ["inspect", "{tmp}/absent"],
    "a file": ["inspect", "{adapter}/" + WEIGHTS],
    "overwriting": ["compact", "{adapter}", "{adapter}"],
    "plot without shapes": ["inspect", "{adapter}", "--plot", "{tmp}/x.png"],
    "layer without plot": ["inspect", "{adapter}", "--base", "{base}", "--layer", "q_proj"],
    "unknown layer": [
        *("inspect", "{adapter}", "--base", "{base}"),
        *("--plot", "{tmp}/x.png", "--layer", "proj"),
    ],
    "unknown picture": ["inspect", "{adapter}", "--base", "{base}", "--plot", "{tmp}/x.doc"],
    "picture there": ["inspect", "{adapter}", "--base", "{base}", "--plot", "{base}/config.json"],
    "no rules": ["convert", "{adapter}", "{tmp}/x", "--to", "torch", "--names", "{tmp}/absent"],
    "no place": ["compact", "{adapter}", "{adapter}/adapter_config.json/x"],
}


@pytest.mark.parametrize("how", MISUSED)
def test_misuse_ends_with_2(tmp_path, capsys, llama, how):
    base, adapter, _ = llama
    line = [x.format(tmp=tmp_path, adapter=adapter, base=base) for x in MISUSED[how]]
    before = {path: path.stat().st_mtime_ns for path in [*adapter.iterdir(), *base.iterdir()]}
    try:
        status = main(line)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert status == 2
    assert "randlora-jax" in printed.err and not printed.out
    assert before == {p: p.stat().st_mtime_ns for p in [*adapter.iterdir(), *base.iterdir()]}
    assert not list(tmp_path.iterdir())


def test_another_process_that_saves_is_no_fault_of_the_adapter(tmp_path, capsys, llama):
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert main(["compact", str(llama[1]), str(tmp_path)]) == 2
    assert "another process is saving here" in capsys.readouterr().err
    os.close(handle)
    assert main(["compact", str(llama[1]), str(tmp_path)]) == 0


def test_a_file_for_a_directory_is_told_from_what_is_absent(tmp_path, capsys):
    peft_net(tmp_path)
    assert main(["inspect", str(tmp_path / WEIGHTS)]) == 2
    said = capsys.readouterr().err
    assert f"expected a directory, found a file; give the folder it is in: {tmp_path}" in said


def test_commands_run_where_pipes_cannot_be_set_not_to_block(tmp_path, capsys, monkeypatch):
    """As in Windows under Python 3.11."""
    peft_net(tmp_path)
    monkeypatch.delattr(os, "set_blocking")
    assert main(["inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize("command", ["inspect", "compact"])
def test_a_failing_adapter_ends_with_1(tmp_path, capsys, command):
    peft_net(tmp_path / "src")
    with open(tmp_path / "src" / WEIGHTS, "ab") as file:
        file.write(b"x")
    line = [command, tmp_path / "src", *([tmp_path / "dst"] if command == "compact" else [])]
    assert main(list(map(str, line))) == 1
    printed = capsys.readouterr()
    assert "truncated or something was appended" in printed.err and not printed.out
    status, report = ask(capsys, *line)
    assert status == 1
    assert report["good"] is False and "truncated or something" in report["error"]
    assert not (tmp_path / "dst").exists()


def test_warnings_are_lines_on_stderr(tmp_path, capsys):
    peft_net(tmp_path / "src")
    config = tmp_path / "src" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"a_new_field": 1}))
    status, report = ask(capsys, "inspect", tmp_path / "src")
    assert status == 0 and report["config"]["a_new_field"] == 1
    main(["inspect", str(tmp_path / "src")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("randlora-jax: warning: ") and "a_new_field" in line


@pytest.mark.parametrize("told", ["ignore", "error"])
def test_filters_of_the_surroundings_leave_warnings_as_they_are(tmp_path, capsys, told):
    """PYTHONWARNINGS sets such: a guess would be silent, or end in a traceback."""
    peft_net(tmp_path)
    change_config(tmp_path, a_new_field=1)
    with warnings.catch_warnings():
        warnings.simplefilter(told)
        status, report = ask(capsys, "inspect", tmp_path)
    assert (status, len(report["warnings"])) == (0, 1)


def test_progress_shows_bytes_after_two_seconds(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("reading", 4_000_000) as advance:
        advance(1_000_000)
        assert capsys.readouterr().err == ""
        time.sleep(2.1)
        advance(1_000_000)
        assert "reading" in (shown := capsys.readouterr().err) and "2.00M/4.00M" in shown


def test_sizes_as_people_read_them():
    sizes = {
        0: "0 bytes",
        999: "999 bytes",
        1000: "1 kB",
        999_600: "1 MB",
        7_839_972_504: "7.84 GB",
    }
    assert {n: size(n) for n in sizes} == sizes


def test_inspect_says_what_an_adapter_is(capsys, llama):
    base, adapter, model = llama
    status, report = ask(capsys, "inspect", adapter, "--base", base)
    assert status == 0 and report["good"]
    assert report["config"]["base_model_name_or_path"] == str(base)

    linear = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "randlora_lambda")
    }
    assert sum(row["count"] for row in report["layers"]) == len(linear) == 14
    for row in report["layers"]:
        module = linear[row["name"].replace("*", "1")]
        lam, gamma = module.randlora_lambda["default"], module.randlora_gamma["default"]
        assert row["shape"] == [module.out_features, module.in_features]
        assert row["trained"] == row["count"] * (lam.numel() + gamma.numel())
        assert (row["bases"], row["smaller_side"]) == gamma.shape

    sizes = report["bytes"]
    a, b = model.base_model.randlora_A["default"], model.base_model.randlora_B["default"]
    assert sizes["copies_of_bases"] == 15
    assert sizes["bases"] == 2 * (a.numel() + b.numel())
    assert sizes["trained"] == 4 * sum(row["trained"] for row in report["layers"])
    assert sizes["waste"] == 29 * sizes["bases"]  # float32 takes twice what is needed
    assert sizes["file"] == (adapter / WEIGHTS).stat().st_size
    assert sum(sizes[part] for part in ("trained", "bases", "header", "waste")) == sizes["file"]

    assert report["numbers"]["not_finite"] == {} and report["numbers"]["without_effect"] == []
    largest = max(float(m.randlora_lambda["default"].abs().max()) for m in linear.values())
    assert report["numbers"]["largest_lambda"] == pytest.approx(largest)
    status, report = ask(capsys, "inspect", adapter)
    assert status == 0 and {row["shape"] for row in report["layers"]} == {None}


def agreeing(report) -> dict:
    return {row["generation"]: row["base_dtypes"] for row in report["bases"]["torch"]}


def test_inspect_tells_the_torch_generations_apart(tmp_path, capsys, llama):
    base, adapter, _ = llama
    here = generation_of(torch.__version__)
    _, report = ask(capsys, "inspect", adapter)
    found = agreeing(report)
    assert list(found) == list(Generation)
    assert "float32" in found[here] and "bfloat16" in found[here]
    assert not found[Generation.BF16_8BIT if here != Generation.BF16_8BIT else "bf16-24bit"]

    compact(adapter, tmp_path / "dropped", drop_bases=True)  # a digest is left
    _, report = ask(capsys, "inspect", tmp_path / "dropped")
    assert report["bases"]["torch"] is None and not report["bases"]["in_file"]
    _, report = ask(capsys, "inspect", tmp_path / "dropped", "--base", base)
    assert agreeing(report) == found

    write_adapter(tmp_path / "jax", jax_adapter(np.random.default_rng(0)))
    _, report = ask(capsys, "inspect", tmp_path / "jax")
    assert not any(agreeing(report).values())
    assert report["bases"]["recorded"] == {"source": "jax", "key": 42}
    assert all(row["shape"] for row in report["layers"])  # our own files tell

    model = peft.get_peft_model(
        Net(), peft.RandLoraConfig(r=3, target_modules=["layer.2"], save_projection=False)
    )
    model.save_pretrained(tmp_path / "key")
    _, report = ask(capsys, "inspect", tmp_path / "key")
    assert report["bases"]["torch"] is None and report["bytes"]["copies_of_bases"] == 0
    assert report["numbers"]["without_effect"] == ["layer.2"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["randlora_gamma", "randlora_B", "head.dense.weight"])
def test_inspect_reports_numbers_that_others_refuse(tmp_path, capsys, part, value):
    peft_net(tmp_path / "src", modules_to_save=["head"])

    def spoil(tensors):
        for key in sorted(tensors):
            if key.endswith(part):
                tensors[key].reshape(-1)[:3] = value
        return tensors

    rewrite(tmp_path / "src", spoil)
    status, report = ask(capsys, "inspect", tmp_path / "src")
    assert status == 1 and not report["good"]
    assert all(part in key and bad == 3 for key, bad in report["numbers"]["not_finite"].items())
    assert len(report["numbers"]["not_finite"]) == (3 if part == "randlora_gamma" else 1)
    assert main(["inspect", str(tmp_path / "src")]) == 1
    told = capsys.readouterr().out
    assert "NOT FINITE" in told and "use an earlier save" in told
    assert main(["compact", str(tmp_path / "src"), str(tmp_path / "dst")]) == 1
    assert "NaN or infinite" in capsys.readouterr().err and not (tmp_path / "dst").exists()


def test_the_plot_draws_pefts_delta_weights(tmp_path, capsys, llama):
    base, adapter, model = llama
    picture = tmp_path / "plot.png"
    line = ["inspect", adapter, "--base", base, "--plot", picture]
    status, report = ask(capsys, *line, "--layer", "0.self_attn.k_proj", "--layer", "down_proj")
    assert status == 0 and picture.read_bytes().startswith(b"\x89PNG")
    drawn = report["plot"]
    assert len(drawn["norms"]) == 14 and len(drawn["spectra"]) == 3
    for name, norm in drawn["norms"].items():
        module = model.get_submodule(f"base_model.model.{name}")
        delta = module.get_delta_weight("default").detach()
        assert norm == pytest.approx(float(delta.norm()), rel=1e-4)
        if name in drawn["spectra"]:
            found = drawn["spectra"][name]
            values = torch.linalg.svdvals(delta)
            np.testing.assert_allclose(found["values"], values, atol=1e-4 * float(values[0]))
            trained = sum(p.numel() for key, p in module.named_parameters() if "randlora_" in key)
            rank = found["lora_rank"]
            assert rank == max(1, round(trained / sum(delta.shape)))
            u, s, v = torch.linalg.svd(delta)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            kept = 1 - float(((delta - best).norm() / delta.norm()) ** 2)
            assert found["lora_keeps"] == pytest.approx(kept, abs=1e-4)

    status, report = ask(capsys, *line, "--force")
    assert status == 0 and len(report["plot"]["spectra"]) == 4


def test_a_base_model_of_other_sizes_is_refused(tmp_path, capsys, llama):
    _, adapter, _ = llama
    wide = save_base("llama", tmp_path / "wide", intermediate_size=56)
    assert main(["inspect", str(adapter), "--base", wide]) == 1
    assert "another base model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "compact", "merge", "convert"])
def test_a_base_model_in_place_of_an_adapter(command, llama, capsys):
    assert main([command, str(llama[0]), "out"]) == 2
    assert "this is a base model; the adapter goes first" in capsys.readouterr().err


def test_a_hub_name_is_not_fetched(llama, capsys):
    assert main(["merge", str(llama[1]), "--base", "meta-llama/Llama-2-7b-hf", "out"]) == 2
    assert "hf download NAME --local-dir my-model" in capsys.readouterr().err


def test_bases_in_the_file_get_one_line(llama, capsys):
    assert main(["inspect", str(llama[1])]) == 0
    text = capsys.readouterr().out
    assert text.count("PyTorch draws") == 1 and "what PyTorch draws" not in text
