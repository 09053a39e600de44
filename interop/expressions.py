"""Regular expressions that users and files give: sound, or refused in words by whoever asked."""

from __future__ import annotations

import re

# PEFT's forms (tuners/tuners_utils.py) around a name of modules_to_save, which keeps a module from
# being adapted, and around one of layers_pattern.
AT_OR_IN_MODULE = r"(?:.*\.)?{}(?:$|\.)"
LAYER_NUMBER = r"(?:.*?\.)??{}\.(?P<layer>\d+)\."


def fault(expression: str, template: str = "") -> str | None:
    r"""What is wrong with a regular expression, or with a template for what it matches.

    Args:
      template: text with ``\1`` or ``\g<name>`` for the groups of `expression`.

    Returns:
      Python's words; None where both are sound.
    """
    try:
        re.compile(expression).sub(template, "")  # looks the template's groups up in any case
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return None
