"""torch's own fast operations, on any device torch has."""

from penstock.kernels.torch.ops import TorchOps

__all__ = ["TorchOps"]
