"""The ``randlora-jax`` command."""
