"""What one adapter is: PEFT's RandLoRA fields, and where its random bases come from.

`RandLoraConfig` has the fields, names and defaults of `peft.RandLoraConfig` (PEFT 0.21.2) and
reads and writes PEFT's `adapter_config.json`. It differs in three ways: every field is checked
when the object is made, the object cannot change afterwards and so can be a dictionary key or a
static argument of `jax.jit`, and `projection_source` says where the bases come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from randlora_jax.interop import field_checks as checks
from randlora_jax.interop.adapter_name import expected_directory, saving_folder
from randlora_jax.interop.errors import ConfigError, listed, warn
from randlora_jax.interop.field_checks import Check, refusal
from randlora_jax.interop.field_names import teaching_fields
from randlora_jax.interop.strict_json import JsonObject, dump_object, read_object, thaw, write_text
from randlora_jax.interop.torch_rng import Generation, Kind
from randlora_jax.interop.unknown_fields import is_neutral, refuse_arithmetic

CONFIG_NAME = "adapter_config.json"
PEFT_TYPE = "RANDLORA"
ALL_LINEAR = checks.ALL_LINEAR

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

_TORCH_DRAWS = tuple(f"torch:{generation}" for generation in Generation)


def _checked(default: Any, check: Check) -> Any:
    return field(default=default, metadata={"check": check})


@teaching_fields
@dataclass(frozen=True, kw_only=True)
class RandLoraConfig:
    """One RandLoRA adapter's settings.

    Fields, in PEFT's order and with PEFT's meaning and defaults:

    - r: rank of one random basis pair, at least 1. A layer has ceil(min(in, out) / r) of them, so
      a smaller r trains *more* numbers.
    - target_modules: the layers to adapt. A list of names (each also matches as a suffix after a
      dot), one regular expression (it must match a whole name), "all-linear", or None for the
      defaults of the model type.
    - projection_prng_key: key of the random bases, -2**63 to 2**64 - 1 (what PyTorch accepts).
    - save_projection: whether a saved adapter holds the bases.
    - sparse, very_sparse: ternary bases; with both set PEFT takes very_sparse, and so do we.
    - randlora_dropout: in [0, 1).
    - fan_in_fan_out: kept for PEFT; the layout of a kernel is read from the layer itself.
    - randlora_alpha: above 0; the update is scaled by randlora_alpha / r.
    - bias: "none", "all" or "randlora_only": which biases train.
    - modules_to_save: names of modules trained whole and saved with the adapter.
    - init_weights: False draws lambda at random, instead of starting as the base model.
    - layers_to_transform, layers_pattern: adapt these layer indexes only.
    - task_type, auto_mapping, base_model_name_or_path, revision, inference_mode, peft_version:
      what PEFT records about the model. peft_version is kept when a file has it, never invented.

    And ours, never written into PEFT's file:

    - projection_source: "jax" (drawn from `jax.random`), "torch:<generation>" (PyTorch's own draw
      for the key, as the torch releases of that generation make it; "torch" alone for sparse
      bases, which all draw alike) or "file" (they came with a file, and only that file has them).
    - unknown: fields of a newer PEFT found in a file; kept and written back, not acted on. Such as
      change what an adapter computes are refused (`randlora_jax.interop.unknown_fields`).

    Given by keyword. Lists and sets are stored as tuples (sets sorted, repeats dropped). Warns
    where PEFT would ignore a field.

    Raises:
      ConfigError: naming the field, what was expected, what was found and what to do.
    """

    r: int = _checked(
        32, checks.integer(1, None, "a positive integer", "Smaller values train more numbers.")
    )
    target_modules: str | Collection[str] | None = _checked(
        None, checks.optional(checks.target_modules)
    )
    projection_prng_key: int = _checked(
        0, checks.integer(-(2**63), 2**64 - 1, "an integer from -2**63 to 2**64 - 1", "")
    )
    save_projection: bool = _checked(True, checks.boolean)
    sparse: bool = _checked(False, checks.boolean)
    very_sparse: bool = _checked(False, checks.boolean)
    randlora_dropout: float = _checked(
        0.0, checks.number(lambda p: 0 <= p < 1, "a number in [0, 1)", "At 1 nothing would train.")
    )
    fan_in_fan_out: bool = _checked(False, checks.boolean)
    randlora_alpha: int | float = _checked(
        640,
        checks.number(lambda a: a > 0, "a number above 0", "The update is scaled by alpha / r."),
    )
    bias: str = _checked("none", checks.one_of("none", "all", "randlora_only"))
    modules_to_save: Collection[str] | None = _checked(
        None, checks.optional(checks.modules_to_save)
    )
    init_weights: bool = _checked(True, checks.boolean)
    layers_to_transform: int | Collection[int] | None = _checked(
        None, checks.optional(checks.layers_to_transform)
    )
    layers_pattern: str | Collection[str] | None = _checked(
        None, checks.optional(checks.layers_pattern)
    )
    task_type: str | None = _checked(
        None, checks.optional(checks.one_of(*TASK_TYPES, note=" or None"))
    )
    auto_mapping: Mapping[str, Any] | None = _checked(None, checks.optional(checks.json_object))
    base_model_name_or_path: str | None = _checked(None, checks.optional(checks.text))
    revision: str | None = _checked(None, checks.optional(checks.text))
    inference_mode: bool = _checked(False, checks.boolean)
    peft_version: str | None = _checked(None, checks.optional(checks.text))
    projection_source: str = _checked("jax", checks.one_of("jax", "file", "torch", *_TORCH_DRAWS))
    unknown: Mapping[str, Any] = _checked(JsonObject({}), checks.json_object)

    def __post_init__(self) -> None:
        for item in fields(self):
            stored = item.metadata["check"](item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, stored)
        clash = sorted(self.unknown.keys() & {*_FILE_FIELDS, "peft_type"})
        if clash:
            raise refusal("unknown", "only fields this version does not know", clash)
        refuse_arithmetic(self.unknown)
        self._check_bases_survive_saving()
        self._warn_of_ignored_layers()

    def _check_bases_survive_saving(self) -> None:
        if self.save_projection or self.projection_source.startswith("torch"):
            return
        reason = {
            "jax": "PyTorch cannot draw JAX's bases again",
            "file": "nothing can draw bases again that came with a file",
        }[self.projection_source]
        raise ConfigError(
            "save_projection: expected True with "
            f"projection_source={self.projection_source!r}, found False. An adapter saved without "
            f"its bases could not be opened: {reason}. Keep save_projection=True, or choose "
            "projection_source='torch:...' (bases that PyTorch draws from the key)."
        )

    def _warn_of_ignored_layers(self) -> None:
        if self.layers_to_transform in (None, ()):
            if self.layers_pattern not in (None, "", ()):
                _warn("layers_pattern is ignored, as in PEFT: it needs layers_to_transform.")
        elif isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            _warn(
                "layers_to_transform is ignored, as in PEFT, because target_modules is a regular "
                "expression. Put the layer indexes into the expression."
            )

    @property
    def peft_type(self) -> str:
        """PEFT's name of this method, "RANDLORA"."""
        return PEFT_TYPE

    @property
    def scaling(self) -> float:
        """The factor alpha / r on every update."""
        return self.randlora_alpha / self.r

    @property
    def torch_generation(self) -> str | None:
        """Which draw of PyTorch's `projection_source` names, None if it names none."""
        return self.projection_source.partition(":")[2] or None

    @property
    def kind(self) -> Kind:
        """How the bases are distributed: "dense", "sparse" or "very_sparse"."""
        return "very_sparse" if self.very_sparse else "sparse" if self.sparse else "dense"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of PEFT's file: lists for tuples, unknown fields included.

        A peft_version of None is left out: PEFT 0.16 warns about the field, later releases do not
        need it.
        """
        result = {name: thaw(getattr(self, name)) for name in _FILE_FIELDS}
        if self.peft_version is None:
            del result["peft_version"]
        return result | {"peft_type": PEFT_TYPE} | thaw(self.unknown)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RandLoraConfig:
        """The configuration in PEFT's JSON object `values`; missing fields take their defaults.

        projection_source becomes "file", or "torch" where save_projection is False: what PEFT
        takes the bases from. Unknown fields are kept, and those that ask for anything reported by
        one warning.

        Raises:
          ConfigError: a field is wrong or not known here and, by its name, changes what an adapter
            computes (`unknown_fields`); or the configuration is another method's.
        """
        if not isinstance(values, Mapping):
            raise refusal("adapter configuration", "a JSON object (a dict)", values)
        settings = {name: value for name, value in values.items() if name in _FILE_FIELDS}
        unknown = {name: value for name, value in values.items() if name not in _FILE_FIELDS}
        method = unknown.pop("peft_type", None)
        if isinstance(method, Enum):
            method = method.value
        if not isinstance(method, str) or method != PEFT_TYPE:
            raise refusal("peft_type", repr(PEFT_TYPE), method, "Only RandLoRA adapters open.")
        source = "torch" if settings.get("save_projection") is False else "file"
        config = cls(**settings, projection_source=source, unknown=unknown)
        asking = sorted(name for name, value in unknown.items() if not is_neutral(value))
        if asking:
            _warn(
                f"unknown fields {listed(asking)}: kept and written back, but not acted on. The "
                "configuration may come from a newer PEFT."
            )
        return config

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `adapter_config.json` into `directory`, made if missing; whole or not at all.

        The key is written as it stands: a caller that saves bases other than PyTorch's for this
        key must replace it first, since PEFT takes equal keys for equal bases.

        Raises:
          AdapterFileError: `directory` is a file, or no path.
        """
        folder = saving_folder(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG_NAME, dump_object(self.to_dict()))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RandLoraConfig:
        """Read `adapter_config.json` in `directory`, as `from_dict` does.

        Raises:
          AdapterFileError: the file is missing or not a proper JSON object.
          ConfigError: a field is wrong; names the file too.
        """
        path = expected_directory(directory) / CONFIG_NAME
        values = read_object(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def expected_config(value: object) -> RandLoraConfig:
    """`value`, which must be a RandLoraConfig.

    Raises:
      ConfigError: it is something else: a dict of settings, another library's configuration.
    """
    if isinstance(value, RandLoraConfig):
        return value
    remedy = "Make one: RandLoraConfig(r=16, target_modules='all-linear')."
    if isinstance(value, Mapping):
        remedy = (
            "RandLoraConfig(**settings) makes one of a dict, RandLoraConfig.from_dict of what "
            "PEFT's file holds."
        )
    elif hasattr(value, "peft_type") and not isinstance(value, type):
        remedy = (
            "dataclasses.replace(RandLoraConfig.from_dict(config.to_dict()), "
            "projection_source='jax') makes one of PEFT's own RandLoraConfig."
        )
    raise refusal("config", "a RandLoraConfig", value, remedy)


_FILE_FIELDS = tuple(
    item.name
    for item in fields(RandLoraConfig)
    if item.name not in ("projection_source", "unknown")
)


def _warn(message: str) -> None:
    warn(f"RandLoraConfig: {message}")
