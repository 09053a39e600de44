"""What an adapter says by itself: the model without rows, slots or a cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import smollm
from flax import nnx
from training import track

from randlora_jax import RandLoraModel


def agreed(tokenizer: Any, folder: Path, answers: Sequence[tuple[str, str, list[int]]]) -> int:
    """How many answers (adapter, prompt, tokens) the model gives after `set_adapter`.

    An answer is the model's own if each token is the likeliest after those before it, which one
    call tells of all of them.
    """
    model, here = None, set[str]()
    count, pad = 0, tokenizer.pad_token_id
    longest = 160

    @nnx.jit
    def likeliest(model: Any, tokens: Any) -> Any:
        asked = smollm.model_input(tokens, pad)
        return model(tokens, asked["positions"], None, asked["attention_mask"])[0].argmax(-1)

    for name, prompt, tokens in track(answers, "alone, by set_adapter()", len(answers)):
        if model is None:
            model = RandLoraModel.from_pretrained(smollm.tunix_base(), folder / name, name)
            model.stack_adapters(capacity=len({name for name, _, _ in answers}))
            here = {name}
        if name not in here:
            model.load_adapter(folder / name, name)
            here.add(name)
        model.set_adapter(name)
        said = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(said, add_generation_prompt=True)
        padded = np.full((1, longest), pad, np.int32)
        padded[0, -len(asked) - len(tokens) :] = asked + tokens
        found = np.asarray(likeliest(model, padded))[0, -len(tokens) - 1 : -1].tolist()
        count += found == tokens
    return count
