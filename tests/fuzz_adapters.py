"""Damages adapters in a hundred thousand ways and looks at what reading them does.

    python tests/fuzz_adapters.py --cases 100000 --seed 0
    python tests/fuzz_adapters.py --seed 0 --only 4711         one case again, with its traceback

Each case must end in one of our errors, with a message that names the file and what is wrong with
it, or the damage must be harmless: what was read is then what the safetensors package and a JSON
parser read. Memory stays in proportion to the files, nothing is written, nothing is executed. Some
cases go through `RandLoraModel.from_pretrained` too; there the model must stay as it was.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
from flax import nnx
from peft_nets import cast, jax_adapter, peft_net, rewrite, with_adapter_names
from promise_mutations import CONFIG, MUTATIONS, PREFIX, WEIGHTS, Files
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.peft_dir import read_adapter, write_adapter
from safetensors import safe_open

from randlora_jax import RandLoraError, RandLoraModel

MODEL_EVERY = 200  # cases: wrapping a model takes longer than reading a file
HARMLESS_EVERY = 20  # of those that were read
SECONDS = 20  # for one case
# A process needs some memory to read anything, and parsed JSON takes more than its text: a "[],"
# of three bytes becomes a list of 56, and a pointer to it.
FIXED, FACTOR = 2_000_000, 30


class Net(nnx.Module):
    """The layers of `peft_nets.Net`, under names of our own."""

    def __init__(self) -> None:
        sizes = {"l2": (7, 10), "l10": (10, 10), "l11": (10, 5), "dense": (5, 4)}
        for name, size in sizes.items():
            setattr(self, name, nnx.Linear(*size, rngs=nnx.Rngs(0)))


RULES = {r"l(\d+)": r"layer.\1", "dense": "head.dense"}


def sound_adapters() -> dict[str, Files]:
    """Real adapters: as PEFT writes them in several variants, and as we do."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, settings in {
            "PEFT": {},
            "PEFT, without bases": {"save_projection": False},
            "PEFT, whole module": {"modules_to_save": ["head.dense"], "bias": "randlora_only"},
            "PEFT, whole modules and biases": {"modules_to_save": ["head"], "bias": "all"},
            "PEFT, with adapter names": {},
            "PEFT, lambda and gamma in f16": {},
        }.items():
            peft_net(folder / label, **settings)
            if "names" in label:
                rewrite(folder / label, with_adapter_names)
            if "f16" in label:
                rewrite(folder / label, lambda tensors: cast(tensors, np.float16))
        write_adapter(folder / "ours", jax_adapter(np.random.default_rng(0)))
        write_adapter(folder / "ours, PEFT's bases", read_adapter(folder / "PEFT"))
        for path in sorted(folder.iterdir()):
            found[path.name] = Files((path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes())
    return found


class Watch:
    """Counts what Python does to the outside world while it is on."""

    WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
    WRITES += ("os.truncate", "os.chmod", "shutil.", "subprocess.", "os.system", "os.exec")
    WRITES += ("os.posix_spawn", "os.fork", "pickle.", "socket.connect", "tempfile.")

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if event == "open" and isinstance(args[2], int) and args[2] & writes:
            self.seen.append(f"open {args[0]!r} for writing")
        elif event.startswith(self.WRITES):
            self.seen.append(f"{event} {args!r}")


class Failure(AssertionError):
    """A case that ended as none may."""


class Fuzzer:
    """Runs cases by number: the same number and seed, the same case."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.adapters = sound_adapters()
        self.watch = Watch()
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.peak = 0.0  # of memory, as a share of what is allowed
        self.slowest = 0.0
        for name, files in self.adapters.items():  # and so that all imports are over
            self._lay_out(files)
            _, error = self._open(folder)
            if error is not None and "modules" not in name:  # whose norm `Net` lacks
                raise error

    def case(self, number: int) -> tuple[str, bool, Files]:
        rng = Random(f"{self.seed} {number}")
        files = self.adapters[rng.choice(sorted(self.adapters))].copy()
        name = rng.choice(sorted(MUTATIONS))
        must_be_refused = MUTATIONS[name](rng, files)
        return name, must_be_refused, files

    def run(self, number: int) -> None:
        """Raises Failure: the case, and what was wrong with its end."""
        name, must_be_refused, files = self.case(number)
        self._lay_out(files)
        before = self._listing()
        started = time.monotonic()
        adapter, error, peak = self._measured()
        allowed = FIXED + FACTOR * files.size
        if peak > allowed:  # or was it JAX, tidying up after a model?
            adapter, error, peak = self._measured()
        self.peak = max(self.peak, peak / allowed)
        self.slowest = max(self.slowest, time.monotonic() - started)
        if peak > allowed:
            raise Failure(f"{name}: {peak} bytes of memory for {files.size} of files")
        if time.monotonic() - started > SECONDS:
            raise Failure(f"{name}: took {time.monotonic() - started:.0f} s")
        if error is None:
            if must_be_refused:
                raise Failure(f"{name}: was read as if nothing were wrong")
            self._check_harmless(adapter, name)
        else:
            self._check_message(str(error), files, must_be_refused, name)
        if number % (MODEL_EVERY if error else HARMLESS_EVERY) == 0:
            with self._watched():
                self._load_into_a_model(name, error)
        if self.watch.seen or self._listing() != before:
            raise Failure(f"{name}: {self.watch.seen or 'files changed'}")
        self.outcomes[name, "read" if error is None else "refused"] += 1

    def _lay_out(self, files: Files) -> None:
        for path in self.folder.iterdir():
            real = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if real else path.unlink()
        for name, raw in {CONFIG: files.config, WEIGHTS: files.weights, **files.others}.items():
            if name not in files.absent:
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(raw)
        for name, target in files.links.items():
            (self.folder / name).symlink_to(target)

    def _listing(self) -> list[tuple[str, int, int]]:
        paths = [*self.folder.parent.iterdir(), *self.folder.rglob("*")]
        stats = [(str(path), path.lstat()) for path in sorted(paths)]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.watch.on = True
            try:
                yield
            finally:
                self.watch.on = False

    def _measured(self) -> tuple[Adapter | None, RandLoraError | None, int]:
        tracemalloc.start()
        try:
            with self._watched():
                adapter, error = self._read()
            return adapter, error, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def _read(self) -> tuple[Adapter | None, RandLoraError | None]:
        try:
            return read_adapter(self.folder), None
        except RandLoraError as error:
            return None, error

    def _check_message(self, text: str, files: Files, must_be_refused: bool, name: str) -> None:
        if not text.startswith(str(self.folder)):
            raise Failure(f"{name}: the message does not begin with the file: {text[:300]}")
        lines = [line.isprintable() for line in text.split("\n")]
        if len(text) > 3000 or len(lines) > 2 or not all(lines):
            raise Failure(f"{name}: no message for a terminal: {text[:300]!r}")
        if len(text) < len(str(self.folder)) + 30:
            raise Failure(f"{name}: the message says too little: {text[:300]}")
        if must_be_refused and files.names and not any(n in text for n in files.names):
            raise Failure(f"{name}: the message names none of {files.names}: {text[:300]}")

    def _check_harmless(self, adapter: Adapter | None, name: str) -> None:
        """What was read is what others read."""
        assert adapter is not None
        ready = self.folder / f".{CONFIG}.randlora-ready"  # counts where the visible one is gone
        folders = [self.folder] if (self.folder / CONFIG).exists() else [ready, self.folder]
        config, weights = (
            next(folder / file for folder in folders if (folder / file).exists())
            for file in (CONFIG, WEIGHTS)
        )
        values = json.loads(config.read_bytes())
        for field in ("r", "projection_prng_key", "save_projection", "randlora_alpha"):
            if field in values and getattr(adapter.config, field) != values[field]:
                raise Failure(f"{name}: {field} was read as {getattr(adapter.config, field)}")
        r = adapter.config.r
        with safe_open(weights, "numpy") as file:
            keys = list(file.keys())
            for layer, (lam, gamma) in adapter.layers.items():
                if lam.shape != (r, len(gamma)) or len(gamma) != -(-gamma.shape[1] // r):
                    raise Failure(f"{name}: {layer} has {lam.shape} and {gamma.shape}")
                for part, array in (("lambda", lam), ("gamma", gamma)):
                    start = f"{PREFIX}{layer}.randlora_{part}"
                    (key,) = [k for k in keys if k == start or k.startswith(start + ".")]
                    same = np.array_equal(file.get_tensor(key).astype(np.float32), array)
                    if not same or not np.isfinite(array).all():
                        raise Failure(f"{name}: {key} was read as other numbers")
            for key in keys:
                part = {"A": 0, "B": 1}.get(key.split(".randlora_")[-1][:1])
                if ".randlora_" in key and part is not None:
                    if adapter.bases is None:
                        raise Failure(f"{name}: {key} was passed over")
                    if not np.array_equal(file.get_tensor(key), adapter.bases[part]):
                        raise Failure(f"{name}: {key} was read as other numbers")

    def _open(self, folder: Path) -> tuple[Net, RandLoraError | None]:
        net = Net()
        try:
            RandLoraModel.from_pretrained(net, folder, names=RULES, rngs=nnx.Rngs(0))
        except RandLoraError as error:
            return net, error
        return net, None

    def _load_into_a_model(self, name: str, refused: RandLoraError | None) -> None:
        expected = nnx.to_pure_dict(nnx.state(Net()))
        net, error = self._open(self.folder)
        if error is None and refused is not None:
            raise Failure(f"{name}: from_pretrained opened what read_adapter refuses")
        if error is not None:
            if not isinstance(net.l2, nnx.Linear) or not _equal(net, expected):
                raise Failure(f"{name}: the model was changed by an adapter that was refused")
            if str(self.folder) not in str(error) or len(str(error)) > 3000:
                raise Failure(f"{name}: from_pretrained does not name the file: {str(error)[:300]}")
        self.outcomes["from_pretrained", "read" if error is None else "refused"] += 1


def _equal(net: Net, expected: dict) -> bool:
    found = nnx.to_pure_dict(nnx.state(net))
    return found.keys() == expected.keys() and all(
        np.array_equal(found[layer][leaf], expected[layer][leaf])
        for layer in expected
        for leaf in expected[layer]
    )


@contextmanager
def fuzzer(seed: int) -> Iterator[Fuzzer]:
    """A fuzzer with a folder of its own, in memory where there is such a place."""
    shared = Path("/dev/shm")
    where = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name) / "adapter"
        folder.mkdir()
        yield Fuzzer(seed, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, metavar="CASE", help="run this one, and raise its error"
    )
    args = parser.parse_args()
    failures = 0
    with fuzzer(args.seed) as runner:
        started = time.monotonic()
        if args.only is not None:
            runner.run(args.only)
        for number in range(args.cases if args.only is None else 0):
            try:
                runner.run(number)
            except Exception as error:
                failures += 1
                print(f"case {number}: {type(error).__name__}: {str(error)[:500]}", flush=True)
                runner.watch.seen.clear()
                if failures >= 20:
                    print("stopped after 20 failures")
                    return 1
        for name in [*MUTATIONS, "from_pretrained"]:
            counts = [runner.outcomes[name, end] for end in ("refused", "read")]
            print(f"{name:22} {counts[0]:6} refused {counts[1]:6} harmless")
        print(
            f"{args.cases} cases of seed {args.seed} in {time.monotonic() - started:.0f} s, "
            f"{failures} failures; slowest {runner.slowest:.2f} s, memory at most "
            f"{100 * runner.peak:.0f} % of {FIXED / 1e6:.0f} MB + {FACTOR} x the files"
        )
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
