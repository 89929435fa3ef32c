"""The resumable training loop.

A checkpoint is one safetensors file (weights, optimiser moments) whose metadata holds the
position as JSON; it is written beside its final name and renamed, so that a run that dies
leaves the last whole one. Data order, schedule and position are functions of that state alone.
"""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from penstock.train.data import Chunks, Ids, split_rows
from penstock.train.evaluate import score_ids
from penstock.train.model import Llama, fast_dtype
from penstock.train.optim import AdamW, Muon
from penstock.train.recipe import Recipe

#: A step that took longer than this was paused from outside; only so much counts as work.
STEP_CAP_SECONDS = 30.0
CONTROL_EVERY_STEPS = 50
LOG_EVERY_STEPS = 10
COLUMNS = ("step", "tokens", "seconds", "progress", "length", "lr_scale", "loss", "validation_bpb")


@dataclass
class Position:
    """Where a run stands: what a checkpoint stores besides tensors. What an older one lacks is at its default.

    Attributes:
        chunks, chat_chunks: chunks read of the book streams and of the chat stream.
    """

    step: int = 0
    chunks: int = 0
    chat_chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    progress: float = 0.0


class Budget(Protocol):
    """Decides how far a step moves the progress of the run towards 1."""

    def advance(self, position: Position, step_seconds: float) -> float:
        """Return the progress after a step that took ``step_seconds``."""
        ...


@dataclass(frozen=True)
class StepBudget:
    """A fixed number of steps: exactly reproducible."""

    steps: int

    def advance(self, position: Position, step_seconds: float) -> float:
        return position.step / self.steps


class ClockBudget:
    """Ends at a time of day (UTC) read from a control file ``end_at: HH:MM``.

    Each step takes its share of the time that is left, so that progress reaches 1 at the end
    time whatever the speed was, pauses included, and the end can be moved while the run goes on.
    """

    def __init__(self, control: Path) -> None:
        self.control = control
        self.end = self._read()

    def _read(self) -> datetime:
        """Return the end time; a time of day more than an hour past means tomorrow's."""
        fields = dict(line.split(":", 1) for line in self.control.read_text("utf-8").splitlines() if ":" in line)
        hour, minute = (int(v) for v in fields["end_at"].strip().split(":"))
        now = datetime.now(UTC)
        end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return end if end > now - timedelta(hours=1) else end + timedelta(days=1)

    def advance(self, position: Position, step_seconds: float) -> float:
        """Return the progress, re-reading the control file every so many steps."""
        if position.step % CONTROL_EVERY_STEPS == 0:
            self.end = self._read()
        left = (self.end - datetime.now(UTC)).total_seconds()
        if left <= 0.0:
            return 1.0
        share = step_seconds / (left + step_seconds)
        return position.progress + (1.0 - position.progress) * share


