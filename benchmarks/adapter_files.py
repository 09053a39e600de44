"""What the commands on adapter files cost, on a file as PEFT 0.21.2 writes it for a 3B model.

    python benchmarks/adapter_files.py           four of its 28 layers, 9 GB, deleted afterwards
    python benchmarks/adapter_files.py --small   the same shapes divided by 16, a quick check

PEFT writes the shared bases once at the top and again under every adapted layer, so nearly all of
the file is copies. `compact` must read every one, since it refuses copies that differ: a plain
read of the file is the floor for its time. Each round measures the plain read, then each command
in a process of its own; the time's ratio to the plain read of its round is what counts, because
another program on the machine slows both. Measured with the file in the system's memory and, as
for a file just opened, on the disk. Allowed memory: one copy of the bases, one tensor and 300 MB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from processes import RANDLORA, cost_of
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.tensor_writer import Entry, write_stream, write_tensors
from randlora_jax.interop.torch_rng import Generation, torch_bases

DEPTH = 28
LAYERS = 4
RANK = 32
KEY = 0

COMMANDS: Mapping[str, list[str]] = {
    "inspect": ["inspect", "{source}"],
    "compact": ["compact", "{source}", "{target}"],
    "compact --drop-bases": ["compact", "{source}", "{target}", "--drop-bases"],
    "merge": ["merge", "{source}", "--base", "{base}", "{target}"],
}

Shapes = dict[str, tuple[int, int]]  # (out, in) by the layer's name in the model


def llama_3b(layers: int, divisor: int = 1) -> Shapes:
    """The linear layers of a 3B Llama: width 3072, keys and values 1024, hidden 8192."""
    return llama(layers, *(side // divisor for side in (3072, 1024, 8192)))


def llama(layers: int, width: int, narrow: int, hidden: int) -> Shapes:
    """The linear layers of a Llama; `narrow`: of keys and values."""
    kinds = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    return {
        f"model.layers.{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()
    }


def peft_tensors(shapes: Shapes, r: int = RANK) -> dict[str, tuple[int, ...]]:
    """Every key that PEFT 0.21.2 writes, with its shape; all in float32."""
    low, high = sorted(max(sides) for sides in zip(*shapes.values(), strict=True))
    bases = {"A": (r, 1, low), "B": (high, -(-low // r), r)}
    tensors = {f"base_model.randlora_{part}": shape for part, shape in bases.items()}
    for name, shape in shapes.items():
        smallest = min(shape)
        n = -(-smallest // r)
        own = {"lambda": (r, n), "gamma": (n, smallest), **bases}
        tensors |= {f"base_model.model.{name}.randlora_{k}": s for k, s in own.items()}
    return dict(sorted(tensors.items()))


def total_bytes(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """What the numbers of a file take, in float32."""
    return sum(4 * int(np.prod(shape)) for shape in tensors.values())


def write_as_peft(folder: Path, shapes: Shapes) -> None:
    """Write the adapter directory, holding one copy of the bases in memory."""
    tensors = peft_tensors(shapes)
    low, high = sorted(max(sides) for sides in zip(*shapes.values(), strict=True))
    drawn = torch_bases(KEY, RANK, low, high, generation=Generation.BF16_24BIT)
    bases = {part: array.astype("<f4") for part, array in zip("AB", drawn, strict=True)}
    rng = np.random.default_rng(0)

    def make(key: str) -> np.ndarray:
        part = key.rpartition("randlora_")[2]
        if part in bases:
            return bases[part]
        return rng.standard_normal(tensors[key], np.float32) * 0.01

    folder.mkdir(parents=True)
    entries = {key: Entry("F32", shape) for key, shape in tensors.items()}
    write_stream(folder / "adapter_model.safetensors", entries, {"format": "pt"}, make)
    RandLoraConfig(
        r=RANK,
        projection_prng_key=KEY,
        target_modules=sorted({name.rpartition(".")[2] for name in shapes}),
        task_type="CAUSAL_LM",
        base_model_name_or_path="a-3b-llama",
        peft_version="0.21.2",
        projection_source="file",
    ).save_pretrained(folder)


def write_base(folder: Path, shapes: Shapes) -> None:
    """Write a base model in bfloat16, one file for each of its layers."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number in range(LAYERS):
        name = f"model-{number + 1:05}-of-{LAYERS:05}.safetensors"
        mine = {k: s for k, s in shapes.items() if k.startswith(f"model.layers.{number}.")}
        places |= {f"{k}.weight": name for k in mine}
        tensors = {
            f"{k}.weight": (rng.standard_normal(s, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
            for k, s in mine.items()
        }
        write_tensors(folder / name, tensors, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))


def plain_read(path: Path) -> None:
    """Read a file from end to end into one small buffer."""
    buffer = bytearray(1 << 20)
    with io.FileIO(path) as file:
        while file.readinto(buffer):
            pass


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(arguments: list[str]) -> tuple[float, float]:
    """One `randlora-jax` command: its seconds and its peak memory in MB."""
    cost = cost_of(*RANDLORA, *arguments, "--json")
    return cost.seconds, cost.megabytes


def forget(path: Path) -> None:
    """Drop a file from the system's memory, so that the next read comes from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not yet on the disk stays
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, shapes: Shapes, rounds: int, *, cold: bool) -> None:
    """Print a table: every command against the plain read of its round."""
    source, target, base = folder / "source", folder / "target", folder / "base"
    weights = source / "adapter_model.safetensors"
    tensors = peft_tensors(shapes)
    part = {key.rpartition("randlora_")[2]: 4 * int(np.prod(s)) for key, s in tensors.items()}
    one_tensor = dict.fromkeys(COMMANDS, part["B"])
    one_tensor["merge"] = max(2 * int(np.prod(shape)) for shape in shapes.values())
    reads: list[float] = []
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMMANDS}
    written: dict[str, int] = {}

    def prepare() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if cold:
            forget(weights)

    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            prepare()
            reads.append(seconds(lambda: plain_read(weights)))
            prepare()
            places = {"source": source, "target": target, "base": base}
            elapsed, peak = run([argument.format(**places) for argument in arguments])
            taken[name].append((elapsed, elapsed / reads[-1], peak))
            written[name] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    print(f"\nfrom {'the disk' if cold else 'memory'}, medians of {rounds} rounds")
    print(f"{'':22}{'seconds':>9}{'ratio':>8}{'peak MB':>9}{'allowed':>9}{'bytes written':>16}")
    print(f"{'plain read':22}{statistics.median(reads):9.2f}")
    for name, rows in taken.items():
        elapsed, ratio, peak = map(statistics.median, zip(*rows, strict=True))
        limit = (part["A"] + part["B"] + one_tensor[name] + 300e6) / 1e6
        print(
            f"{name:22}{elapsed:9.2f}{ratio:8.2f}{peak:9.0f}{limit:9.0f}{written.get(name, 0):16,}"
        )


def main() -> None:
    """Make the file, measure, delete the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="shapes divided by 16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go for a while")
    args = parser.parse_args()
    divisor = 16 if args.small else 1
    shapes = llama_3b(LAYERS, divisor)
    whole, slice_ = (total_bytes(peft_tensors(llama_3b(n, divisor))) for n in (DEPTH, LAYERS))
    print(f"as PEFT 0.21.2 writes it: {DEPTH} layers {whole:,} bytes (not written)")
    print(f"                          {LAYERS:2} layers {slice_:,} bytes")

    folder = Path(tempfile.mkdtemp(prefix="adapter_files-", dir=args.folder))
    try:
        # In a process of its own: a child's peak memory starts from its parent's.
        with ProcessPoolExecutor(1) as pool:
            pool.submit(write_as_peft, folder / "source", shapes).result()
            pool.submit(write_base, folder / "base", shapes).result()
        for cold in (False, True):
            measure(folder, shapes, args.rounds, cold=cold)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
