"""Fields of a configuration file that this library does not know: which may stay, which may not.

PEFT adds fields in later releases, and other programs add their own. What is null, false or empty
asks for nothing. What has a value may mean that the adapter computes something else than PEFT's
RandLoRA does, such as the ``use_dora`` of the method's authors. Nobody can tell from a name alone,
but the names that PEFT's methods and forks use for such things have words in common: these fields
are refused. Any other is kept, written back, and said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from randlora_jax.interop.errors import ConfigError, shown

# Words for how an update is formed or scaled, what it is added to, and what it starts from (PEFT's
# starts change the base model: "pissa", "olora", LoftQ).
_SPEAKS_OF_ARITHMETIC = re.compile(
    # the switches of variants, and the settings that belong to one
    r"^use_|dora|lora|vera|variant|mode$|loftq|corda|eva_config|megatron_config|arrow"
    # how large the update is
    r"|alpha|scal|rank|sqrt|(?<!grad_)norm|magnitude|gain|lambda|gamma|decompos"
    # what it is made of
    r"|bas[ie]s|proj|sparse|sparsity|matri|rotat|orthog|mask|init_|_init|prng"
    # what it is added to, and how
    r"|target|exclude|module|layer|token_ind|invocation|embed|bias|tied|tying|pattern|transpos"
    r"|fan_|merge|gated"
)


def is_neutral(value: Any) -> bool:
    """Whether a field's value asks for nothing: null, false, empty, or made of these alone."""
    if isinstance(value, Mapping):
        return all(map(is_neutral, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_neutral, value))
    return value is None or value is False or value == ""


def refuse_arithmetic(fields: Mapping[str, Any]) -> None:
    """Nothing, if no field that is not known here has a name and a value that change an update.

    Raises:
      ConfigError: one has.
    """
    for name, value in fields.items():
        if _SPEAKS_OF_ARITHMETIC.search(name.lower()) and not is_neutral(value):
            raise ConfigError(
                f"{name if name.isprintable() else shown(name)}: expected null, false or nothing, "
                f"found {shown(value)}. PEFT's RandLoRA has no such field, and by its name it "
                "changes what an adapter computes, in a way that is not known here. Open the "
                "adapter with the program that wrote it, or, if a newer PEFT did, upgrade "
                "randlora-jax; if you know that the field changes nothing, remove it"
            )