class Trainer:
    """Model, optimisers, data and position of one run.

    Args:
        dtype: of the forward and backward passes; by default what the device is fast at.
        chat: the chat stream, if the recipe has a chat stage.

    Raises:
        ValueError: the recipe has a chat stage and there is no chat stream.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Chunks,
        dtype: torch.dtype | None = None,
        chat: Chunks | None = None,
        device: torch.device | None = None,
    ) -> None:
        if recipe.chat is not None and chat is None:
            raise ValueError("the recipe has a chat stage, but there is no chat stream")
        self.recipe, self.cfg = recipe, recipe.train
        self.data, self.chat, self.position = data, chat, Position()
        device = device or torch.device("cpu")
        self.model = Llama(recipe.model, dtype or fast_dtype(device))
        self.model.init_weights(recipe.train.seed)  # drawn on the CPU: the same on every device
        self.model.to(device)
        params = dict(self.model.named_parameters())
        inner = {k: p for k, p in params.items() if p.ndim == 2 and "embed" not in k}
        self.muon = Muon(inner.values(), self.cfg.muon_momentum, self.cfg.muon_weight_decay)
        self.adam = AdamW(
            [p for k, p in params.items() if k not in inner],
            self.cfg.adam_betas,
            self.cfg.adam_weight_decay,
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint and rename it into place."""
        tensors = {f"model.{k}": v.detach() for k, v in self.model.named_parameters()}
        tensors.update(self.muon.state())
        tensors.update(self.adam.state())
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"position": json.dumps(asdict(self.position))})
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`."""
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.position = Position(**json.loads(file.metadata()["position"]))
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state[f"model.{name}"])
        self.muon.load_state(state)
        self.adam.load_state(state)

    def go_on_from(self, model: Llama, step: int, progress: float) -> None:
        """Take the weights of a model that such a run has brought to ``step``. Its moments are lost and start at zero."""
        self.model.load_state_dict(model.state_dict())
        every = self.cfg.chunks_per_step
        self.position = Position(step, step * every, tokens=step * every * self.cfg.chunk, progress=progress)

    def step(self) -> tuple[float, int, float]:
        """Take one optimiser step; return (loss in nats per token, row length, rate factor)."""
        cfg, at = self.cfg, self.position
        length = cfg.row_length(at.progress)
        x_BT, y_BT = split_rows(self._next_chunks(), length)
        device = self.model.device
        loss = self.model.loss(torch.from_numpy(x_BT).to(device), torch.from_numpy(y_BT).to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        scale = cfg.lr_scale(at.step, at.progress)
        self.muon.step(cfg.muon_lr * scale)
        self.adam.step(cfg.adam_lr * scale)
        for p in self.model.parameters():
            p.grad = None
        at.step += 1
        at.tokens += x_BT.size
        return float(loss.detach()), length, scale

    def _next_chunks(self) -> Ids:
        """Return the chunks of a step [C, chunk + 1]: of the books, and in the chat stage of the chat stream too."""
        at, every = self.position, self.cfg.chunks_per_step
        of_chat = self.recipe.chat.chunks(at.progress, every) if self.recipe.chat else 0
        parts = []
        if of_chat < every:
            parts.append(next(self.data.batches(at.chunks, every - of_chat)))
        if of_chat:
            assert self.chat is not None  # __init__ made sure
            parts.append(next(self.chat.batches(at.chat_chunks, of_chat)))
        at.chunks += every - of_chat
        at.chat_chunks += of_chat
        return np.concatenate(parts)


@dataclass(frozen=True)
class Validation:
    """Tokens and size of the validation text."""

    ids: list[int]
    text_bytes: int

    def bits_per_byte(self, model: Llama, window: int) -> float:
        """Score with windows side by side (cheaper and slightly worse than the final score)."""
        return score_ids(model, self.ids, window, window) / math.log(2.0) / self.text_bytes


def run(trainer: Trainer, budget: Budget, folder: Path, validation: Validation | None = None) -> None:
    """Train until the budget is spent; log to ``curve.csv`` and save to ``checkpoint.safetensors``."""
    cfg, at = trainer.cfg, trainer.position
    curve, checkpoint = folder / "curve.csv", folder / "checkpoint.safetensors"
    if not curve.exists():
        _append(curve, COLUMNS)
    losses: list[float] = []
    last_save = time.monotonic()
    while at.progress < 1.0:
        began = time.monotonic()
        loss, length, scale = trainer.step()
        losses.append(loss)
        spent = min(time.monotonic() - began, STEP_CAP_SECONDS)
        at.seconds += spent
        at.progress = budget.advance(at, spent)
        check = at.step % cfg.validate_steps == 0 or at.progress >= 1.0
        if at.step % LOG_EVERY_STEPS == 0 or check:
            score = ""
            if check and validation is not None:
                window = trainer.model.cfg.max_position_embeddings
                score = f"{validation.bits_per_byte(trainer.model, window):.4f}"
            mean = sum(losses) / len(losses)
            row = (at.step, at.tokens, f"{at.seconds:.1f}", f"{at.progress:.5f}", length)
            _append(curve, (*row, f"{scale:.4f}", f"{mean:.4f}", score))
            losses.clear()
        if time.monotonic() - last_save > cfg.save_seconds or at.progress >= 1.0:
            trainer.save(checkpoint)
            last_save = time.monotonic()


def _append(path: Path, row: tuple[object, ...]) -> None:
    """Append one row to a CSV file, closed at once so that readers see it."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
