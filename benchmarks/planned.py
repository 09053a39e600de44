"""What XLA plans for a compiled program."""

from __future__ import annotations

import jax


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that there are at once while a program runs; None where XLA does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return given + memory.temp_size_in_bytes - memory.alias_size_in_bytes
