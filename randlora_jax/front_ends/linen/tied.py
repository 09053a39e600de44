"""Modules that share one weight in Hugging Face's PyTorch models, by their names there.

Flax's twins hold such a weight once. An output head that shares the embedding's has no kernel, and
is no module, in Flax, so the names are data.
"""

from collections.abc import Iterable
from typing import Any

from randlora_jax.models.names import Path, dotted

# The layer that makes the logits of each type of model that may share its embedding's weight.
_HEADS = {
    **dict.fromkeys(("albert",), "predictions.decoder"),
    **dict.fromkeys(("bert", "big_bird", "roformer"), "cls.predictions.decoder"),
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta"), "lm_head.decoder"),
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart"), "lm_head"),
    **dict.fromkeys(("pegasus", "t5", "mt5", "umt5", "longt5"), "lm_head"),
    **dict.fromkeys(("bloom", "gemma", "gpt2", "gpt_neo", "gptj", "opt", "xglm"), "lm_head"),
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "whisper": "proj_out",
}

# The classes that have such a layer, by the ends of their names; Electra pretrains without one.
_WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "MTModel")
_PRETRAINED_WITH_HEAD = ("albert", "bert", "big_bird")

_EMBEDDINGS = ("wte", "word_embeddings", "embed_tokens", "shared")

Groups = tuple[tuple[str, ...], ...]


def tied_modules(class_name: str, config: Any, paths: Iterable[Path]) -> Groups:
    """Groups of modules that share a weight in PyTorch, the one that Flax has first.

    Args:
      class_name: of the Flax model.
      config: its Hugging Face configuration.
      paths: of its params.
    """
    paths = list(paths)
    decoder = getattr(config, "decoder", None)
    if hasattr(decoder, "model_type"):  # a model of two: its decoder makes the logits
        inner = [path[1:] for path in paths if path[0] == "decoder"]
        of_decoder = tied_modules("ForCausalLM", decoder, inner)
        return tuple(tuple(f"decoder.{name}" for name in group) for group in of_decoder)

    head = _head(class_name, config.model_type)
    groups: list[tuple[str, ...]] = []
    for path in (path[:-1] for path in paths if path[-2:-1] and path[-2] in _EMBEDDINGS):
        group = [dotted(path)]
        if path[-1] == "shared":
            root, sides = path[:-1], ("encoder", "decoder")
            there = {other[: len(path)] for other in paths}
            group += [dotted((*root, x, "embed_tokens")) for x in sides if (*root, x) in there]
        if head and config.tie_word_embeddings:
            group.append(head)
        if len(group) > 1:
            groups.append(tuple(group))
    if head and head.endswith(".decoder"):  # its bias is that of the module around it
        groups.append((head.removesuffix(".decoder"), head))
    return tuple(groups)


def _head(class_name: str, model_type: str) -> str | None:
    """The output head of a class that has one which may share its weight."""
    pretrains = class_name.endswith("ForPreTraining") and model_type in _PRETRAINED_WITH_HEAD
    return _HEADS.get(model_type) if pretrains or class_name.endswith(_WITH_HEAD) else None
