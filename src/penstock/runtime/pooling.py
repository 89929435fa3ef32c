"""What a step tells besides tokens: vectors pooled from hidden states, and the log-probabilities of prompts.

Both read final hidden states (after the last norm) of rows that no draw needs. Bits must not depend on how a request
was cut into slices: a mean is summed row after row in float64, and prompt rows go through the logits op and the
log-softmax one by one, however many are computed together (ONE_ANSWER rule 15).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.base import EngineError, PenstockError
from penstock.core.plan import NewRequest, Slice, StepResult
from penstock.runtime.memory import HostCopy
from penstock.sampling import RawLogprobs, draw_error
from penstock.sampling.logprobs import raw_logprobs
from penstock.sampling.sampler import NUMERICAL
from penstock.spec import TokenLogprobs

LOGIT_ROWS = 64
"""Prompt rows that go through the logits op together, at most (rule 15)."""


class Vector:
    """A vector in the making: rows come in order of position, over one step or several.

    Args:
        task: "mean", "last" or "cls" (``core.service.Task``).
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.rows = 0
        self._value: npt.NDArray[np.float64] | None = None

    def wanted(self, start: int, count: int, length: int) -> range:
        """Positions of a slice whose hidden states it needs, of a request of ``length`` tokens."""
        if self.task == "mean":
            return range(start, start + count)
        position = 0 if self.task == "cls" else length - 1
        return range(position, position + 1) if start <= position < start + count else range(0)

    def add(self, rows_TD: npt.NDArray[np.float32]) -> None:
        if self._value is None:
            self._value = np.zeros(rows_TD.shape[1])
        with np.errstate(invalid="ignore"):  # infinities of both signs: ``finish`` finds what becomes of them
            for row_D in rows_TD.astype(np.float64):
                self._value += row_D
        self.rows += len(rows_TD)

    def finish(self, length: int) -> tuple[float, ...]:
        """The vector, rounded once to fp32 values.

        Raises:
            EngineError: (pooling_incomplete) positions are missing, by a fault of whoever planned; (numerical_error).
        """
        if self._value is None or self.rows != (length if self.task == "mean" else 1):
            raise EngineError(
                "pooling_incomplete",
                "A vector cannot be made of part of its positions",
                why=f"{self.rows} hidden states of {length} tokens are there, pooled by {self.task}",
                fix="report this",
            )
        value_D = self._value / self.rows
        if not np.isfinite(value_D).all():
            raise EngineError(
                "numerical_error",
                "The model's hidden states are not finite",
                why=f"NaN or infinity among those of {length} tokens",
                fix="check the checkpoint, or try dtype float32",
            )
        return tuple(value_D.astype(np.float32).tolist())


@dataclass(slots=True)
class VectorRows:
    """Rows of a step that one slice adds to its request's vector. ``length`` is set if that completes it."""

    slice: int
    vector: Vector
    count: int
    length: int | None

    def add(self, rows_TD: npt.NDArray[np.float32], result: StepResult) -> None:
        self.vector.add(rows_TD)
        if self.length is not None:
            try:
                result.vectors[self.slice] = self.vector.finish(self.length)
            except PenstockError as error:
                result.failed[self.slice] = error


@dataclass(slots=True)
class PromptRows:
    """Rows of a step after each of which stands a token of a prompt: positions ``first`` on. ``top`` likeliest tokens
    are told of each."""

    slice: int
    first: int
    tokens: tuple[int, ...]
    top: int


@dataclass(slots=True)
class Extras:
    """What a step's slices want besides draws.

    Attributes:
        rows: rows of the step whose final hidden states are needed, those of ``vectors`` first.
    """

    rows: list[int] = field(default_factory=list)
    vectors: list[VectorRows] = field(default_factory=list)
    prompts: list[PromptRows] = field(default_factory=list)
    hidden: HostCopy | None = None
    logprobs: RawLogprobs | None = None
    columns: HostCopy | None = None

    def tell(self, result: StepResult) -> None:
        """Waits for what was computed and adds it to the step's result. Call in the order of the steps."""
        if self.hidden is not None:
            rows_TD, start = self.hidden.wait()[0].numpy(), 0
            for part in self.vectors:
                part.add(rows_TD[start : start + part.count], result)
                start += part.count
        if self.columns is not None and self.logprobs is not None:
            sound_L, *columns = self.columns.wait()
            self._tell_prompts(sound_L.tolist(), self.logprobs.entries(columns), result)

    def _tell_prompts(self, sound: list[bool], entries: dict[int, TokenLogprobs], result: StepResult) -> None:
        row = 0
        for part in self.prompts:
            rows = range(row, row + len(part.tokens))
            row = rows.stop
            if bad := [r for r in rows if not sound[r]]:
                result.failed[part.slice] = draw_error(NUMERICAL, part.first + 1 + bad[0] - rows.start)
            else:
                result.prompt_logprobs[part.slice] = tuple(entries[r] for r in rows)


