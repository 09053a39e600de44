"""What is timed on a GPU: models, contestants, sizes, and which of them come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

RANK, LORA_RANK = 32, 16  # which train about as many numbers in Llama-3.2-1B
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE = 1e-3


@dataclass(frozen=True)
class Model:
    """A Llama by its sizes; the output head is the embedding."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def kernels(self) -> int:
        """Numbers in the matrices that every token is multiplied by."""
        kv = self.width * self.key_heads // self.heads
        layer = 2 * self.width * (self.width + kv) + 3 * self.width * self.mlp
        return self.layers * layer + self.vocabulary * self.width

    def step_flops(self, tokens: int, length: int) -> float:
        """Of a step that trains everything and sees each pair of tokens once: `FLOPS`."""
        return 6.0 * tokens * (self.kernels + self.layers * length * self.width)


FLOPS = (
    "6 x tokens x (kernels + layers x length x width), the same for every contestant: products of "
    "a full step, causal attention among them; LoRA needs about two thirds of it"
)

Side = Literal["jax", "torch"]
OURS = ("jax", "flax", "optax", "numpy", "ml_dtypes", "safetensors", "tqdm")
PEFT = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Contestant:
    """A way to fine-tune.

    Args:
      method: "RandLoRA", "LoRA" or "full".
      needs: what must be installed.
      apply: ours alone: how layers apply the adapter.
      compiled: PyTorch alone: whether torch.compile has the model.
      autocast: PyTorch alone: whether products take bfloat16 whatever they are given.
    """

    name: str
    side: Side
    method: str
    needs: Sequence[str] = field(repr=False)
    apply: Literal["auto", "merged", "factored"] = "auto"
    compiled: bool = False
    autocast: bool = True


DEFAULT, MERGED, FULL = "ours, auto", "ours, merged", "JAX full"
# By importance, and what is judged first: time may not suffice for all.
ROUNDS: Sequence[Sequence[Contestant]] = (
    (
        Contestant(DEFAULT, "jax", "RandLoRA", OURS),
        Contestant(FULL, "jax", "full", OURS),
        Contestant("PEFT RandLoRA", "torch", "RandLoRA", PEFT),
    ),
    (
        Contestant(MERGED, "jax", "RandLoRA", OURS, apply="merged"),
        Contestant("PEFT RandLoRA, compiled", "torch", "RandLoRA", PEFT, compiled=True),
        Contestant("JAX LoRA (qwix)", "jax", "LoRA", (*OURS, "qwix")),
        Contestant("PEFT LoRA", "torch", "LoRA", PEFT),
    ),
    (
        Contestant("ours, factored", "jax", "RandLoRA", OURS, apply="factored"),
        Contestant("PEFT LoRA, compiled", "torch", "LoRA", PEFT, compiled=True),
        Contestant("PEFT RandLoRA, no autocast", "torch", "RandLoRA", PEFT, autocast=False),
    ),
)
CONTESTANTS = {one.name: one for several in ROUNDS for one in several}


@dataclass(frozen=True)
class Sizes:
    """What a run takes: its models, and tokens of a step in sequences of one length.

    Sizes rise, decoding before training, since a process's peak of memory never falls.

    Args:
      batches: of one token each, for decoding.
      process_seconds: after which a contestant's process is stopped.
      start_seconds: with less time left none is started.
    """

    models: Sequence[Model]
    tokens: Sequence[int]
    length: int
    batches: Sequence[int]
    process_seconds: float
    start_seconds: float


ON_GPU = Sizes(
    models=(
        Model("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128_256),
        Model("Llama-3-8B, 4 layers", 4, 4096, 14336, 32, 8, 1024),
    ),
    tokens=(2048, 8192, 16384),
    length=2048,
    batches=(1, 16),
    process_seconds=180,
    start_seconds=20,
)
SMALL = Sizes(
    models=(Model("tiny Llama", 1, 64, 128, 4, 2, 256),),
    tokens=(64, 128),
    length=64,
    batches=(1,),
    process_seconds=400,
    start_seconds=20,
)
SIZES = {"gpu": ON_GPU, "small": SMALL}

# Dense bfloat16 products accumulated in float32, TFLOP/s, by NVIDIA's data sheets.
PEAKS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A10": 125.0,
    "NVIDIA GeForce RTX 4090": 165.0,
    "NVIDIA GeForce RTX 3090": 71.0,
}
