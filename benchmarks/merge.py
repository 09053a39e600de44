"""What merging an adapter into its base model costs, beside loading, merging and saving in PEFT.

    python benchmarks/merge.py           three layers of a 3B Llama in bfloat16, 1.2 GB
    python benchmarks/merge.py --small   the same shapes divided by 16, a quick check

Both sides read one directory and one adapter (with one copy of the bases) and write one, in a
process of their own; their times and their peak memory are printed. Rounds take turns, and the
ratio of each is what counts, because another program on the machine slows both.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from processes import RANDLORA, cost_of

VOCABULARY = 49152
LAYERS = 3

PEFT = """
import sys, torch, transformers, peft
adapter, base, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make(folder: Path, divisor: int) -> None:
    """A base model of random weights, and PEFT's adapter over all its linear layers."""
    import peft
    import torch
    import transformers
    from randlora_jax.interop.peft_dir import read_adapter, write_adapter

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY // divisor,
        hidden_size=3072 // divisor,
        intermediate_size=8192 // divisor,
        num_hidden_layers=LAYERS,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    settings = peft.RandLoraConfig(r=32, target_modules="all-linear", randlora_alpha=64)
    model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "as-saved")
    write_adapter(folder / "adapter", read_adapter(folder / "as-saved"))
    shutil.rmtree(folder / "as-saved")


def run(command: list[str]) -> tuple[float, float]:
    """A command's seconds and its peak memory in MB."""
    cost = cost_of(*command)
    return cost.seconds, cost.megabytes


def main() -> None:
    """Make the files, measure, delete the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="shapes divided by 16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go for a while")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=args.folder))
    base, adapter = str(folder / "base"), str(folder / "adapter")
    ours = [*RANDLORA, "merge", adapter, "--base", base]
    commands = {"randlora-jax merge": ours, "PEFT": [sys.executable, "-c", PEFT, adapter, base]}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    try:
        # In a process of its own: a child's peak memory starts from its parent's.
        with ProcessPoolExecutor(1) as pool:
            pool.submit(make, folder, 16 if args.small else 1).result()
        for _ in range(args.rounds):
            for name, command in commands.items():
                taken[name].append(run([*command, str(folder / "out")]))
                shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder)
    print(f"medians of {args.rounds} rounds")
    print(f"{'':20}{'seconds':>9}{'peak MB':>9}")
    for name, rows in taken.items():
        print(
            f"{name:20}" + "".join(f"{statistics.median(x):9.1f}" for x in zip(*rows, strict=True))
        )
    pairs = zip(*taken.values(), strict=True)
    times, memory = zip(*((a[0] / b[0], b[1] / a[1]) for a, b in pairs), strict=True)
    print(
        f"ours takes {statistics.median(times):.2f} times as long, "
        f"PEFT {statistics.median(memory):.1f} times as much memory"
    )


if __name__ == "__main__":
    main()
