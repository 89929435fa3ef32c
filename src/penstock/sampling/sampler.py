"""The draw: from rows of logits to one token each, a row's result depending on that row and its request alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.base import EngineError, PenstockError
from penstock.core.plan import NewRequest
from penstock.kernels import UNDECIDED, Draw
from penstock.sampling import blocks, candidates, exact, gumbel, philox
from penstock.sampling.candidates import Candidates, Filters
from penstock.sampling.logprobs import RawLogprobs, raw_logprobs
from penstock.sampling.rules import LogitsRule, RuleKit, VettingRule, make_rules

Ints = npt.NDArray[np.int64]

NUMERICAL, MASKED, FAILED, UNSOUND = -1, -2, -3, -4
"""In place of a token: the model's logits were not finite; the request's rules left no token; a rule raised; rules made
a logit NaN or infinite."""

RANDOM, LIMITED, ORDERED, TYPICAL = 1, 2, 4, 8
"""What a request's draw takes, added up: noise; min_p; top_k or top_p; typical_p. 0 is greedy."""


@dataclass(slots=True)
class Drawn:
    """What a step drew, on the device.

    Attributes:
        tokens_R: int64, drawn tokens; 0 where there is none.
        codes_R: int64, drawn tokens; NUMERICAL, MASKED, FAILED or UNSOUND where there is none.
        logprobs: of the rows that asked.
        errors: why rows are FAILED.
    """

    tokens_R: Tensor
    codes_R: Tensor
    logprobs: RawLogprobs | None
    errors: dict[int, PenstockError]


