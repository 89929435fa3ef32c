"""ToyExecutor: a model whose next token is a hash of every KV block before it.

It keeps real blocks and reads them only through the tables a plan gave it. One lost, stale, foreign or
misplaced block changes every token that follows, so a run whose tokens equal ``toy_completion`` moved its KV right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from penstock.base import EngineError
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import NewRequest, StepFailed, StepPlan, StepResult
from penstock.spec import TokenLogprobs

EMPTY = bytes(8)


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=8).digest()


def toy_kv(token: int, position: int, seen: Sequence[Sequence[bytes]]) -> bytes:
    """What a position stores in every group: a hash of its token and of all that each group lets it see."""
    return _digest(token.to_bytes(8, "little"), position.to_bytes(8, "little"), *(b"".join(s) for s in seen))


def toy_draw(kv: bytes, seed: int, sample: int, vocab_size: int) -> int:
    return int.from_bytes(_digest(kv, seed.to_bytes(8, "little"), sample.to_bytes(8, "little"))) % vocab_size


def toy_completion(
    prompt: Sequence[int], count: int, windows: Sequence[int | None], seed: int, sample: int, vocab_size: int
) -> list[int]:
    """The tokens of a request that runs alone on a machine without blocks."""
    tokens, stored = list(prompt), list[bytes]()
    for position in range(len(prompt) + count - 1):
        seen = [stored if w is None else stored[max(0, position - w + 1) :] for w in windows]
        stored.append(toy_kv(tokens[position], position, seen))
        if position == len(tokens) - 1:
            tokens.append(toy_draw(stored[-1], seed, sample, vocab_size))
    return tokens[len(prompt) :]


def toy_reports(prompt: Sequence[int], windows: Sequence[int | None]) -> list[TokenLogprobs]:
    """What a request alone reports of its prompt: one entry for each token but the first."""
    return [toy_report(kv, token) for kv, token in zip(_toy_prompt(prompt, windows), prompt[1:], strict=False)]


def toy_report(kv: bytes, token: int) -> TokenLogprobs:
    return TokenLogprobs(-float(int.from_bytes(kv[:3])), 1 + token, ())


def toy_vector(prompt: Sequence[int], windows: Sequence[int | None], task: str) -> tuple[float, ...]:
    """The vector of a request that runs alone: of the last position, or of all of them in order."""
    stored = _toy_prompt(prompt, windows)
    pooled = stored[-1:] if task == "last" else stored
    return tuple(map(float, _digest(*pooled)))


def _toy_prompt(prompt: Sequence[int], windows: Sequence[int | None]) -> list[bytes]:
    stored = list[bytes]()
    for position, token in enumerate(prompt):
        seen = [stored if w is None else stored[max(0, position - w + 1) :] for w in windows]
        stored.append(toy_kv(token, position, seen))
    return stored


@dataclass(slots=True)
class Done:
    """A ticket of work that is already done."""

    result: StepResult | StepFailed

    def wait(self) -> StepResult | StepFailed:
        return self.result


@dataclass(slots=True)
class _Row:
    new: NewRequest
    tokens: list[int]
    tables: list[list[int]]
    pooled: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class ToyExecutor:
    """Attributes:
    fault: says of a plan whether its step fails.
    bad_row: says of a plan and the index of a slice whether that row alone fails, as one with NaN logits does.
    max_rows: more requests than this at a time are a fault of whoever plans.
    """

    pools: Sequence[PoolSpec]
    block_size: int
    vocab_size: int
    fault: Callable[[StepPlan], bool] = lambda plan: False
    bad_row: Callable[[StepPlan, int], bool] = lambda plan, index: False
    max_rows: int | None = None
    rows: dict[int, _Row] = field(default_factory=dict)
    storage: list[list[list[bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.storage = [[[EMPTY] * self.block_size for _ in range(spec.blocks)] for spec in self.pools]

    def submit(self, plan: StepPlan) -> Done:
        for id in plan.gone:
            self.rows.pop(id, None)
        for new in plan.new:
            self.rows[new.id] = self._row(new)
        if self.max_rows is not None and len(self.rows) > self.max_rows:
            raise ValueError(f"plan {plan.number} makes {len(self.rows)} requests known, of at most {self.max_rows}")
        for write in plan.blocks:
            self.rows[write.request].tables[write.group][write.first :] = write.blocks
        if self.fault(plan):
            return Done(self._break(plan))
        for group, src, dst in plan.copies:
            self.storage[group][dst] = list(self.storage[group][src])
        if any(start + count > len(self.rows[id].tokens) for id, start, count in plan.slices):
            return Done(StepFailed(EngineError("step_failed", f"Step {plan.number} follows one that failed")))
        tokens = list[tuple[int, ...]]()
        result = StepResult(tokens)
        for index, (id, start, count) in enumerate(plan.slices):
            tokens.append(self._slice(result, index, self.rows[id], start, count))
        bad = [index for index in range(len(plan.slices)) if self.bad_row(plan, index)]
        for index in bad:
            self._scribble(*plan.slices[index])
        result.failed = dict.fromkeys(bad, EngineError("numerical_error", "The row was made to fail"))
        return Done(result)

    def close(self) -> None:
        pass

    def _break(self, plan: StepPlan) -> StepFailed:
        """Fails as badly as a step can: nothing was copied and all it should have written is garbage."""
        for id, start, count in plan.slices:
            self._scribble(id, start, count)
        return StepFailed(
            EngineError("injected_fault", f"Step {plan.number} was made to fail", fix="a test wants it so")
        )

    def _scribble(self, id: int, start: int, count: int) -> None:
        for group, table in enumerate(self.rows[id].tables):
            for position in range(start, start + count):
                self.storage[group][table[position // self.block_size]][position % self.block_size] = EMPTY

    def _row(self, new: NewRequest) -> _Row:
        return _Row(new, list(new.tokens), [list(table) for table in new.tables])

    def _slice(self, result: StepResult, index: int, row: _Row, start: int, count: int) -> tuple[int, ...]:
        size, new, computed = self.block_size, row.new, list[bytes]()
        for position in range(start, start + count):
            seen = [self._seen(row, group, position) for group in range(len(self.pools))]
            computed.append(kv := toy_kv(row.tokens[position], position, seen))
            for group, table in enumerate(row.tables):
                self.storage[group][table[position // size]][position % size] = kv
        if new.prompt_logprobs is not None:
            followers = new.tokens[start + 1 : min(start + count + 1, new.prompt_len)]
            result.prompt_logprobs[index] = tuple(map(toy_report, computed, followers))
        row.pooled += computed
        if start + count < len(row.tokens):
            return ()
        if new.task != "generate":
            result.vectors[index] = tuple(map(float, _digest(*(computed[-1:] if new.task == "last" else row.pooled))))
            return ()
        row.tokens.append(toy_draw(computed[-1], new.seed, new.sample, self.vocab_size))
        return (row.tokens[-1],)

    def _seen(self, row: _Row, group: int, position: int) -> list[bytes]:
        window, size = self.pools[group].window, self.block_size
        first = 0 if window is None else max(0, position - window + 1)
        blocks = row.tables[group][first // size : -(-position // size)]
        stored = [kv for block in blocks for kv in self.storage[group][block]]
        skip = first // size * size
        return stored[first - skip : position - skip]
