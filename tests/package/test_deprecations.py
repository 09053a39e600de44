"""A call of ours that jax, flax or NumPy has deprecated fails the test that makes it."""

import warnings

import pytest


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning])
def test_ours_is_an_error_and_anothers_is_not(kind):
    def warned(module):
        warnings.warn_explicit(f"{module} is old", kind, f"{module}.py", 1, module=module)

    for ours in ("randlora_jax", "randlora_jax.core.update", "randlora_jax.interop.keys"):
        with pytest.raises(kind):
            warned(ours)
    with pytest.warns(kind, match="flax"):
        warned("flax.nnx")
