"""The task: which of eight topics a news item of Reuters has, asked and answered in chat.

An answer is judged by its first token, which no two answers share: the topic whose token is the
likeliest next word is taken. So a model is asked for a choice, and is not marked down for
wording; and what is compared are the words that it would say, were it allowed only these eight.
"""

from typing import Any

import numpy as np
import reuters
from reuters import Documents

ANSWERS = {
    "acq": "acquisition",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "shipping",
    "trade": "trade",
}
QUESTION = (
    "Which topic is the news about? Answer with one word: "
    "earnings, acquisition, oil, trade, currency, interest, shipping or grain."
)
TEXT_TOKENS, WIDTH = 24, 72  # of an item no more than its beginning; of all, a little more


def prompt(tokenizer: Any, text: str) -> str:
    """The conversation up to where the model answers, in the model's own template."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[:TEXT_TOKENS]
    said = [
        {"role": "system", "content": QUESTION},
        {"role": "user", "content": tokenizer.decode(ids)},
    ]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


def load(split: str, tokenizer: Any) -> Documents:
    """The "train" or "test" split of R8; labels are places in ANSWERS.

    Its fields: "asked" (documents, WIDTH) int32, the prompt, padded on the left; "answered", the
    same and the answer; "graded", bool, where the answer is, its end included.
    """
    names, texts = reuters.rows(split, subjects=8)
    labels = np.array([list(ANSWERS).index(name) for name in names], np.int32)
    ends = [
        tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        for answer in ANSWERS.values()
    ]
    shape = (len(texts), WIDTH)
    asked, answered = np.full((2, *shape), tokenizer.pad_token_id, np.int32)
    graded = np.zeros(shape, bool)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        ids = tokenizer(prompt(tokenizer, text), add_special_tokens=False).input_ids
        whole = ids + ends[label]
        asked[row, -len(ids) :] = ids
        answered[row, -len(whole) :] = whole
        graded[row, -len(ends[label]) :] = True
    return Documents({"asked": asked, "answered": answered, "graded": graded}, labels)


def first_tokens(tokenizer: Any) -> np.ndarray:
    """The token that each answer begins with, (8,)."""
    ids = [tokenizer(a, add_special_tokens=False).input_ids[0] for a in ANSWERS.values()]
    return np.array(ids)
