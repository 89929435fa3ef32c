"""Many prompts through one engine: a line in, a line of JSON out, in order; a bad line harms no other."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from queue import SimpleQueue
from secrets import randbits
from typing import TYPE_CHECKING, Any, cast

from penstock.base import InvalidRequest, PenstockError
from penstock.cli import lines
from penstock.cli.answer import completions, usage
from penstock.cli.exits import as_dict, exit_code
from penstock.cli.terminal import is_terminal, note
from penstock.spec import SamplingParams

if TYPE_CHECKING:
    from penstock.core.service import Update
    from penstock.llm.prompts import Prompt, TokensPrompt
    from penstock.llm.requests import Job, Requests

AHEAD = 4
"""Lines taken in beyond those written, in steps of ``max_num_seqs``: a slow line holds back what is written, not what
is computed."""


@dataclass(slots=True)
class Line:
    """One prompt and what has come of it: a job, or the error that kept it from being one.

    Attributes:
        number: of its line in the input, from 1.
        id: whatever a JSON line calls itself; handed back.
    """

    number: int
    id: object = None
    job: Job | None = None
    error: PenstockError | None = None

    @property
    def done(self) -> bool:
        return self.job is None or self.job.finished

    @property
    def failure(self) -> PenstockError | None:
        return self.error if self.job is None else self.job.error

    def report(self) -> dict[str, Any]:
        out: dict[str, Any] = {"line": self.number} | ({} if self.id is None else {"id": self.id})
        if self.failure is not None:
            return out | {"error": as_dict(self.failure)}
        assert self.job is not None
        output = self.job.output()
        counts = usage(len(output.prompt_token_ids), self.job.num_tokens, output.num_cached_tokens)
        return out | completions(output.outputs) | {"usage": counts}


def run_file(
    model: str | None,
    engine: Mapping[str, Any],
    defaults: Mapping[str, Any],
    asked: Mapping[str, Any],
    source: str,
    target: str | None,
    as_jsonl: bool,
    as_json: bool,
) -> None:
    """What ``penstock run --input`` does. Ends the process with the code of the first error, if a line had one.

    Args:
        defaults, asked: sampling parameters under and over those that the model recommends.

    Raises:
        NotFound, PenstockError: the input cannot be read, the output not be written, or the engine not be built.
    """
    from penstock.assemble import build_engine
    from penstock.llm.config import engine_config
    from penstock.llm.requests import Requests

    with lines.opened(source) as file, lines.written(target, source) as write:
        started = time.perf_counter()
        built = build_engine(engine_config(model, engine))
        tally = lines.Tally(time.perf_counter() - started)
        try:
            params = SamplingParams(**{**defaults, **built.recommended, **asked})
            runner = Runner(Requests(built, lambda: 0), params, as_jsonl=as_jsonl, seed=built.config.seed)
            shown = target is not None or not is_terminal(sys.stdout)
            with lines.progress(file, shown=shown) as advance:
                for line in runner.results(lines.numbered(file), window=AHEAD * built.config.max_num_seqs):
                    report = line.report()
                    tally.add(report, line.failure)
                    write(report)
                    advance(tally)
        finally:
            built.close()
    sum_up(tally, as_json)


def sum_up(tally: lines.Tally, as_json: bool) -> None:
    """Prints the totals, and ends the process if a line failed."""
    note(json.dumps(tally.report()) if as_json else tally.text())
    if tally.first_error is not None:
        sys.exit(exit_code(tally.first_error))


class Runner:
    """Turns lines into requests of one engine and follows them.

    Args:
        seed: root of the seeds of lines that bring none; None for random ones.
    """

    def __init__(self, requests: Requests, params: SamplingParams, *, as_jsonl: bool, seed: int | None) -> None:
        self._requests, self._params, self._as_jsonl, self._seed = requests, params, as_jsonl, seed
        self._news: SimpleQueue[tuple[Job, Update]] = SimpleQueue()

    def results(self, numbered: Iterable[tuple[int, bytes]], window: int) -> Iterator[Line]:
        """Every line in order, when it is finished. At most ``window`` are taken in beyond those yielded."""
        waiting, taken = iter(numbered), deque[Line]()
        try:
            while True:
                while len(taken) < window and (following := next(waiting, None)) is not None:
                    taken.append(self._start(*following))
                if not taken:
                    return
                if taken[0].done:
                    yield taken.popleft()
                else:
                    self._requests.apply(*self._news.get())
        finally:
            for line in taken:
                if line.job is not None:
                    self._requests.end(line.job)

    def _start(self, number: int, raw: bytes) -> Line:
        line = Line(number)
        try:
            prompt, own = lines.parsed(number, raw, self._as_jsonl)
            line.id = own.pop("id", None)
            params = self._with(own)
            if params.seed is None:
                params = replace(params, seed=self._seed_of(number))
            job = self._requests.job(self._tokenized(prompt), params)
            self._requests.submit(job, lambda job, update: self._news.put((job, update)))
            line.job = job
        except PenstockError as error:
            line.error = error
        return line

    def _tokenized(self, prompt: dict[str, Any]) -> TokensPrompt:
        if "messages" in prompt:
            return self._requests.tokenize_chat(prompt["messages"])
        return self._requests.tokenize(cast("Prompt", prompt))

    def _with(self, own: Mapping[str, Any]) -> SamplingParams:
        """The parameters of the command line, and those of the line over them."""
        known = {field.name for field in fields(SamplingParams)}
        if unknown := sorted(own.keys() - known):
            fix = f"known are {', '.join(sorted(known))}"
            raise InvalidRequest("unknown_option", f"{unknown[0]!r} is no sampling parameter", fix=fix)
        return replace(self._params, **own)

    def _seed_of(self, number: int) -> int:
        """A line's text does not depend on the lines around it, good or bad."""
        if self._seed is None:
            return randbits(64)
        return int.from_bytes(blake2b(f"{self._seed}:{number}".encode(), digest_size=8).digest(), "little")
