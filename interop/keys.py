"""What every key of a PEFT RandLoRA file means. Each must mean something, or the file is refused.

Three kinds exist: a layer's own numbers (``base_model.model.<layer>.randlora_lambda``), the
shared bases (``base_model.randlora_A``, and the same again under layers), and whatever else was
trained (``base_model.model.<state-dict key>``). PEFT leaves the adapter's name out of its files,
while a raw state dict has it at the end; both are understood.

PEFT's wrappers show in state-dict keys. The linear layer that was adapted lies one level down, so
its bias is ``<layer>.base_layer.bias``. A module that is trained whole lies, frozen, in
``<module>.original_module`` and, trained, in ``<module>.modules_to_save.<adapter>``; files have the
latter as ``<module>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, listed, shown
from randlora_jax.interop.tensor_file import Tensor

TOP = "base_model."
PREFIX = "base_model.model."
LAYER_PARTS = ("lambda", "gamma")
BASE_PARTS = ("A", "B")

_RANDLORA = re.compile(
    r"(?:(?P<module>.+)\.)?randlora_(?P<part>lambda|gamma|A|B)(?:\.(?P<adapter>[^.]+))?"
)
_COPY = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
_ADAPTED = ".base_layer."
_FROZEN = ".original_module."
_SECOND_NAME = ".decoder.bias"
_TRAINED = ".modules_to_save.default."  # "default" is what PEFT calls an adapter unless told

Value = TypeVar("Value")

Fail = Callable[[str], NoReturn]


@dataclass(frozen=True)
class Role:
    """What one tensor is.

    Attributes:
      part: ``"lambda"``, ``"gamma"``, ``"A"``, ``"B"``, ``"saved"``, or ``"repeated"`` for a
        second copy of a saved tensor.
      name: the layer ("" for the top-level bases), or the saved tensor's state-dict key.
    """

    part: str
    name: str


def roles_of(tensors: Iterable[Tensor], config: RandLoraConfig, fail: Fail) -> dict[str, Role]:
    """The role of every tensor of a file.

    Raises (by calling `fail`): a key means nothing, two keys mean the same, or a layer has only
    one of two tensors that belong together.
    """
    roles: dict[str, Role] = {}
    others: list[Tensor] = []
    adapter_names: dict[str, str] = {}
    for tensor in tensors:
        found = _randlora_role(tensor.key)
        if found is None:
            others.append(tensor)
            continue
        roles[tensor.key], adapter = found
        if adapter:
            adapter_names[adapter] = tensor.key
    if len(adapter_names) > 1:
        one, other, *_ = adapter_names.values()
        fail(
            f"{shown(one)} and {shown(other)} belong to two adapters; a directory holds one: save "
            "them apart"
        )

    adapter = next(iter(adapter_names), None)
    keys = {tensor.key for tensor in others}
    for tensor in others:
        roles[tensor.key] = _other_role(tensor, keys, adapter, config, fail)
    _check_unique(roles, fail)
    _check_partners(roles, fail)
    return roles


def trained_tensors(saved: Mapping[str, Value]) -> dict[str, Value]:
    """What an adapter trained whole, by the base model's state-dict keys.

    Args:
      saved: ``{key: tensor}`` as `Adapter.saved` has it, or a state dict of PEFT's wrapped model
        less `PREFIX`. PEFT's frozen copies, on which no output depends, are left out.

    Raises:
      AdapterFileError: two keys are for one tensor of the base model.
    """
    found: dict[str, Value] = {}
    for key, value in saved.items():
        if _FROZEN in key:
            continue
        name = key.replace(_ADAPTED, ".").replace(_TRAINED, ".")
        if name in found:
            raise AdapterFileError(
                f"the adapter carries {shown(name)} twice, as {shown(key)} too; remove one"
            )
        found[name] = value
    return found


def biases_by_one_name(
    tensors: Mapping[str, Value], has: Callable[[str], bool]
) -> dict[str, Value]:
    """Tensors trained whole, with a bias that PyTorch calls by two names under its first.

    Heads such as BERT's use their own ``<head>.bias`` as ``<head>.decoder.bias``. PEFT writes both;
    where they differ, the latter is what its model computes with.

    Args:
      tensors: by the base model's state-dict keys.
      has: whether a checkpoint, or a model of Flax, has a tensor of that key.
    """
    found = dict(tensors)
    for key in tensors:
        first = key.removesuffix(_SECOND_NAME) + ".bias"
        if key.endswith(_SECOND_NAME) and has(first) and not has(key):
            found[first] = found.pop(key)
    return found


def file_key(key: str, adapted: Collection[str]) -> str:
    """What a file calls the tensor that the base model's state dict calls `key`, less `PREFIX`.

    Args:
      adapted: the adapter's layers.
    """
    module, _, leaf = key.rpartition(".")
    return f"{module}{_ADAPTED}{leaf}" if module in adapted else key


def is_of_adapted(key: str) -> bool:
    """Whether a file's key is of an adapted layer's own weight or bias."""
    return f"{_ADAPTED}{key.rpartition('.')[2]}" in key


def _randlora_role(key: str) -> tuple[Role, str | None] | None:
    for prefix, has_module in ((PREFIX, True), (TOP, False)):
        match = _RANDLORA.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match and bool(match["module"]) == has_module and is_path(match["module"] or "x"):
            if not has_module and match["part"] in LAYER_PARTS:
                return None
            return Role(match["part"], match["module"] or ""), match["adapter"]
    return None


def _other_role(
    tensor: Tensor, keys: set[str], adapter: str | None, config: RandLoraConfig, fail: Fail
) -> Role:
    name = tensor.key.removeprefix(PREFIX)
    if name == tensor.key or "randlora_" in name or not is_path(name):
        fail(
            f"{shown(tensor.key)}: expected {PREFIX}<layer>.randlora_lambda, randlora_gamma, "
            f"randlora_A or randlora_B, or {PREFIX}<tensor of the model>; this key means nothing "
            "in a RandLoRA adapter. Was it saved with another method, or by a newer PEFT?"
        )
    # With bias="all" PEFT writes the biases of whole trained modules twice, under the wrapper's
    # name too (for nested modules with the adapter's name in the middle), and reads the first.
    if copy := _COPY.fullmatch(name):
        named, _, rest = copy["rest"].partition(".")
        candidates = [f"{copy['module']}.{copy['rest']}", f"{copy['module']}.{rest}"]
        original = next((c for c in candidates if PREFIX + c in keys), None)
        if original:
            return Role("repeated", original)
        if adapter is None or named != adapter:
            fail(
                f"{shown(tensor.key)}: expected the same tensor at "
                f"{shown(PREFIX + candidates[0])}, where every reader looks for it; found none"
            )
        name = candidates[1]
    if not _is_explained(name, tensor, keys, config):
        fail(
            f"{shown(tensor.key)}: expected only tensors that adapter_config.json asks for "
            f"(bias={config.bias!r}, modules_to_save={shown(config.modules_to_save)}), and "
            "this is none of them. If it was trained, name its module in modules_to_save"
        )
    return Role("saved", name)


def _is_explained(name: str, tensor: Tensor, keys: set[str], config: RandLoraConfig) -> bool:
    """Whether a config, read as PEFT reads it, lets a state-dict key into the file."""
    module, _, leaf = name.rpartition(".")
    biases = {"none": (), "randlora_only": (f"{_ADAPTED}bias",), "all": (".bias",)}[config.bias]
    if f".{name}".endswith(biases):
        return True
    wanted = tuple(config.modules_to_save or ())
    ancestors = module.split(".")
    if wanted and any(
        ".".join(ancestors[:end]).endswith(wanted) for end in range(1, len(ancestors) + 1)
    ):
        return True
    # PEFT adds embeddings and output heads of its own accord, where the vocabulary was resized or
    # the head is adapted: the weight and, if there is one, its bias.
    if leaf == "bias":
        return f"{PREFIX}{module}.weight" in keys
    return leaf == "weight" and len(tensor.shape) == 2


def _check_unique(roles: dict[str, Role], fail: Fail) -> None:
    seen: dict[Role, str] = {}
    for key, role in roles.items():
        if role.part != "repeated" and role in seen:
            fail(f"{shown(seen[role])} and {shown(key)} are the same tensor twice; remove one")
        seen[role] = key


def _check_partners(roles: dict[str, Role], fail: Fail) -> None:
    present = set(roles.values())
    partner = {"lambda": "gamma", "gamma": "lambda", "A": "B", "B": "A"}
    alone = {
        key: partner[role.part]
        for key, role in roles.items()
        if role.part in partner and Role(partner[role.part], role.name) not in present
    }
    for key, part in alone.items():
        others = [other for other in alone if roles[other].part == part]
        renamed = f", or a name was changed, for {listed(others)} is alone, too" if others else ""
        fail(
            f"{shown(key)}: expected randlora_{part} beside it, found none: the file is "
            f"incomplete{renamed}; fetch it again"
        )
    for key, role in roles.items():
        if role.part in BASE_PARTS and role.name and Role("lambda", role.name) not in present:
            fail(
                f"{shown(key)}: expected randlora_lambda and randlora_gamma beside it, found "
                "none: only adapted layers hold copies of the bases. The file is incomplete; "
                "fetch it again"
            )
    _check_adapted(roles, fail)


def _check_adapted(roles: dict[str, Role], fail: Fail) -> None:
    """PEFT finds what else an adapted layer has one level down, and only there."""
    adapted = {role.name for role in roles.values() if role.part == "lambda"}
    for key, role in roles.items():
        module, _, leaf = role.name.rpartition(".")
        layer = module.removesuffix(_ADAPTED[:-1])
        if role.part == "saved" and (layer in adapted) != (layer != module):
            right = f"{layer}.{leaf}" if layer != module else f"{module}{_ADAPTED}{leaf}"
            fail(
                f"{shown(key)}: expected {shown(PREFIX + right)}, since {shown(layer)} is "
                f"{'no' if layer != module else 'an'} adapted layer of this file; PEFT would pass "
                "this tensor over. The file belongs to another config: fetch both again"
            )


def is_path(name: str) -> bool:
    """Whether a module or tensor of that name can be told from the keys of a file."""
    return name.isprintable() and all(name.split(".")) and "randlora_" not in name
