"""Which weights become small integers, and of which format: the loader and the sizes agree by asking here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.base import ConfigError
from penstock.spec.config import EngineConfig
from penstock.spec.model import ModelSpec
from penstock.spec.tensors import slot_segments

Quantization = Literal["none", "int8", "int4"]

VERSION = 4
"""Raised by every change of what a recipe makes of the same weights."""

GROUP = 32
"""Inputs that share a scale: with fewer the scales cost more than they save, with more the error of activations with
outliers grows. Q8_0 and Q4_0 of GGUF have the same."""
LARGER = (64, 128)
"""Other groups that kernels have: 4 bits that are stored so stay so, which saves up to an eighth of their bytes for 2 %
of the divergence. With 8 bits it would save 4 % and double it: activations are coded in the groups of their weights."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Small integers with an fp16 scale for each group of inputs; with 4 bits a uint8 zero too."""

    bits: Literal[4, 8]
    group: int = GROUP

    def bytes(self, rows: int, inputs: int) -> int:
        extra = 2 if self.bits == 8 else 3
        return rows * (inputs * self.bits // 8 + inputs // self.group * extra)


FORMATS: dict[Quantization, WeightFormat | None] = {"none": None, "int8": WeightFormat(8), "int4": WeightFormat(4)}

OUTER = ("embedding", "head")
"""With int4 they have 8 bits: an error of theirs reaches the logits as it is. With 4 they made half of the bundled
model's divergence; GGUF's 4-bit mixtures keep them finer too."""
OUTER_MODULES = ("embed_tokens", "wte", "word_embeddings", "lm_head")

PLAIN = ("router.", "shared.gate.")
"""Linears that stay as they are: a few outputs that decide for whole layers."""


def format_of(spec: ModelSpec, slot: str, inputs: int, quantization: Quantization) -> WeightFormat | None:
    """Of a plain matrix of a slot (``spec.tensors``); None if it stays plain."""
    found = FORMATS["int8" if quantization == "int4" and slot in OUTER else quantization]
    return found if found is not None and may_be_grouped(spec, slot, inputs, found.group) else None


def may_be_grouped(spec: ModelSpec, slot: str, inputs: int, group: int) -> bool:
    """Whether a slot's groups of so many inputs cross no segment of its sums."""
    if slot.startswith(PLAIN) or slot.endswith(".bias"):
        return False
    return inputs % (slot_segments(spec, slot) * group) == 0


def check_formats(config: EngineConfig, backend: str, *, decoder: bool) -> None:
    """Raises ConfigError: (quant_unsupported), (kv_dtype_unsupported) the backend or the model has no such integers."""
    if config.quant != "none" and (backend == "torch" or not decoder):
        raise ConfigError(
            "quant_unsupported",
            f"quant = {config.quant} cannot be used",
            why="backend torch has no kernels for small integers" if decoder else "encoders keep their dtype",
            fix="use backend = cpu or ref, or quant = none" if decoder else "use quant = none",
        )
    if config.kv_dtype == "int8" and backend == "torch" and decoder:
        raise ConfigError(
            "kv_dtype_unsupported",
            "kv_dtype = int8 cannot run on backend = torch",
            why="its attention reads K and V in the dtype of activations only",
            fix="use backend = cpu or ref, or kv_dtype = auto",
        )
