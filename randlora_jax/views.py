"""`View`, the former name of `KernelLayout`: a kernel of any rank as (in, out) matrices."""

from randlora_jax.core.kernel_layout import KernelLayout

View = KernelLayout

__all__ = ["View"]
