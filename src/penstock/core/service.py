"""What the outside says to an engine, what it hears back, and the Service seam between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, Protocol

from penstock.base import InvalidRequest, PenstockError, Unavailable
from penstock.core.trace import Trace
from penstock.spec import FinishReason, SamplingParams, Timing, TokenLogprobs

MAX_PRIORITY = 10**6

Task = Literal["generate", "mean", "last", "cls"]
"""What a submission is for: tokens, or one vector: the mean of the final hidden states of all positions, or the one
of the last, or of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One prompt and what to do with it. Travels between processes.

    Attributes:
        id: chosen by the caller, unique among live requests.
        tokens: the prompt's token ids: a tuple, or of a long one an ``array``.
        seed: root of the noise; given at the outermost face when the caller brought none.
        priority: from -MAX_PRIORITY to MAX_PRIORITY, lower is served earlier; a level is worth
            ``priority_age_seconds`` of waiting.
        task: "generate", or how the vector is pooled that is wanted instead of tokens; ``params`` then say nothing.
        tenant, adapter: KV blocks are shared only within the same pair.
        emitted: of a request that another engine has begun: the tokens each sample has so far, or None for one that has
            ended. They are not told again, and the rest is what it would have been. Empty for a new request.
    """

    id: str
    tokens: Sequence[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    task: Task = "generate"
    tenant: str = ""
    adapter: str = ""
    emitted: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def unfinished(self) -> list[tuple[int, tuple[int, ...]]]:
        """(sample, tokens it has so far) of the samples that are to be computed."""
        emitted = self.emitted or ((),) * self.params.n
        return [(sample, tokens) for sample, tokens in enumerate(emitted) if tokens is not None]


class Abort(NamedTuple):
    """Ends one sample of a submission, or all of them."""

    id: str
    sample: int | None = None


@dataclass(slots=True)
class Update:
    """News of one sample of a submission.

    Attributes:
        tokens: newly accepted tokens, in order; a stop token is included, its text is not shown.
        logprobs: one entry per token, if asked for.
        finish_reason: set in the last update of the sample.
        stop_reason: the stop token id that ended it, None for end-of-sequence.
        error: set with finish_reason "error".
        cached_tokens: prompt tokens whose KV was found rather than computed.
        timing: what it waited for so far, where that is news, and in the last update.
        prompt_logprobs: entries of further prompt tokens, in order from the second one (the first has none), if asked
            for; sample 0 alone brings them.
        vector: what a submission of another task than "generate" asked for, with finish_reason "stop".
    """

    id: str
    sample: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: PenstockError | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    vector: tuple[float, ...] | None = None
    timing: Timing | None = field(default=None, compare=False)


@dataclass(slots=True)
class Counters:
    """What happened since an engine's start.

    Attributes:
        prefix_hit_tokens: positions found rather than computed, those found again after a preemption included.
        copies: blocks copied because a sample was about to write to a shared one.
        restarts, bad_frames: of an engine in another process: times it was started again, and frames from it that could
            not be read.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    copies: int = 0
    failed_steps: int = 0
    restarts: int = 0
    bad_frames: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counters)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """An engine at one moment: requests running and waiting, blocks of all pools, and what happened so far."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    counters: Counters


Sink = Callable[[Update], object]
"""Called by the service for each update, in order, from whatever thread runs the engine. Must not block."""


class Service(Protocol):
    """All that serving knows of an engine: in this process, behind a socket, or a fleet.

    Every sample of an accepted submission ends with exactly one update that has a finish_reason; refusals
    (too long, cannot fit) arrive the same way, with an error.
    """

    def submit(self, submission: Submission, sink: Sink) -> None:
        """Raises PenstockError, and calls no sink, if the service is closed or the id is still running."""
        ...

    def abort(self, id: str, sample: int | None = None) -> None:
        """Ends one sample of a submission, or all; each still gets its last update. Unknown ids are ignored."""
        ...

    def status(self) -> Status: ...

    def look(self, seconds: float, blocks: int = 0) -> Future[Trace]:
        """What the engine did in the last seconds.

        Args:
            blocks: most KV blocks of each pool whose state is told.

        Raises (from the future):
            Unavailable: (engine_stopped) there is no engine now.
        """
        ...

    @property
    def alive(self) -> bool:
        """It can compute now."""
        ...

    def close(self) -> None:
        """Ends what is running; each sample still gets its last update."""
        ...


def duplicate_id(id: str) -> InvalidRequest:
    what = f"A request with id {id!r} is still running"
    return InvalidRequest("duplicate_request_id", what, fix="use another id, or none to be given one")


def engine_stopped() -> Unavailable:
    return Unavailable(
        "engine_stopped",
        "The engine is not running",
        why="it stopped, or it died and is being started again",
        fix="try again in some seconds; if it stays so, restart the server and report its log",
    )
