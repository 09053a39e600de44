"""Ways to damage an adapter's configuration, or the set of its files; and all the ways."""

from __future__ import annotations

import json
from random import Random

from mutations import (
    CONFIG,
    MUTATIONS,
    PREFIX,
    WEIGHTS,
    Files,
    _spliced,
    junk,
    mutation,
)

__all__ = ["CONFIG", "MUTATIONS", "PREFIX", "WEIGHTS", "Files"]


@mutation
def config_field(rng: Random, files: Files) -> bool:
    values = json.loads(files.config)
    for _ in range(rng.choice([1, 1, 3])):
        value = junk(rng)
        values[rng.choice([*values, "new"])] = value if rng.random() < 0.7 else [value]
    files.config = json.dumps(values).encode()
    return False


WRONG = {
    "peft_type": ["LORA", "randlora", None, 1],
    "r": [0, -1, "3", 1.5, True, None, [], 10**30, 1e9, 2**63],
    "randlora_alpha": [0, -1, "3", None, float("nan"), float("inf"), 10**400],
    "projection_prng_key": [2**64, -(2**63) - 1, 0.5, "0", None, True],
    "save_projection": [0, 1, "true", None, []],
    "target_modules": [[], 3, {}, [3], "(", [""]],
    "bias": ["some", None, True, 0],
}


@mutation
def wrong_config_field(rng: Random, files: Files) -> bool:
    values = json.loads(files.config)
    name = rng.choice(sorted(WRONG))
    values[name] = rng.choice(WRONG[name])
    files.config = json.dumps(values).encode()
    # a rank that nothing contradicts by its type is contradicted by the tensors
    files.names = () if name == "r" else (name, "finite")
    return True


@mutation
def absent_config_field(rng: Random, files: Files) -> bool:
    values = json.loads(files.config)
    del values[rng.choice(sorted(values))]
    files.config = json.dumps(values).encode()
    return False


@mutation
def config_spliced(rng: Random, files: Files) -> bool:
    files.config = _spliced(rng, files.config, len(files.config))
    return False


@mutation
def config_cut_short(rng: Random, files: Files) -> bool:
    files.config = files.config[: rng.randrange(len(files.config.rstrip()))]
    return True


@mutation
def config_field_twice(rng: Random, files: Files) -> bool:
    values = json.loads(files.config)
    name = rng.choice(sorted(values))
    files.config = b"{" + json.dumps(name).encode() + b":1," + files.config.lstrip()[1:]
    files.names = (name,)
    return True


@mutation
def config_of_noise(rng: Random, files: Files) -> bool:
    files.config = rng.choice([b"", b"\xef\xbb\xbf" + files.config, b"[]", b"3", rng.randbytes(99)])
    return True


# --- the directory --------------------------------------------------------------------------------


@mutation
def absent_file(rng: Random, files: Files) -> bool:
    files.absent = rng.choice([(CONFIG,), (WEIGHTS,), (CONFIG, WEIGHTS)])
    if rng.random() < 0.5:
        files.others = {"adapter_model.bin": b"cos\nsystem\n(S'touch pwned'\ntR."}
    return True


@mutation
def an_unfinished_save(rng: Random, files: Files) -> bool:
    """A folder that stands for new files, as a crash leaves it, with a damaged one in it."""
    name = rng.choice([CONFIG, WEIGHTS])
    damaged = rng.choice([b"", b"{}", files.config, files.weights, rng.randbytes(50)])
    files.absent = (CONFIG,)
    new = {CONFIG: files.config, name: damaged}
    files.others = {f".{CONFIG}.randlora-ready/{n}": raw for n, raw in new.items()}
    return damaged != (files.config if name == CONFIG else files.weights)
