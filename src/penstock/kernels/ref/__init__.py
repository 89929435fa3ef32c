"""The oracle: clear, exact about its order of sums, and slow."""

from penstock.kernels.ref.ops import RefOps

__all__ = ["RefOps"]
