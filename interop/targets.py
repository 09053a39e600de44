"""Which layers an adapter takes: PEFT's matching rules, as functions of canonical names.

A canonical name is a PyTorch module path such as ``bert.encoder.layer.0.attention.self.query``.
Nothing here looks at a model: front ends say which names it has.

The rules are those of PEFT 0.21.2 (`tuners/tuners_utils.py`, `peft_model.py`). Where a case makes
PEFT stop with an error, so does `select`; where PEFT says nothing but does less than the
configuration asks for, `select` warns.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from randlora_jax.interop.config import ALL_LINEAR, RandLoraConfig
from randlora_jax.interop.default_targets import DEFAULT_TARGET_MODULES
from randlora_jax.interop.errors import TargetError, listed, nearest, shown, warn
from randlora_jax.interop.expressions import AT_OR_IN_MODULE, LAYER_NUMBER

# By the task; a model has one of them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# The layers of transformers' classes (4.57) that have a head for the task by another name: BART and
# its kin, LED, T5's, XLM, XLNet, Perceiver; LXMERT, Splinter, ModernBERT.
_HEADS_BY_OTHER_NAMES = {
    "SEQ_CLS": re.compile(
        r"model\.encoder\.layers\.|led\.|transformer\.(encoder\.block|attentions|ffns)\."
        r"|transformer\.layer\.\d+\.(ff|rel_attn)\.|perceiver\."
    ),
    "QUESTION_ANS": re.compile(r"lxmert\.|splinter\.|model\.layers\.\d+\.(attn|mlp)\.W"),
}

# The layers that make a language model's logits, as Hugging Face's classes name them.
OUTPUT_HEADS = (
    "lm_head",
    "proj_out",
    "lm_head.decoder",
    "predictions.decoder",
    "generator_lm_head",
    "vocab_projector",
)

# PEFT refuses these in state-space models: fused kernels there read the weights, not the layer.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_REFUSED = ("out_proj", "conv1d")


def is_output_head(name: str) -> bool:
    """Whether a Hugging Face model makes its logits with the layer `name`."""
    return f".{name}".endswith(tuple(f".{head}" for head in OUTPUT_HEADS))


def default_target_modules(model_type: str | None) -> tuple[str, ...] | str:
    """The target_modules PEFT takes for a Hugging Face `model_type` where none are given.

    Raises:
      TargetError: PEFT has no default for it.
    """
    if model_type in DEFAULT_TARGET_MODULES:
        return DEFAULT_TARGET_MODULES[model_type]
    near = difflib.get_close_matches(str(model_type), DEFAULT_TARGET_MODULES)
    raise TargetError(
        f"target_modules: expected names of layers, found None, and model type {model_type!r} has "
        f"no default{f' (near: {listed(near)})' if near else ''}. Name them, such as "
        f"target_modules=['q_proj', 'v_proj'], or write target_modules={ALL_LINEAR!r}."
    )


def matches(config: RandLoraConfig, name: str) -> bool:
    """Whether PEFT would adapt the module `name`.

    Never a module inside modules_to_save. A regular expression must match the whole name; a listed
    name is the module's own or a suffix of it after a dot. layers_to_transform narrows only
    suffixes, neither a regular expression nor a name given in full.

    Raises:
      TargetError: target_modules is None or "all-linear", which `select` resolves first.
    """
    targets = config.target_modules
    if targets is None or targets == ALL_LINEAR:
        raise TargetError(
            f"target_modules={shown(targets)} depends on the model: expected names or a pattern."
        )
    # The names in modules_to_save are patterns here, and plain suffixes in `matches_saved`.
    for saved in config.modules_to_save or ():
        if re.match(AT_OR_IN_MODULE.format(saved), name):
            return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return not set(_suffixes(name)).isdisjoint(targets) and _in_layers(config, name)


def _in_layers(config: RandLoraConfig, name: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    index = _layer_index(name, config.layers_pattern)
    return index == wanted if isinstance(wanted, int) else index in wanted


def _layer_index(name: str, patterns: str | Iterable[str] | None) -> int | None:
    """The first number in `name` that counts layers, None where there is none."""
    if not patterns:
        # Any number that is neither among the first two parts nor the last one.
        return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(LAYER_NUMBER.format(pattern), name)
        if found:
            return None if found["layer"] is None else int(found["layer"])
    return None


def task_heads(task_type: str | None) -> tuple[str, ...]:
    """Names of which PEFT trains a model's one whole for a task, whatever modules_to_save says."""
    return _HEADS.get(task_type or "", ())


def has_another_head(task_type: str | None, layers: Iterable[str]) -> bool:
    """Whether layers are of a class with none of `task_heads`, whose head PEFT does not train."""
    known = _HEADS_BY_OTHER_NAMES.get(task_type or "")
    return known is not None and any(map(known.match, layers))


