"""The contestants in PyTorch: PEFT's RandLoRA and LoRA on transformers' Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from .cases import LORA_RANK, RANK, RATE, TARGETS, Contestant, Model


def base(model: Model, length: int, device: str) -> Any:
    """transformers' Llama in bfloat16 with random weights, made where it is to run."""
    config = transformers.LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def settings(contestant: Contestant) -> Any:
    """PEFT's, with rank and targets stated and all else as PEFT has it."""
    if contestant.method == "RandLoRA":
        return peft.RandLoraConfig(r=RANK, randlora_alpha=2 * RANK, target_modules=list(TARGETS))
    return peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(TARGETS))


class TorchSide:
    """A contestant that is ready to take steps."""

    def __init__(self, contestant: Contestant, model: Model, length: int):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")  # else what PEFT has in float32 crawls
        wrapped = peft.get_peft_model(base(model, length, self._device), settings(contestant))
        self._model = wrapped.get_base_model()
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=RATE)
        self._autocast = contestant.autocast
        self._decoder, self._loss = self._model.model, self._loss_of_one
        if contestant.compiled:
            self._decoder = torch.compile(self._decoder, dynamic=False)
            self._loss = torch.compile(self._loss, dynamic=False)
        self.trained = sum(p.numel() for p in trained)

    def _loss_of_one(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of one sequence: (length, width), (length,)."""
        return torch.nn.functional.cross_entropy(self._model.lm_head(hidden).float(), targets)

    def _cast(self) -> torch.autocast:
        """As transformers' Trainer has it with bf16=True."""
        return torch.autocast(self._device, torch.bfloat16, enabled=self._autocast)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def train(self, ids: np.ndarray) -> Callable[[], float]:
        """A step on (batch, length + 1) tokens: it waits for its end, tells the loss.

        The head and the loss go by sequences, and anew in the backward pass, as in JAX.
        """
        tokens = torch.tensor(ids[:, :-1], device=self._device)
        targets = torch.tensor(ids[:, 1:], device=self._device)
        self._model.train()

        def step() -> float:
            self._optimizer.zero_grad()
            with self._cast():
                hidden = self._decoder(input_ids=tokens).last_hidden_state
                losses = [
                    checkpoint(self._loss, *sequence, use_reentrant=False)
                    for sequence in zip(hidden, targets, strict=True)
                ]
                loss = torch.stack(losses).mean()
            loss.backward()
            self._optimizer.step()
            self._wait()
            return float(loss.detach())

        return step

    def decode(self, ids: np.ndarray) -> Callable[[], None]:
        """The model on (batch, 1) tokens."""
        tokens = torch.tensor(ids, device=self._device)
        self._model.eval()

        def forward() -> None:
            with torch.no_grad(), self._cast():
                self._model.lm_head(self._decoder(input_ids=tokens).last_hidden_state)
            self._wait()

        return forward

    def forget_peak(self) -> None:
        """What was there before counts no more."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int | None]:
        """Most bytes there were at once since `forget_peak`; None on a CPU, which does not tell."""
        on_card = self._device == "cuda"
        return {"peak_bytes": torch.cuda.max_memory_allocated() if on_card else None}