class Sampler:
    """Draws tokens. Keeps each request's parameters and counts at the row the runner gave it.

    Args:
        rows: how many there are.
        chunk: logits of drawing rows looked at together; sets the speed and the memory taken, not the outcome.
        kit: what rules are made of beyond the parameters of requests.
        kernel: ``Ops.draw`` of a backend; the outcome is the same.
    """

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        device: torch.device,
        chunk: int = 1 << 17,
        kit: RuleKit | None = None,
        kernel: Draw | None = None,
    ) -> None:
        self.kernel = kernel
        self.vocab_size, self.device, self.chunk, self.kit = vocab_size, device, chunk, kit or RuleKit()
        self.temperature, self.min_gap, self.top_p = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self.typical_p = np.zeros(rows)
        self.limits = np.zeros((rows, 5))  # what the kernel takes of these
        self.top_k, self.logprobs = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.kind = np.zeros(rows, np.int64)
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
        self.typical_p[row] = params.typical_p
        steps = {
            RANDOM: not params.greedy,
            LIMITED: params.min_p > 0.0,
            ORDERED: self.top_k[row] < vocab_size or params.top_p < 1.0,
            TYPICAL: params.typical_p < 1.0,
        }
        self.kind[row] = 0 if params.greedy else sum(step for step, taken in steps.items() if taken)
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs if params.logprobs >= 0 else vocab_size
        self.streams[row] = (*philox.words(request.seed), request.sample)
        self.rules[row] = make_rules(request, vocab_size, self.device, self.kit)
        self.ruled[row] = bool(self.rules[row])
        filters = (self.min_gap[row], self.top_p[row], self.top_k[row])
        self.limits[row] = (0.0 if params.greedy else params.temperature, *filters, self.ruled[row])

    def draw(self, logits_RV: Tensor, rows: Ints, positions: Ints) -> Drawn:
        """Draws a token for each row of float32 logits, which rules change in place.

        Args:
            rows: where each request was placed.
            positions: where each drawn token will stand: the number of tokens known before it.
        """
        asked = np.flatnonzero(self.logprobs[rows] >= 0)
        raw_LV = logits_RV[self._put(asked)] if asked.size else None
        ruled, errors = np.flatnonzero(self.ruled[rows]), dict[int, PenstockError]()
        if ruled.size:
            some = self._put(ruled)
            sound_r = logits_RV[some].isfinite().all(dim=1)
            errors = self._apply_rules(logits_RV, ruled.tolist(), rows, positions)
        codes_R = self._choose(logits_RV, rows, positions)
        for r in ruled.tolist():
            if r not in errors:
                self._vet(logits_RV, codes_R, r, rows, positions)
        if ruled.size:
            codes_R[some] = codes_R[some].masked_fill_(~sound_r, NUMERICAL)
        if errors:
            codes_R[self._put(np.array(list(errors)))] = FAILED
        tokens_R = codes_R.clamp(min=0)
        for r in ruled.tolist():
            for rule in self.rules[rows[r]]:
                rule.append(tokens_R[r : r + 1])
        logprobs = None if raw_LV is None else self._logprobs(raw_LV, tokens_R[self._put(asked)], asked, rows[asked])
        return Drawn(tokens_R, codes_R, logprobs, errors)

    def _apply_rules(
        self, logits_RV: Tensor, ruled: list[int], rows: Ints, positions: Ints
    ) -> dict[int, PenstockError]:
        errors = {}
        for r in ruled:
            try:
                for rule in self.rules[rows[r]]:
                    rule.apply(logits_RV[r], int(positions[r]))
            except PenstockError as error:
                errors[r] = error
        return errors

    def _vet(self, logits_RV: Tensor, codes_R: Tensor, r: int, rows: Ints, positions: Ints) -> None:
        """Draws again while a rule refuses the token."""
        for rule in self.rules[rows[r]]:
            if not isinstance(rule, VettingRule) or not rule.vets:
                continue
            while (token := int(codes_R[r])) >= 0 and not rule.admits(token):
                rule.refuse(logits_RV[r], token)
                one = slice(r, r + 1)
                codes_R[one] = self._choose(logits_RV[one], rows[one], positions[one])

    def _choose(self, logits_RV: Tensor, rows: Ints, positions: Ints) -> Tensor:
        """The token of each row, or why there is none, from logits that rules have changed."""
        if self.kernel is None:
            return self._look(logits_RV, rows, positions)
        codes_R = self.kernel(logits_RV, self._put(self.limits[rows]), self._sites(rows, positions))
        left = np.flatnonzero((codes_R.numpy() == UNDECIDED) | (self.kind[rows] & TYPICAL != 0))
        if left.size:
            some = self._put(left)
            codes_R[some] = self._look(logits_RV[some], rows[left], positions[left])
        return codes_R

    def _sites(self, rows: Ints, positions: Ints) -> Tensor:
        return self._put(np.concatenate([self.streams[rows], positions[:, None]], axis=1))

    def _look(self, logits_RV: Tensor, rows: Ints, positions: Ints) -> Tensor:
        maxima_RB = blocks.maxima(logits_RV)
        best_R, tokens_R = blocks.argmax(logits_RV, maxima_RB)
        codes_R = tokens_R.masked_fill_(best_R == -torch.inf, MASKED)
        kinds = self.kind[rows]
        for kind in np.unique(kinds).tolist():
            if kind == 0:
                continue
            group = np.flatnonzero(kinds == kind)
            for part in self._parts(group.size):
                at = group[part]
                some = self._put(at)
                sites_r5 = self._sites(rows[at], positions[at])
                logits_rV, maxima_rB = logits_RV[some], maxima_RB[some]
                if kind == RANDOM:
                    filters = self._filters(rows[at])
                    codes_R[some] = gumbel.open_winners(logits_rV, maxima_rB, filters, sites_r5, MASKED)
                else:
                    found = self._candidates(kind, logits_rV, maxima_rB, rows[at])
                    codes_R[some] = gumbel.winners(found, self.vocab_size, sites_r5, MASKED)
        codes_R.masked_fill_(~(best_R < torch.inf), UNSOUND)
        raw_R = ~self.ruled[rows]
        if raw_R.any():
            sound_R = best_R.isfinite() & logits_RV.amin(dim=1).isfinite()
            codes_R.masked_fill_(~sound_R & self._put(raw_R), NUMERICAL)
        return codes_R

    def _candidates(self, kind: int, logits_RV: Tensor, maxima_RB: Tensor, rows: Ints) -> Candidates:
        look = candidates.sorted_candidates if kind & ORDERED else candidates.open_candidates
        found = look(logits_RV, maxima_RB, self._filters(rows))
        return candidates.typical(found, self._put(self.typical_p[rows])) if kind & TYPICAL else found

    def _filters(self, rows: Ints) -> Filters:
        columns = (self.temperature, self.min_gap, self.top_k, self.top_p)
        return Filters(*(self._put(column[rows, None]) for column in columns))

    def _logprobs(self, raw_LV: Tensor, tokens_L: Tensor, at: Ints, rows: Ints) -> RawLogprobs:
        counts = np.minimum(self.logprobs[rows], self.vocab_size)
        parts = [raw_logprobs(raw_LV[p], tokens_L[p], int(counts.max())) for p in self._parts(len(at))]
        drawn_L, ranks_L, top_ids_LK, top_LK = map(torch.cat, zip(*parts, strict=True))
        return RawLogprobs(at.tolist(), counts.tolist(), (drawn_L, ranks_L, top_ids_LK, top_LK))

    def _parts(self, rows: int) -> list[slice]:
        height = max(1, self.chunk // self.vocab_size)
        return [slice(start, start + height) for start in range(0, rows, height)]

    def _put(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def draw_error(code: int, position: int) -> PenstockError:
    """Why a row has no token, from its code."""
    if code == MASKED:
        return EngineError(
            "no_token_left",
            "The request's rules forbid every token",
            why=f"all logits are -inf at position {position}",
            fix="loosen what forbids tokens: structured_outputs, allowed_token_ids, bad_words, min_tokens or a rule",
        )
    if code == UNSOUND:
        return EngineError(
            "logits_rule_failed",
            "The request's rules spoilt its logits",
            why=f"NaN or infinity at position {position}, where the model had none",
            fix="correct the custom rule, or use a milder penalty",
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
