"""The draw: from rows of logits to one token each, a row's result depending on that row and its request alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.base import EngineError, PenstockError
from penstock.core.plan import NewRequest
from penstock.sampling import candidates, exact, gumbel, philox
from penstock.sampling.candidates import Filters
from penstock.sampling.logprobs import RawLogprobs, raw_logprobs
from penstock.sampling.rules import LogitsRule, make_rules

Ints = npt.NDArray[np.int64]

NUMERICAL, MASKED = -1, -2
"""In place of a token: the model's logits were not finite; the request's rules left no token."""


@dataclass(slots=True)
class Drawn:
    """What a step drew, on the device.

    Attributes:
        tokens_R: int64, drawn tokens; 0 where there is none.
        codes_R: int64, drawn tokens; NUMERICAL or MASKED where there is none.
        logprobs: of the rows that asked.
    """

    tokens_R: Tensor
    codes_R: Tensor
    logprobs: RawLogprobs | None


class Sampler:
    """Draws tokens. Keeps each request's parameters and counts at the row the runner gave it.

    Args:
        rows: how many there are.
        chunk: logits of drawing rows looked at together; sets the speed and the memory taken, not the outcome.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device, chunk: int = 1 << 17) -> None:
        self.vocab_size, self.device, self.chunk = vocab_size, device, chunk
        self.temperature, self.min_gap, self.top_p = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self.top_k, self.logprobs = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.streams = np.zeros((rows, 4), np.int64)
        self.rules: list[tuple[LogitsRule, ...]] = [()] * rows
        self.ruled = np.zeros(rows, bool)

    def place(self, row: int, request: NewRequest) -> None:
        """Puts a request at a row, its state rebuilt from its tokens."""
        params, vocab_size = request.params, self.vocab_size
        self.temperature[row] = params.temperature
        self.min_gap[row] = _log(params.min_p) if params.min_p > 0.0 else -np.inf
        self.top_p[row] = params.top_p if params.top_p < 1.0 else np.inf
        self.top_k[row] = params.top_k if 0 < params.top_k < vocab_size else vocab_size
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.streams[row] = (*philox.words(request.seed), request.sample)
        self.rules[row] = make_rules(request, vocab_size, self.device)
        self.ruled[row] = bool(self.rules[row])

    def draw(self, logits_RV: Tensor, rows: Ints, positions: Ints) -> Drawn:
        """Draws a token for each row of float32 logits, which rules change in place.

        Args:
            rows: where each request was placed.
            positions: where each drawn token will stand: the number of tokens known before it.
        """
        asked = np.flatnonzero(self.logprobs[rows] >= 0)
        raw_LV = logits_RV[self._put(asked)] if asked.size else None
        best_R, tokens_R = logits_RV.max(dim=1)  # of equal values the first, so the lowest id
        sound_R = best_R.isfinite() & logits_RV.amin(dim=1).isfinite()
        ruled = np.flatnonzero(self.ruled[rows]).tolist()
        if ruled:
            for r in ruled:
                for rule in self.rules[rows[r]]:
                    rule.apply(logits_RV[r], int(positions[r]))
            best_R, tokens_R = logits_RV.max(dim=1)
        codes_R = tokens_R.masked_fill_(best_R == -torch.inf, MASKED)
        random = np.flatnonzero(self.temperature[rows] > 0.0)
        if random.size:
            codes_R[self._put(random)] = self._draw_random(logits_RV, random, rows[random], positions[random])
        codes_R.masked_fill_(~sound_R, NUMERICAL)
        tokens_R = codes_R.clamp(min=0)
        for r in ruled:
            for rule in self.rules[rows[r]]:
                rule.append(tokens_R[r : r + 1])
        logprobs = None if raw_LV is None else self._logprobs(raw_LV, tokens_R[self._put(asked)], asked, rows[asked])
        return Drawn(tokens_R, codes_R, logprobs)

    def _logprobs(self, raw_LV: Tensor, tokens_L: Tensor, at: Ints, rows: Ints) -> RawLogprobs:
        counts = np.minimum(self.logprobs[rows], self.vocab_size)
        parts = [raw_logprobs(raw_LV[p], tokens_L[p], int(counts.max())) for p in self._parts(len(at))]
        drawn_L, ranks_L, top_ids_LK, top_LK = map(torch.cat, zip(*parts, strict=True))
        return RawLogprobs(at.tolist(), counts.tolist(), (drawn_L, ranks_L, top_ids_LK, top_LK))

    def _draw_random(self, logits_RV: Tensor, at: Ints, rows: Ints, positions: Ints) -> Tensor:
        """Draws for the rows ``at`` of the logits, whose requests are placed at ``rows``."""
        sites_R5 = self._put(np.concatenate([self.streams[rows], positions[:, None]], axis=1))
        sorting = (self.top_k[rows] < self.vocab_size) | (self.top_p[rows] < 1.0)
        entrants = []
        for ordered in np.unique(sorting).tolist():
            group = np.flatnonzero(sorting == ordered)
            for part in self._parts(group.size):
                some, filters = self._put(group[part]), self._filters(rows[group[part]])
                logits_rV, sites_r5 = logits_RV[self._put(at[group[part]])], sites_R5[some]
                if ordered:
                    found = gumbel.finalists(candidates.sorted_candidates(logits_rV, filters), sites_r5)
                else:
                    found = gumbel.open_finalists(logits_rV, filters, sites_r5)
                entrants.append((some[found[0]], *found[1:]))
        return gumbel.winners(entrants, len(rows), MASKED)

    def _parts(self, rows: int) -> list[slice]:
        height = max(1, self.chunk // self.vocab_size)
        return [slice(start, start + height) for start in range(0, rows, height)]

    def _filters(self, rows: Ints) -> Filters:
        columns = (self.temperature, self.min_gap, self.top_k, self.top_p)
        return Filters(*(self._put(column[rows, None]) for column in columns))

    def _put(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def draw_error(code: int, position: int) -> PenstockError:
    """Why a row has no token, from its code."""
    if code == MASKED:
        return EngineError(
            "no_token_left",
            "The request's rules forbid every token",
            why=f"all logits are -inf at position {position}",
            fix="loosen logit_bias or min_tokens",
        )
    return EngineError(
        "numerical_error",
        "The model's logits are not finite",
        why=f"NaN or infinity at position {position}",
        fix="check the checkpoint, or try dtype float32",
    )


def _log(value: float) -> float:
    """Our own logarithm, since the library's may differ between machines."""
    return float(exact.log(torch.tensor(value, dtype=torch.float64)))
