"""Plan replay: a recording of what entered an engine's loop, run again without a model, must give the same plans.

It is the regression test of the scheduler and the proof that a simulation decides as the live engine did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

from penstock.base import EngineError
from penstock.core.admission import Limits
from penstock.core.engine import Engine, Mail
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import NewRequest, StepFailed, StepPlan, StepResult
from penstock.core.service import Abort, Submission, Update
from penstock.core.setup import EngineSetup
from penstock.sim.toy import Done
from penstock.spec import SamplingParams, TokenLogprobs, Vocabulary

BLANK = TokenLogprobs(0.0, 1, ())
"""In place of a number that no decision depends on."""


def plan_digest(plan: StepPlan) -> str:
    """Hash of everything in a plan; equal plans have equal digests on every machine."""
    return blake2b(repr(plan).encode(), digest_size=12).hexdigest()


@dataclass(slots=True)
class Recorder:
    """A Journal that writes JSON, one line to a call of ``write``."""

    setup: EngineSetup
    write: Callable[[str], object]

    def __post_init__(self) -> None:
        self._write({"setup": {**asdict(self.setup), **_encoded(self.setup)}})

    def launched(self, now: float, mail: tuple[Mail, ...], plans: tuple[StepPlan, ...]) -> None:
        self._write({"now": now, "mail": [_encode_mail(m) for m in mail], "plans": [plan_digest(p) for p in plans]})

    def landed(self, plan: StepPlan, result: StepResult | StepFailed) -> None:
        if isinstance(result, StepFailed):
            self._write({"landed": plan.number, "failed": True})
            return
        drawn = [(s[0], s[1] + s[2], tokens) for s, tokens in zip(plan.slices, result.tokens, strict=True) if tokens]
        self._write({"landed": plan.number, "drawn": drawn, "refused": sorted(result.failed)})

    def _write(self, entry: dict[str, Any]) -> None:
        self.write(json.dumps(entry, separators=(",", ":")))


@dataclass(frozen=True, slots=True)
class Replayed:
    """Attributes:
    plans: plans compared.
    differs_at: index of the first launch whose plans differ, None if none does.
    """

    plans: int
    differs_at: int | None


def replay(lines: Iterable[str]) -> Replayed:
    """Runs a recording again, on recorded tokens, and compares every plan."""
    entries = [json.loads(line) for line in lines]
    setup = _decode_setup(entries[0]["setup"])
    journal = _Plans()
    engine = Engine(setup.scheduler(), RecordedExecutor(entries), _ignore, setup.depth, journal)
    compared = 0
    for index, entry in enumerate(entries[1:]):
        if "landed" in entry:
            engine.land()
            continue
        for mail in entry["mail"]:
            engine.post(_decode_mail(mail))
        engine.launch(entry["now"])
        if journal.digests != entry["plans"]:
            return Replayed(compared, index)
        compared += len(journal.digests)
    return Replayed(compared, None)


class RecordedExecutor:
    """Answers each slice with the token that was drawn at its end when the run was recorded."""

    def __init__(self, entries: Iterable[dict[str, Any]]) -> None:
        self.requests: dict[int, NewRequest] = {}
        self.known: dict[int, int] = {}  # tokens of each request; a slice that reaches the last draws the next
        self.tokens: dict[tuple[int, int], tuple[int, ...]] = {}
        self.failed: set[int] = set()
        self.refused: dict[int, list[int]] = {}
        for entry in entries:
            if "landed" not in entry:
                continue
            if "failed" in entry:
                self.failed.add(entry["landed"])
                continue
            self.refused[entry["landed"]] = entry["refused"]
            for request, position, tokens in entry["drawn"]:
                self.tokens[request, position] = tuple(tokens)

    def submit(self, plan: StepPlan) -> Done:
        self.requests.update((new.id, new) for new in plan.new)
        self.known.update((new.id, len(new.tokens)) for new in plan.new)
        error = EngineError("recorded_fault", "This step failed when it was recorded", fix="see the log of that run")
        if plan.number in self.failed:
            return Done(StepFailed(error))
        result = StepResult([self._drawn(id, start + count) for id, start, count in plan.slices])
        for index, (id, start, count) in enumerate(plan.slices):
            new = self.requests[id]
            if new.prompt_logprobs is not None:
                result.prompt_logprobs[index] = (BLANK,) * (min(start + count, new.prompt_len - 1) - start)
            if new.task != "generate" and start + count == new.prompt_len:
                result.vectors[index] = ()
        result.failed = dict.fromkeys(self.refused.get(plan.number, ()), error)
        return Done(result)

    def _drawn(self, request: int, end: int) -> tuple[int, ...]:
        if end < self.known[request] or self.requests[request].task != "generate":
            return ()
        tokens = self.tokens.get((request, end), ())
        self.known[request] += len(tokens)
        return tokens

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Plans:
    digests: list[str] = field(default_factory=list)

    def launched(self, now: float, mail: tuple[Mail, ...], plans: tuple[StepPlan, ...]) -> None:
        self.digests = [plan_digest(plan) for plan in plans]

    def landed(self, plan: StepPlan, result: StepResult | StepFailed) -> None:
        pass


def _ignore(updates: list[Update]) -> None:
    pass


def _encode_mail(mail: Mail) -> Any:
    if isinstance(mail, Abort):
        return list(mail)
    params = replace(mail.params, logits_processors=None)  # functions cannot be written, and no plan depends on them
    return asdict(replace(mail, params=params))


def _decode_mail(mail: Any) -> Mail:
    if isinstance(mail, list):
        return Abort(*mail)
    emitted = tuple(None if tokens is None else tuple(tokens) for tokens in mail.get("emitted", ()))
    params = SamplingParams(**mail["params"])
    return Submission(**{**mail, "tokens": tuple(mail["tokens"]), "params": params, "emitted": emitted})


def _encoded(setup: EngineSetup) -> dict[str, Any]:
    vocabulary = {**asdict(setup.vocabulary), "eos_ids": sorted(setup.vocabulary.eos_ids)}
    return {"numerics_id": setup.numerics_id.hex(), "vocabulary": vocabulary}


def _decode_setup(values: dict[str, Any]) -> EngineSetup:
    return EngineSetup(
        **{
            **values,
            "pools": tuple(PoolSpec(**pool) for pool in values["pools"]),
            "limits": Limits(**values["limits"]),
            "numerics_id": bytes.fromhex(values["numerics_id"]),
            "vocabulary": Vocabulary(
                **{**values["vocabulary"], "eos_ids": frozenset(values["vocabulary"]["eos_ids"])},
            ),
        }
    )


def read_recording(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file
