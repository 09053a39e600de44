"""The ``randlora-jax`` command: adapter files, for people who may never train in JAX.

Every command is a module of `randlora_jax.commands` (see its `report` module for what such a
module must have). Describing the commands, and those that only handle adapter files, import
neither jax nor torch nor transformers. This module imports next to nothing: until `main` runs
nobody answers Ctrl-C.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in typing, which takes a while to import
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from randlora_jax.commands.interrupts import leaving_at_once

        with leaving_at_once(arguments):
            from randlora_jax.commands.command_line import parser, run

            commands = parser()
        return run(commands, arguments)
    except KeyboardInterrupt:
        from randlora_jax.commands.interrupts import tell_of_interrupt

        return tell_of_interrupt(arguments)


if __name__ == "__main__":
    sys.exit(main())
