"""Vocabulary: the few facts about a tokenizer that the brain needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Attributes:
    size: number of logits; ids are in [0, size).
    eos_ids: ids that end a sequence unless ``ignore_eos``.
    bos_id: id put before a prompt, None if the model has none.
    """

    size: int
    eos_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
