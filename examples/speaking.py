"""The same prompts continued greedily in JAX, by tunix's sampler, and in PyTorch."""

from collections.abc import Sequence
from typing import Any

import news
import reuters
import torch
from training import track
from tunix.generate.sampler import CacheConfig, Sampler

NEW_TOKENS, TOGETHER = 24, 10

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "What is a barrel of oil used for?",
    "Write a sentence about a cat.",
    "How many days are there in a week?",
    "What does a central bank do?",
    "Who wrote Romeo and Juliet?",
    "Explain what a company's profit is.",
    "What is the largest ocean?",
    "Give a synonym of happy.",
    "How do plants make food?",
    "What is the opposite of cold?",
    "What is wheat?",
    "Name a country in Africa.",
    "What is two plus three?",
    "Describe the moon in a few words.",
    "What is a merger of two companies?",
    "What language is spoken in Brazil?",
    "Why do ships float?",
    "What is an interest rate?",
    "Tell me a fact about Japan.",
    "What colours has a rainbow?",
    "What is inflation?",
    "Say hello in Spanish.",
)


def prompts(tokenizer: Any, count: int) -> list[str]:
    """Half of them news items of the test split, half questions about anything."""
    _, texts = reuters.rows("test", subjects=8)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    known = [news.prompt(tokenizer, text) for text in texts[: len(QUESTIONS)]]
    return [text for pair in zip(known, asked, strict=True) for text in pair][:count]


def in_tunix(model: Any, tokenizer: Any, texts: Sequence[str], title: str) -> list[str]:
    """What tunix's sampler says, from its cache."""
    config = model.model.config
    cache = CacheConfig(
        cache_size=news.WIDTH + NEW_TOKENS,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = Sampler(model, tokenizer, cache)
    groups = [texts[i : i + TOGETHER] for i in range(0, len(texts), TOGETHER)]
    return [
        said
        for group in track(groups, title, len(groups))
        for said in sampler(list(group), NEW_TOKENS, max_prompt_length=news.WIDTH).text
    ]


def in_torch(model: Any, tokenizer: Any, texts: Sequence[str], title: str) -> list[str]:
    """What PyTorch's own greedy generation says."""
    said = []
    groups = [texts[i : i + TOGETHER] for i in range(0, len(texts), TOGETHER)]
    for group in track(groups, title, len(groups)):
        asked = tokenizer(
            list(group),
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            made = model.generate(
                **asked,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        for tokens in made[:, asked["input_ids"].shape[1] :].tolist():
            ids = [*tokens, tokenizer.eos_token_id]
            said.append(tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]))
    return said
