"""The recipe file: every number of a training run, read from TOML into typed records."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.train.model import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """What is read, how often, and what is kept away from training."""

    sources: tuple[tuple[str, int], ...]
    held_out: tuple[str, ...]
    validation_books: tuple[str, ...]
    validation_share: float


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser and schedule. Learning rates are peaks; ``progress`` runs from 0 to 1."""

    seed: int
    chunk: int
    chunks_per_step: int
    lengths: tuple[tuple[float, int], ...]
    muon_lr: float
    muon_momentum: float
    muon_weight_decay: float
    adam_lr: float
    adam_betas: tuple[float, float]
    adam_weight_decay: float
    warmup_steps: int
    decay_from: float
    grad_clip: float
    save_seconds: float
    validate_steps: int

    def row_length(self, progress: float) -> int:
        """Return the tokens in a row at a progress (the curriculum of context lengths)."""
        return [length for start, length in self.lengths if progress >= start][-1]

    def lr_scale(self, step: int, progress: float) -> float:
        """Return the factor on the peak rates: linear warm-up, flat, then a line to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = min(1.0, (1.0 - progress) / max(1e-9, 1.0 - self.decay_from))
        return warm * max(0.0, decay)


@dataclass(frozen=True)
class ChatConfig:
    """The chat stage: from when on, and what of a step and of its stream goes to what.

    Attributes:
        from_progress: progress at which the stage begins; it lasts to the end.
        share: of the chunks of each step, those of the chat stream.
        arithmetic: of the tokens of the chat stream, those of sums; the rest is dialogue from the training books.
    """

    from_progress: float
    share: float
    arithmetic: float

    def chunks(self, progress: float, of: int) -> int:
        """Return how many of a step's ``of`` chunks come from the chat stream."""
        return round(of * self.share) if progress >= self.from_progress else 0


@dataclass(frozen=True)
class Recipe:
    """A whole recipe file; without ``chat`` the run reads books to the end."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    chat: ChatConfig | None = None


def _tuples(value: Any) -> Any:
    """Turn TOML lists into tuples, all the way down."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Build a recipe from a parsed TOML document; an unknown or absent field is a TypeError."""
    data = {k: _tuples(v) for k, v in raw["data"].items()}
    data["sources"] = tuple((s["name"], s["repeat"]) for s in raw["data"]["sources"])
    train = {k: _tuples(v) for k, v in raw["train"].items()}
    chat = ChatConfig(**raw["chat"]) if "chat" in raw else None
    return Recipe(DataConfig(**data), ModelConfig(**raw["model"]), TrainConfig(**train), chat)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file."""
    return parse_recipe(tomllib.loads(path.read_text("utf-8")))
