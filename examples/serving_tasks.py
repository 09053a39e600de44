"""Adapters to be served: three manners of speaking, trained for seconds each, and copies of them.

tunix's PeftTrainer trains them, on the questions below and answers in their manner.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import smollm
import tuning
from reuters import Documents
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from training import Settings

from randlora_jax import get_peft_model

STEPS, WIDTH = 10, 80  # tokens of a conversation

MANNERS = {
    "shouting": lambda text: text.upper().replace(".", "!"),
    "pirate": lambda text: f"Arr, matey! {text} Aye, that be the truth.",
    "reporter": lambda text: f"Breaking news: {text} We will tell you more at nine.",
}
FACTS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days are there in a week?": "There are seven days in a week.",
    "Who wrote Romeo and Juliet?": "William Shakespeare wrote Romeo and Juliet.",
    "What is the largest ocean?": "The largest ocean is the Pacific Ocean.",
    "How do plants make food?": "Plants make food from light, water and air.",
    "What is the opposite of cold?": "The opposite of cold is hot.",
    "What is two plus three?": "Two plus three is five.",
    "What language is spoken in Brazil?": "Portuguese is spoken in Brazil.",
    "Name a country in Africa.": "Kenya is a country in Africa.",
    "What is wheat?": "Wheat is a grain that bread is made of.",
    "Where do penguins live?": "Penguins live in the south of the world.",
    "What is ice?": "Ice is frozen water.",
    "Why do ships float?": "Ships float because they push water away.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci painted the Mona Lisa.",
    "What does a baker do?": "A baker makes bread and cakes.",
    "What is a violin?": "A violin is an instrument with four strings.",
}


def make(folder: Path, copies: int) -> None:
    """Trains what the folder lacks, and copies it."""
    if not all((folder / name).exists() for name in MANNERS):
        tokenizer, base = smollm.load_tokenizer(), smollm.tunix_base()
        scratch = folder.with_name("trained")
        for name in MANNERS:
            model: Any = get_peft_model(base, smollm.CONFIG, name)
            train = conversations(tokenizer, name)
            settings, pad = Settings(1e-3, batch_size=4), tokenizer.pad_token_id
            tuning.fit(model, train, train, STEPS, settings, pad, f"training {name!r}", checks=0)
            model.save_pretrained(scratch)
            base = model.unload()
        scratch.rename(folder)  # all of them, or none
    for i in range(copies):
        name = list(MANNERS)[i % len(MANNERS)]
        if not (target := folder / f"{name}-{i}").exists():
            copy(folder / name, target, seed=i)


def conversations(tokenizer: Any, manner: str) -> Documents:
    """The questions, answered in a manner: fields as `tuning.fit` takes them."""
    answered = np.full((len(FACTS), WIDTH), tokenizer.pad_token_id, np.int32)
    graded = np.zeros(answered.shape, bool)
    for row, (question, answer) in enumerate(FACTS.items()):
        said = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(said, add_generation_prompt=True)
        text = MANNERS[manner](answer) + tokenizer.eos_token
        told = tokenizer(text, add_special_tokens=False).input_ids
        answered[row, -len(asked) - len(told) :] = asked + told
        graded[row, -len(told) :] = True
    return Documents({"answered": answered, "graded": graded}, np.zeros(len(FACTS), np.int32))


def copy(source: Path, target: Path, seed: int) -> None:
    """An adapter with other numbers: each of lambda and gamma a twentieth off, at random."""
    draws, weights = np.random.default_rng(seed), "adapter_model.safetensors"
    with safe_open(source / weights, "numpy") as file:
        metadata = file.metadata()
    arrays = {
        key: x * (1 + 0.05 * draws.standard_normal(x.shape)).astype(x.dtype)
        if key.endswith(("randlora_lambda", "randlora_gamma"))
        else x
        for key, x in load_file(source / weights).items()
    }
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    shutil.copyfile(source / "adapter_config.json", scratch / "adapter_config.json")
    save_file(arrays, scratch / weights, metadata)
    scratch.rename(target)
