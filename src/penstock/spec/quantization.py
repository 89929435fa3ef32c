"""Which weights become small integers, and of which format: the loader and the sizes agree by asking here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.spec.model import ModelSpec
from penstock.spec.tensors import slot_segments

Quantization = Literal["none", "int8", "int4"]

VERSION = 1
"""Raised by every change of what a recipe makes of the same weights."""

GROUP = 32
"""Inputs that share a scale: with fewer the scales cost more than they save, with more the error of activations with
outliers grows. Q8_0 and Q4_0 of GGUF have the same."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Small integers with an fp16 scale for each group of inputs; with 4 bits a uint8 zero too."""

    bits: Literal[4, 8]
    group: int = GROUP

    def bytes(self, rows: int, inputs: int) -> int:
        extra = 2 if self.bits == 8 else 3
        return rows * (inputs * self.bits // 8 + inputs // self.group * extra)


FORMATS: dict[Quantization, WeightFormat | None] = {"none": None, "int8": WeightFormat(8), "int4": WeightFormat(4)}

PLAIN = ("router.", "shared.gate.")
"""Linears that stay as they are: a few outputs that decide for whole layers."""


def format_of(spec: ModelSpec, slot: str, inputs: int, quantization: Quantization) -> WeightFormat | None:
    """Of a slot's matrix (``spec.tensors``): its groups cross no segment of a sum. None if it stays plain."""
    found = FORMATS[quantization]
    if found is None or slot.startswith(PLAIN) or inputs % (slot_segments(spec, slot) * found.group):
        return None
    return found
