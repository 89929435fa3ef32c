"""StepPlan and StepResult: all that passes between the brain and whatever computes.

Integers and small values only, so that a remote executor, a recording and the simulator need nothing
else. What an executor must know is in these rules:

- An executor keeps, for each request it was told of, its tokens and its block tables. ``new`` (re)places a
  request, ``gone`` forgets one (unknown ids are ignored), ``blocks`` overwrites table entries.
- Order inside a step: ``gone``, ``new``, ``blocks``, then ``copies``, then the slices.
- A slice computes positions ``start .. start + count - 1``. One that reaches the last token the executor
  knows draws the next token and appends it to what the executor knows. So the input of a decode whose
  token is still on its way to the scheduler (OWED) is already where it is needed.
- A request whose task is not "generate" draws nothing: the slice that reaches its last token gives its vector. What
  "mean" sums over slices the executor keeps from ``new`` on; such a request is computed from position 0.
- A request with ``prompt_logprobs`` (its sample 0 alone) gives with each slice an entry for every prompt token
  after a position of the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from penstock.base import PenstockError
from penstock.spec import SamplingParams, TokenLogprobs

Slice = tuple[int, int, int]
"""(request, start, count): positions start .. start + count - 1 of a request are computed."""

NO_BLOCK = -1
"""Entry of a block table whose tokens lie outside the group's window for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request as an executor first hears of it, or hears of it again after a preemption or a failed step.

    Attributes:
        id: the scheduler's number; other plans refer to it.
        tokens: every known token: the prompt, and what was emitted so far.
        prompt_len: how many of ``tokens`` are the prompt.
        tables: block ids of each KV group, by block index.
        params, seed, sample: with the position they determine each draw.
        stop_ids: token ids that must not be drawn before ``params.min_tokens``.
        limit: length at which it ends for lack of room, prompt included.
        task: what is wanted of it (``core.service.Task``).
    """

    id: int
    tokens: tuple[int, ...]
    prompt_len: int
    tables: tuple[tuple[int, ...], ...]
    params: SamplingParams
    seed: int
    sample: int
    stop_ids: tuple[int, ...]
    limit: int
    task: str = "generate"

    @property
    def prompt_logprobs(self) -> int | None:
        """As ``SamplingParams.prompt_logprobs``; sample 0 speaks for all."""
        return self.params.prompt_logprobs if self.sample == 0 else None


class TableWrite(NamedTuple):
    """Entries ``first ..`` of the request's table in ``group`` become ``blocks``."""

    request: int
    group: int
    first: int
    blocks: tuple[int, ...]


class BlockCopy(NamedTuple):
    """All layers' K and V of block ``src`` are copied to block ``dst`` of the same group."""

    group: int
    src: int
    dst: int


@dataclass(slots=True)
class StepPlan:
    """One step. ``number`` counts plans from 0; a replay must produce equal plans in equal order."""

    number: int
    slices: list[Slice] = field(default_factory=list)
    new: list[NewRequest] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    blocks: list[TableWrite] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """What a step produced, in the order of the plan's slices.

    Attributes:
        tokens: the tokens drawn by each slice; empty for a slice that draws none.
        logprobs: slice index -> one entry per drawn token, for requests that asked.
        prompt_logprobs: slice index -> entries of the tokens after its positions that belong to the prompt, in order,
            for requests that asked.
        vectors: slice index -> the vector it completed.
        failed: slice index -> why that request alone cannot go on (such as NaN logits).
        started: when the executor began with it, in seconds of ``time.monotonic``; 0 where nobody looked.
        forward, sample: seconds that its thread then spent on the batch and the model, and on drawing tokens and
            waiting for them; a device that works on its own is done only when they are there.
        replayed: the pass was a recorded one.
    """

    tokens: Sequence[tuple[int, ...]]
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)
    failed: dict[int, PenstockError] = field(default_factory=dict)
    started: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    replayed: bool = False


@dataclass(slots=True)
class StepFailed:
    """The step as a whole raised; nothing it computed may be used."""

    error: PenstockError


class Ticket(Protocol):
    """A step under way."""

    def wait(self) -> StepResult | StepFailed:
        """Blocks until the step ended. Never raises for a fault of the step itself."""
        ...


class Executor(Protocol):
    """Computes plans in the order of their submission."""

    def submit(self, plan: StepPlan) -> Ticket: ...

    def close(self) -> None: ...
