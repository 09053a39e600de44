"""Other people's models, rebuilt small: their paths, shapes, einsums, scans and boxes."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Nothing here runs long enough to be worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
