"""Ways in which the parts of an adapter directory contradict each other, or lead elsewhere."""

from __future__ import annotations

import json
from random import Random

from config_mutations import CONFIG, MUTATIONS, PREFIX, WEIGHTS, Files, mutation
from mutations import _repack, _tensors, header_of, junk, packed

__all__ = ["CONFIG", "MUTATIONS", "PREFIX", "WEIGHTS", "Files"]

HARMLESS = {"hidden_files", "links", "promised_biases_lost"}  # that must never be refused


def _config(files: Files, **changes: object) -> dict:
    """The configuration, which `changes` are put into."""
    values = json.loads(files.config) | changes
    files.config = json.dumps(values).encode()
    return values


def _without(files: Files, part: str) -> bool:
    """Takes all tensors whose names have `part` out; whether there were any."""
    tensors = _tensors(files)
    kept = {name: x for name, x in tensors.items() if part not in name}
    _repack(files, kept)
    return len(kept) < len(tensors)


@mutation
def promised_module_lost(rng: Random, files: Files) -> bool:
    """What the configuration says was trained whole is not in the file, or never was."""
    whole = json.loads(files.config).get("modules_to_save")
    if not whole:
        whole = [rng.choice(["head.dense", "dense"])]
        _config(files, modules_to_save=whole)
    _without(files, ".head.")
    files.names = tuple(whole)
    return True


@mutation
def promised_biases_lost(rng: Random, files: Files) -> bool:
    """As PEFT wrote them before 0.21: said, and opened."""
    if not json.loads(files.config).get("modules_to_save"):
        _config(files, bias=rng.choice(["all", "randlora_only"]))
    return False


@mutation
def targets_of_another_save(rng: Random, files: Files) -> bool:
    """The configuration selects other layers than the file has tensors for."""
    layers = ["layer.2", "layer.10", "layer.11"]
    lost = rng.choice(layers)
    rest = [name for name in layers if name != lost]
    change = rng.choice(
        [
            {"target_modules": rest},
            {"target_modules": "|".join(rest).replace(".", r"\.")},
            {"target_modules": ["2", "10", "11"], "layers_to_transform": [99]},
        ]
    )
    _config(files, **change)
    files.names = ("target_modules", "layers_to_transform", lost)
    return True


@mutation
def layer_lost(rng: Random, files: Files) -> bool:
    """A target of the configuration has no tensors in the file."""
    lost = rng.choice(["layer.2", "layer.10", "layer.11"])
    _without(files, f".{lost}.randlora_")
    return False


@mutation
def arithmetic_of_others(rng: Random, files: Files) -> bool:
    """A field by which another program computes something else; or would, if it were set."""
    name = rng.choice(["use_dora", "use_rslora", "my_scaling", "alpha_pattern"])
    neutral = rng.random() < 0.4
    value = rng.choice([False, None, [], {}] if neutral else [True, 2, 0.5, "x", {"x": 1}, [1]])
    _config(files, **{name: value})
    files.names = (name,)
    return not neutral


@mutation
def metadata_of_others(rng: Random, files: Files) -> bool:
    """Where this library writes what it knows of the bases, something else."""
    header, data = header_of(files)
    metadata = header.get("__metadata__") or {}
    record = json.loads(metadata.get("randlora_jax", "{}"))
    record[rng.choice(["digest", "kind", "source", "version", "shapes", *record])] = junk(rng)
    metadata["randlora_jax"] = json.dumps(record)
    header["__metadata__"] = metadata
    files.weights = packed(header, data)
    return False


@mutation
def hidden_files(rng: Random, files: Files) -> bool:
    """Complete files where an unfinished save would lay its own: those that are seen count."""
    place = rng.choice([f".{CONFIG}.randlora-ready", f".{WEIGHTS}.randlora-ready"])
    config = json.loads(files.config) | {"randlora_alpha": 99, "projection_prng_key": 5}
    weights = rng.choice([files.weights, b"", rng.randbytes(99)])
    names = [(CONFIG, json.dumps(config).encode()), (WEIGHTS, weights), ("x", b"x")]
    files.others = {f"{place}/{name}": raw for name, raw in rng.sample(names, rng.randint(1, 3))}
    return False


@mutation
def links(rng: Random, files: Files) -> bool:
    """Hidden entries that are links to something of somebody else."""
    place = rng.choice(
        [f".{CONFIG}.randlora-ready", f".{CONFIG}.randlora-lock", f".{CONFIG}.randlora-saving"]
    )
    files.others = {"elsewhere/" + CONFIG: b"{}", "elsewhere/" + WEIGHTS: files.weights}
    files.links = {place: rng.choice(["elsewhere", "nowhere", "/", "..", place])}
    return False
