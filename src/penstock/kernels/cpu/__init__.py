"""Native kernels for the processor this runs on, built from csrc/cpu."""

from penstock.kernels.cpu.ops import CpuOps

__all__ = ["CpuOps"]
