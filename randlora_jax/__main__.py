"""``python -m randlora_jax`` is the command ``randlora-jax``."""

import sys

from randlora_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
