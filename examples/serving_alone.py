"""What an adapter says by itself: the model without rows, slots or a cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import smollm
from flax import nnx
from training import track

from randlora_jax import RandLoraModel

LONGEST = 160  # tokens of a prompt and its answer


def agreed(tokenizer: Any, folder: Path, answers: Mapping[tuple[str, str], list[int]]) -> int:
    """How many answers, tokens by prompt and adapter, the model gives after `set_adapter`.

    An answer is the model's own if each token is the likeliest after those before it, which one
    call tells of all of them.
    """
    pad = tokenizer.pad_token_id

    @nnx.jit
    def likeliest(model: Any, tokens: Any) -> Any:
        asked = smollm.model_input(tokens, pad)
        return model(tokens, asked["positions"], None, asked["attention_mask"])[0].argmax(-1)

    first, *others = dict.fromkeys(name for _, name in answers)
    model = RandLoraModel.from_pretrained(smollm.tunix_base(), folder / first, first)
    model.stack_adapters(capacity=1 + len(others))
    for name in others:
        model.load_adapter(folder / name, name)
    count = 0
    for (prompt, name), tokens in track(answers.items(), "alone, by set_adapter()", len(answers)):
        model.set_adapter(name)
        said = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(said, add_generation_prompt=True)
        padded = np.full((1, LONGEST), pad, np.int32)
        padded[0, -len(asked) - len(tokens) :] = asked + tokens
        found = np.asarray(likeliest(model, padded))[0, -len(tokens) - 1 : -1].tolist()
        count += found == tokens
    return count