class Reporter:
    """Knows which requests want more than tokens, and answers them.

    Args:
        logits: final hidden states to fp32 logits (``Decoder.logits``).
        chunk: logits looked at together; sets the memory taken, not the outcome.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], vocab_size: int, chunk: int) -> None:
        self.logits, self.vocab_size = logits, vocab_size
        self.height = max(1, chunk // vocab_size)
        self._vectors: dict[int, tuple[Vector, int]] = {}
        self._prompts: dict[int, NewRequest] = {}

    def forget(self, request: int) -> None:
        self._vectors.pop(request, None)
        self._prompts.pop(request, None)

    def place(self, request: NewRequest) -> None:
        """Takes a request in, or starts it anew."""
        if request.task != "generate":
            self._vectors[request.id] = Vector(request.task), len(request.tokens)
        elif request.prompt_logprobs is not None:
            self._prompts[request.id] = request

    def wanted(self, slices: Sequence[Slice], row_starts: Sequence[int]) -> Extras | None:
        """What these slices want, None if nothing."""
        if not self._vectors and not self._prompts:
            return None
        extras, prompt_rows = Extras(), list[int]()
        for index, (id, start, count) in enumerate(slices):
            offset = row_starts[index] - start
            if id in self._vectors:
                vector, length = self._vectors[id]
                positions = vector.wanted(start, count, length)
                completes = length if start + count == length else None
                if positions or completes:
                    extras.vectors.append(VectorRows(index, vector, len(positions), completes))
                    extras.rows += [offset + position for position in positions]
            elif (request := self._prompts.get(id)) is not None:
                end = min(start + count, request.prompt_len - 1)
                if start < end:
                    asked = request.prompt_logprobs or 0
                    top = min(asked, self.vocab_size) if asked >= 0 else self.vocab_size
                    extras.prompts.append(PromptRows(index, start, request.tokens[start + 1 : end + 1], top))
                    prompt_rows += range(offset + start, offset + end)
        extras.rows += prompt_rows
        return extras if extras.vectors or extras.prompts else None

    def compute(self, extras: Extras, hidden_TD: Tensor) -> None:
        """Starts what is left to compute, on the hidden states of ``extras.rows``."""
        pooled = sum(part.count for part in extras.vectors)
        if extras.vectors:
            extras.hidden = HostCopy([hidden_TD[:pooled].float()])
        if extras.prompts:
            parts = extras.prompts
            tokens_L = torch.tensor([t for part in parts for t in part.tokens], device=hidden_TD.device)
            counts = [part.top for part in parts for _ in part.tokens]
            sound_L, *columns = self._prompt_logprobs(hidden_TD[pooled:], tokens_L, max(counts))
            drawn_L, ranks_L, top_ids_LK, top_LK = columns
            extras.logprobs = RawLogprobs(list(range(len(counts))), counts, (drawn_L, ranks_L, top_ids_LK, top_LK))
            extras.columns = HostCopy([sound_L, *columns])

    def _prompt_logprobs(self, hidden_LD: Tensor, tokens_L: Tensor, top: int) -> list[Tensor]:
        """Whether each row is finite, then the columns of its log-probabilities."""
        found = []
        for chunk_lD, tokens_l in zip(
            torch.split(hidden_LD, LOGIT_ROWS), torch.split(tokens_L, LOGIT_ROWS), strict=True
        ):
            logits_lV = self.logits(chunk_lD)
            for part_V, tokens in zip(
                torch.split(logits_lV, self.height), torch.split(tokens_l, self.height), strict=True
            ):
                sound = part_V.amax(dim=1).isfinite() & part_V.amin(dim=1).isfinite()
                found.append((sound, *raw_logprobs(part_V, tokens, top)))
        return [torch.cat(column) for column in zip(*found, strict=True)]
