"""Ours beside the peers on one model: first each of them once, in each of its ways, then ours and the two best in turn.

Each run is a process of its own and a line in ``results.jsonl`` of the work folder, filed under the versions and the
machine. So a comparison goes on where it was interrupted, and what was measured is not measured again.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penstock.base import EngineError
from penstock.bench.contenders import CELLS, OURS, Setting, argv, machine, make_job, settings, version
from penstock.bench.job import Run
from penstock.bench.limits import Limits, measure_limits
from penstock.bench.sides import run_side
from penstock.bench.venvs import Workshop
from penstock.spec.hf import read_model_spec

FINALISTS = 2
"""Peers that are measured in turn with ours."""
LONGEST = 1800.0
"""Seconds after which a run is ended."""
KEY = ("shape", "bits", "cell", "peer", "setting", "version", "machine", "threads")
"""What results are filed under."""
Key = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run, or why there is none.

    Attributes:
        turn: when its round began; runs of one round have it in common.
        before, after: what the machine gave around the round.
        load: processes that wanted to run, ours included, the mean of the minute before.
    """

    shape: str
    bits: int
    cell: str
    peer: str
    setting: str
    version: str
    machine: str
    threads: int
    turn: str
    command: str
    before: Limits
    after: Limits
    load: float
    run: Run | None = None
    error: str = ""

    @property
    def key(self) -> Key:
        return tuple(getattr(self, name) for name in KEY)

    @property
    def speed(self) -> float:
        """In the unit of its cell, 0 without a run."""
        return CELLS[self.cell].speed(self.run) if self.run else 0.0


class Journal:
    """The results in a file of JSON lines. A last line that was cut short, by a full disk or a kill, does not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: list[Result] = []
        lines = path.read_text("utf-8").split("\n") if path.is_file() else []
        for line in lines:
            if line.endswith("}"):
                self.results.append(_read(json.loads(line)))
        if lines and lines[-1]:
            self._write(self.results)

    def add(self, results: Sequence[Result]) -> None:
        """A round: all of its lines at once."""
        self.results += results
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(asdict(result))}\n" for result in results))

    def drop(self, shape: str, bits: int, cell: str, peers: Iterable[str]) -> None:
        """What was measured so far is measured again."""
        peers = set(peers)
        self.results = [
            x for x in self.results if (x.shape, x.bits, x.cell) != (shape, bits, cell) or x.peer not in peers
        ]
        self._write(self.results)

    def of(self, key: Key) -> list[Result]:
        return [result for result in self.results if result.key == key]

    def turns(self, keys: Sequence[Key]) -> list[list[Result]]:
        """Rounds in which all of these ran, each with their results in this order."""
        rounds: dict[str, dict[Key, Result]] = {}
        for result in self.results:
            if result.run:
                rounds.setdefault(result.turn, {})[result.key] = result
        return [[of_one[key] for key in keys] for of_one in rounds.values() if all(key in of_one for key in keys)]

    def _write(self, results: Sequence[Result]) -> None:
        part = self._path.with_suffix(".part")
        part.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in results), "utf-8")
        part.replace(self._path)


def _read(fields: dict[str, Any]) -> Result:
    fields |= {name: Limits(**fields[name]) for name in ("before", "after")}
    return Result(**fields | {"run": Run(**fields["run"]) if fields["run"] else None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What is compared, and where.

    Attributes:
        peers: names, ours among them or not.
        limits: of the machine when it began: they say whether bf16 is worth trying.
        say: told what goes on, a line at a time.
    """

    shop: Workshop
    journal: Journal
    shape: str
    bits: int
    peers: Sequence[str]
    threads: int
    rounds: int
    limits: Limits
    say: Callable[[str], None]

    def play(self, cell: str) -> None:
        """Measures one cell, as far as it is not measured yet."""
        for setting in self.ways():
            if not self.journal.of(self.key(cell, setting)):
                self.round(cell, [setting])
        finalists = self.finalists(cell)
        done = len(self.turns(cell)) if finalists else self.rounds
        for number in range(done, self.rounds):
            if any(not result.run for result in self.round(cell, finalists[:: -1 if number % 2 else 1])):
                break

    def ways(self) -> list[Setting]:
        fast_bf16 = self.limits.bf16 > self.limits.fp32
        return [way for peer in self.peers for way in settings(peer, self.bits, fast_bf16=fast_bf16)]

    def key(self, cell: str, setting: Setting) -> Key:
        """Its parts are those of KEY."""
        name = (setting.peer, setting.name, version(setting.peer))
        return (self.shape, self.bits, cell, *name, machine(), self.threads)

    def turns(self, cell: str) -> list[list[Result]]:
        """The rounds of all the finalists, each in their order."""
        return self.journal.turns([self.key(cell, setting) for setting in self.finalists(cell)])

    def finalists(self, cell: str) -> list[Setting]:
        """Ours and the best peers by their first run, each in its best way; without what failed."""
        best: dict[str, tuple[float, Setting]] = {}
        for setting in self.ways():
            speed = max((result.speed for result in self.journal.of(self.key(cell, setting))[:1]), default=0.0)
            if speed > best.get(setting.peer, (0.0, setting))[0]:
                best[setting.peer] = (speed, setting)
        peers = sorted((one for peer, one in best.items() if peer != OURS), key=lambda one: one[0], reverse=True)
        return [setting for _, setting in [*([best[OURS]] if OURS in best else []), *peers[:FINALISTS]]]

    def round(self, cell: str, order: Sequence[Setting]) -> list[Result]:
        turn, before = datetime.now(UTC).isoformat(timespec="milliseconds"), measure_limits(self.threads)
        runs = [(setting, *self._run(cell, setting)) for setting in order]
        after = measure_limits(self.threads)
        results = [
            Result(
                shape=self.shape,
                bits=self.bits,
                cell=cell,
                peer=setting.peer,
                setting=setting.name,
                version=version(setting.peer),
                machine=machine(),
                threads=self.threads,
                turn=turn,
                command=shlex.join(words),
                before=before,
                after=after,
                load=round(os.getloadavg()[0], 2),
                run=run,
                error=error,
            )
            for setting, words, run, error in runs
        ]
        self.journal.add(results)
        return results

    def _run(self, cell: str, setting: Setting) -> tuple[tuple[str, ...], Run | None, str]:
        self.say(f"{cell}: {setting.peer} {setting.name}")
        words: tuple[str, ...] = ()
        try:
            spec = read_model_spec(self.shop.model(self.shape, "hf"))
            model = self.shop.model(self.shape, setting.form)
            job = make_job(spec, CELLS[cell], model, self.threads, setting.options)
            words = argv(self.shop, setting, job)
            run = run_side(words, LONGEST)
        except EngineError as error:
            self.say(f"  failed: {reason(str(error))}")
            return words, None, str(error)
        if run.tokens != job.prompts * job.outputs:
            return words, None, f"{run.tokens} tokens came, {job.prompts * job.outputs} were asked for"
        self.say(f"  {CELLS[cell].speed(run):.1f} {CELLS[cell].unit}, {run.ready_s:.1f} s to be ready")
        return words, run, ""


def reason(error: str) -> str:
    """The last line that names an error in what a process said, cut to a line."""
    said = [line.strip() for line in error.splitlines() if "error" in line.lower()] or [error.strip()]
    return said[-1][:240]
