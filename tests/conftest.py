"""What every test needs: no network, full-precision products, the same draws at every run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_default_matmul_precision", "highest")

# Compiling takes longer than hypothesis' deadline; a failure must come back at the next run.
settings.register_profile("randlora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("randlora")


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers for one test, the same at every run."""
    return np.random.default_rng(0)
