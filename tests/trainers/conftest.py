"""One checkpoint for all of them, and flax as google-tunix sets it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def as_tunix_sets_it():
    from tiny_llama import with_tunix

    with with_tunix():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny Llama's checkpoint."""
    from tiny_llama import checkpoint

    return checkpoint(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Nothing here runs long enough to be worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