def saved_modules(config: RandLoraConfig) -> tuple[str, ...]:
    """Names of the modules trained whole: modules_to_save and the heads of the task type."""
    return tuple(dict.fromkeys((*(config.modules_to_save or ()), *task_heads(config.task_type))))


def matches_saved(name: str, patterns: Iterable[str]) -> bool:
    """Whether PEFT trains the module `name` whole: it ends in one of `patterns`.

    No dot is asked for, so "classifier" takes DistilBERT's ``pre_classifier`` too.
    """
    return any(name.endswith(pattern) for pattern in patterns)


def inside_saved(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` or a module around it is trained whole."""
    patterns = tuple(patterns)
    return any(matches_saved(module, patterns) for module in (name, *_containers([name])))


def select(
    config: RandLoraConfig,
    linear: Sequence[str],
    other: Iterable[str] = (),
    *,
    model_type: str | None = None,
    output_embedding: str | None = None,
) -> list[str]:
    """The names in `linear` that `config` adapts, in their order.

    "all-linear" takes all of them but `output_embedding`. What is trained whole is never adapted
    (PEFT either leaves it out or fails with a TypeError, as for TOKEN_CLS with "all-linear").

    Args:
      linear: names of the layers that can be adapted.
      other: names of modules that cannot, such as embeddings. The containers of all names are
        added here: PEFT refuses a target that takes one of either, and so does this function.
      model_type: Hugging Face's name of the architecture, for the default targets.
      output_embedding: name of the layer that makes the logits of a language model.

    Raises:
      TargetError: nothing matches, or a target takes a module that cannot be adapted.

    Warns where a listed target takes no layer, or one outside layers_to_transform, and where
    modules_to_save has a name that is no module's.
    """
    if not linear:
        raise TargetError("the model has no layer that can be adapted.")
    resolved = _resolve(config, linear, model_type, output_embedding)
    whole = saved_modules(config)
    chosen = [n for n in linear if matches(resolved, n) and not inside_saved(n, whole)]

    impossible = {*other, *_containers([*linear, *other])} - set(linear)
    refused = sorted(n for n in impossible if matches(resolved, n) and not inside_saved(n, whole))
    if refused:
        raise TargetError(
            f"target_modules={shown(config.target_modules)} takes {listed(refused)}: only linear "
            "layers can be adapted. Narrow the targets, for example by longer names."
        )
    if not chosen:
        raise TargetError(_nothing_matched(config, resolved, linear))
    fixed = [n for n in chosen if n.split(".")[-1] in _MAMBA_REFUSED]
    if fixed and model_type in _MAMBA_TYPES:
        raise TargetError(
            f"target_modules takes {listed(fixed)}: PEFT adapts no {' or '.join(_MAMBA_REFUSED)} "
            f"of model type {model_type!r}. Leave them out."
        )
    if not isinstance(config.target_modules, str | None):
        _warn_of_surprises(resolved, linear, chosen)
    _warn_of_idle_modules(config, {*linear, *impossible})
    return chosen


def _resolve(
    config: RandLoraConfig,
    linear: Sequence[str],
    model_type: str | None,
    output_embedding: str | None,
) -> RandLoraConfig:
    """`config` with target_modules spelled out."""
    if config.target_modules is None:
        return replace(config, target_modules=default_target_modules(model_type))
    if config.target_modules != ALL_LINEAR:
        return config
    if config.layers_to_transform not in (None, ()):
        raise TargetError(
            f"layers_to_transform cannot narrow target_modules={ALL_LINEAR!r}: PEFT ignores it in "
            "small models and follows it in large ones. List the names of the layers instead."
        )
    # Heads of a classifier need no word here: `saved_modules` has them.
    names = [n for n in linear if n != output_embedding]
    if not names:
        raise TargetError(
            f"target_modules={ALL_LINEAR!r} leaves out the output embedding {output_embedding!r}, "
            "and the model has no other linear layer. Name it to adapt it."
        )
    return replace(config, target_modules=names)


def _nothing_matched(
    config: RandLoraConfig, resolved: RandLoraConfig, linear: Sequence[str]
) -> str:
    message = f"target_modules={shown(config.target_modules)} matches no layer that can be adapted."
    targets = resolved.target_modules
    without = replace(resolved, layers_to_transform=None, layers_pattern=None, modules_to_save=None)
    found = [n for n in linear if matches(without, n)]
    if found and config.layers_to_transform not in (None, ()):
        message += (
            f" It would match {listed(found)} but for "
            f"layers_to_transform={shown(config.layers_to_transform)} and "
            f"layers_pattern={shown(config.layers_pattern)}."
        )
    elif found:
        whole = listed(saved_modules(config))
        message += f" It would match {listed(found)}, but {whole} are trained whole."
    elif targets and not isinstance(targets, str):
        heads = [t for t in targets if is_output_head(t)]
        if heads:
            message += (
                f" An output head such as {heads[0]!r} has no kernel of its own where its weights "
                "are the embedding's (tied word embeddings), and cannot be adapted then."
            )
        message += _near(targets, linear)
    return f"{message} Layers of this model: {listed(linear)}."


def _near(targets: Iterable[str], linear: Sequence[str]) -> str:
    """What was perhaps meant by `targets`, among the layers' names and their last parts."""
    leaves = {n.split(".")[-1] for n in linear}
    near = {n for t in targets for n in difflib.get_close_matches(t, [*leaves, *linear], 2)}
    return f" Near: {listed(sorted(near))}." if near else ""


def _warn_of_surprises(config: RandLoraConfig, linear: Sequence[str], chosen: list[str]) -> None:
    targets = config.target_modules or ()
    idle = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in chosen)]
    if idle:
        says = "adapts no layer: it matches" if len(idle) == 1 else "adapt no layer: they match"
        warn(
            f"target_modules: {listed(idle)} {says} none, or one that is trained whole."
            f"{_near(idle, linear)} Layers of this model: {listed(linear)}."
        )
    beyond = [n for n in chosen if n in targets and not _in_layers(config, n)]
    if beyond:
        warn(
            f"layers_to_transform={shown(config.layers_to_transform)} does not keep out "
            f"{listed(beyond)}, as in PEFT: a name given in full is always adapted."
        )


def _warn_of_idle_modules(config: RandLoraConfig, modules: Iterable[str]) -> None:
    names = sorted(modules)
    heads = task_heads(config.task_type)  # of these, a model has one
    wanted = [name for name in config.modules_to_save or () if name not in heads]
    idle = [name for name in wanted if not any(matches_saved(n, [name]) for n in names)]
    if idle:
        says = "names no module, and trains" if len(idle) == 1 else "name no module, and train"
        warn(f"modules_to_save: {listed(idle)} {says} nothing. Near: {nearest(idle[0], names)}.")


def write_targets(adapted: Iterable[str], all_modules: Iterable[str]) -> tuple[str, ...] | str:
    """A target_modules value with which PEFT wraps exactly the modules `adapted`.

    Every name is shortened to the shortest suffix that no other module has, so layers that differ
    only in their index share one entry. Where even a full name is another's suffix, the value is a
    regular expression. It says all: write it with layers_to_transform and layers_pattern None.
    (PEFT releases read these two differently: 0.16 and 0.18 take the last number of a name that
    has several, 0.21.2 the first.)

    Args:
      adapted: canonical names, at least one.
      all_modules: names of all modules of the model; containers and `adapted` are added.

    Raises:
      TargetError: `adapted` is empty.
    """
    names = sorted(set(adapted))
    if not names:
        raise TargetError("no layer is adapted, so there are no targets to write.")
    modules = {*all_modules, *names}
    others = {*modules, *_containers(modules)} - set(names)
    taken = {suffix for other in others for suffix in _suffixes(other)}
    shortest = [next((s for s in _suffixes(n) if s not in taken), None) for n in names]
    if None in shortest:
        return by_full_names(names)
    return tuple(sorted({s for s in shortest if s is not None}))


def by_full_names(adapted: Iterable[str]) -> str:
    """A target_modules value with which PEFT wraps exactly `adapted`, whatever else a model has.

    One regular expression: a name in a list would take every module, too, that it is the end of.
    As that of `write_targets` it is written with layers_to_transform and layers_pattern None.
    """
    return "|".join(re.escape(name) for name in sorted(adapted))


def naming_in_full(config: RandLoraConfig, adapted: Iterable[str]) -> RandLoraConfig:
    """`config`, naming the layers `adapted` and no others in any model."""
    targets = by_full_names(adapted)
    return replace(config, target_modules=targets, layers_to_transform=None, layers_pattern=None)


def read_alike(config: RandLoraConfig, adapted: Iterable[str]) -> RandLoraConfig:
    """`config`, which takes the layers `adapted`, as every release of PEFT reads it.

    It is as it was, and so fits a model that calls the same layers otherwise, as transformers does
    from one release to the next; unless only a model tells what it names, or releases read its
    layers_to_transform differently.
    """
    needs_a_model = config.target_modules in (None, ALL_LINEAR)
    if needs_a_model or config.layers_to_transform not in (None, ()):
        return naming_in_full(config, adapted)
    return config


def full_names(target_modules: str | Collection[str] | None) -> tuple[str, ...]:
    """The names from which `by_full_names` made a value; none, if it did not."""
    if not isinstance(target_modules, str):
        return ()
    names = [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\)\|", target_modules)]
    return tuple(names) if by_full_names(names) == target_modules else ()


def _suffixes(name: str) -> list[str]:
    """ "a.b.c" -> ["c", "b.c", "a.b.c"]."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _containers(names: Iterable[str]) -> set[str]:
    """The names of the modules that hold `names`: "a.b.c" -> {"a", "a.b"}."""
    return {n[:i] for n in names for i, letter in enumerate(n) if letter == "."}
