"""What `randlora-jax to-lora` costs on one block of Llama 3 8B, and how good its LoRA is.

    python benchmarks/to_lora.py                the seven layers, r 32, rank 64; 0.7 GB on disk
    python benchmarks/to_lora.py --r 64         fewer, wider bases
    python benchmarks/to_lora.py --decay 300    lambda falls by a factor of e every 300 numbers
    python benchmarks/to_lora.py --small        the same shapes divided by 4, a quick check

The adapter's numbers are random. Without --decay all directions of delta_W are alike, which is the
hardest case for a method that begins with random vectors. Three contestants, each in a process of
its own, all with the same number of threads: the command; PyTorch, forming each delta_W and taking
torch.svd_lowrank of it (q = rank + 8, niter = 4); the command with --exact. What each keeps is
measured in the same way, from the difference between delta_W and the product of the two factors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from adapter_files import Shapes, llama
from processes import RANDLORA, cost_of
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.tensor_file import TensorFile
from randlora_jax.interop.tensor_writer import Entry, write_stream, write_tensors

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def llama_3_8b(divisor: int) -> Shapes:
    """The linear layers of a block: width 4096, keys and values 1024, hidden 14336."""
    return llama(1, *(side // divisor for side in (4096, 1024, 14336)))


def write_inputs(folder: Path, shapes: Shapes, r: int, decay: float | None) -> None:
    """Write an adapter with one copy of its bases, and a base model of zeros in bfloat16."""
    rng = np.random.default_rng(0)
    low, high = sorted(max(sides) for sides in zip(*shapes.values(), strict=True))
    first = next(iter(shapes))
    tensors = {
        f"{PREFIX}{first}.randlora_A": rng.uniform(-1.7, 1.7, (r, 1, low)),
        f"{PREFIX}{first}.randlora_B": rng.uniform(-1.7, 1.7, (high, -(-low // r), r)),
    }
    for name, shape in shapes.items():
        n = -(-min(shape) // r)
        lam = 0.01 * rng.standard_normal((r, n))
        if decay:
            lam *= np.exp(-np.arange(r * n) / decay).reshape(n, r).T
        tensors[f"{PREFIX}{name}.randlora_lambda"] = lam
        gamma = (1 + 0.1 * rng.standard_normal((n, min(shape)))) / min(shape)
        tensors[f"{PREFIX}{name}.randlora_gamma"] = gamma
    (folder / "adapter").mkdir(parents=True)
    dtypes = dict.fromkeys(tensors, np.dtype(np.float32))
    write_tensors(folder / "adapter" / WEIGHTS, tensors, {"format": "pt"}, dtypes)
    names = sorted({name.rpartition(".")[2] for name in shapes})
    config = RandLoraConfig(r=r, target_modules=names, projection_source="file")
    config.save_pretrained(folder / "adapter")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    entries = {f"{name}.weight": Entry("BF16", shape) for name, shape in shapes.items()}

    def zeros(key: str) -> np.ndarray:
        return np.zeros(entries[key].shape, ml_dtypes.bfloat16)

    write_stream(folder / "base" / "model.safetensors", entries, {"format": "pt"}, zeros)


def delta(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int], scaling: float):
    """delta_W of a layer as PEFT forms it, (out, in), a torch tensor."""
    import torch

    parts = {
        part: torch.from_numpy(tensors[f"{PREFIX}{name}.randlora_{part}"])
        for part in ("lambda", "gamma")
    }
    a, b = (
        torch.from_numpy(value)
        for part in "AB"
        for key, value in tensors.items()
        if key.endswith(f"randlora_{part}")
    )
    (n, low), high = parts["gamma"].shape, max(shape)
    a_flat = (parts["lambda"][:, :, None] * a[:, :, :low] * parts["gamma"]).reshape(-1, low)
    product = b[:high, :n].reshape(high, -1) @ a_flat * scaling
    return product if low == shape[1] else product.T.contiguous()


@dataclass
class Seconds:
    """How long something takes: in all, and of processor time."""

    wall: float = 0
    cpu: float = 0

    def __enter__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __exit__(self, *exc: object) -> None:
        self.wall += time.perf_counter() - self.start[0]
        self.cpu += time.process_time() - self.start[1]

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __str__(self) -> str:
        return f"{self.wall:7.1f} s  (processor time {self.cpu:6.1f} s)"


def torch_side(folder: Path, shapes: Shapes, rank: int, scaling: float) -> dict[str, Any]:
    """PyTorch's seconds, and the share of each layer's energy that each contestant keeps."""
    import torch

    with TensorFile(folder / "adapter" / WEIGHTS) as file:
        tensors = {key: file.read(tensor) for key, tensor in file.tensors.items()}
    loras = {}
    for name in ("lora", "exact"):
        if (folder / name).exists():
            with TensorFile(folder / name / WEIGHTS) as file:
                loras[name] = {key: file.read(tensor) for key, tensor in file.tensors.items()}
    forming, decomposing, kept = Seconds(), Seconds(), {}
    for name, shape in shapes.items():
        with forming:
            whole = delta(tensors, name, shape, scaling)
        with decomposing:
            u, s, v = torch.svd_lowrank(whole, q=rank + 8, niter=4)
        factors = {"torch": (u[:, :rank] * s[:rank], v[:, :rank].T)}
        for lora, found in loras.items():
            B, A = (found[f"{PREFIX}{name}.lora_{part}.weight"] for part in "BA")
            factors[lora] = torch.from_numpy(B), torch.from_numpy(A)
        total = whole.double().square().sum()
        kept[name] = {
            who: 1 - float((whole - B @ A).double().square().sum() / total)
            for who, (B, A) in factors.items()
        }
    return {"forming": forming, "decomposing": decomposing, "kept": kept}


def command(*arguments: object) -> tuple[Seconds, float]:
    """One `randlora-jax` command: how long it takes and its peak memory in MB."""
    seconds, processor, megabytes = cost_of(*RANDLORA, *arguments)
    return Seconds(seconds, processor), megabytes


def measure(folder: Path, shapes: Shapes, r: int, rank: int, *, exact: bool) -> None:
    """Run the contestants and print what was found."""
    inputs = [folder / "adapter", "--base", folder / "base"]
    _, alone = command("--help")
    seconds, peak = command("to-lora", *inputs, folder / "lora", "--rank", rank)
    if exact:
        whole, most = command("to-lora", *inputs, folder / "exact", "--rank", rank, "--exact")
    scaling = RandLoraConfig.from_pretrained(folder / "adapter").scaling
    with ProcessPoolExecutor(1) as pool:
        torch = pool.submit(torch_side, folder, shapes, rank, scaling).result()
    low, high = sorted(max(sides) for sides in zip(*shapes.values(), strict=True))
    stored, used = (
        4 * high * -(-side // r) * r / 1e6 for side in (low, max(map(min, shapes.values())))
    )
    theirs = torch["forming"] + torch["decomposing"]
    print(f"\n{len(shapes)} layers, r {r}, rank {rank}, {os.cpu_count()} cores")
    print(f"to-lora                        {seconds}")
    print(f"PyTorch, forming delta_W       {torch['forming']}")
    print(f"PyTorch, svd_lowrank           {torch['decomposing']}")
    if exact:
        print(f"to-lora --exact                {whole}  {most:.0f} MB at most")
    print(f"to-lora / PyTorch {seconds.wall / theirs.wall:.2f}, of processor time ", end="")
    print(f"{seconds.cpu / theirs.cpu:.2f}")
    print(f"memory of to-lora {peak:.0f} MB at most, {alone:.0f} before it begins;")
    print(f"B in the adapter has {stored:.0f} MB, of which the layers use {used:.0f}")
    print(f"\n{'share of the energy kept':34}{'to-lora':>10}{'PyTorch':>10}", end="")
    print(f"{'--exact':>10}{'to-lora / --exact':>19}" if exact else "")
    for name, kept in torch["kept"].items():
        print(f"{name:34}{kept['lora']:10.6f}{kept['torch']:10.6f}", end="")
        print(f"{kept['exact']:10.6f}{kept['lora'] / kept['exact']:19.6f}" if exact else "")


def main() -> None:
    """Make the files, measure, delete the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="shapes divided by 4")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--decay", type=float, help="over how many numbers lambda falls e-fold")
    parser.add_argument("--no-exact", action="store_true", help="leave out the slow contestant")
    parser.add_argument("--folder", type=Path, help="where the files go for a while")
    args = parser.parse_args()
    shapes = llama_3_8b(4 if args.small else 1)
    folder = Path(tempfile.mkdtemp(prefix="to_lora-", dir=args.folder))
    try:
        # In a process of its own: a child's peak memory starts from its parent's.
        with ProcessPoolExecutor(1) as pool:
            pool.submit(write_inputs, folder, shapes, args.r, args.decay).result()
        measure(folder, shapes, args.r, args.rank, exact=not args.no_exact)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
