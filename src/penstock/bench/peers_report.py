"""What was measured of each cell: medians, the ratio to the best peer, the share of what the machine allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.bench.checkpoints import SHAPES
from penstock.bench.contenders import CELLS, OURS, machine, make_job
from penstock.bench.limits import Limits, limit_seconds, measure_limits
from penstock.bench.peers import Contest, Journal, Result, reason
from penstock.bench.sides import SIDES
from penstock.bench.venvs import Workshop
from penstock.spec.hf import model_spec

QUIET = 2.5
"""Most processes that want to run, beside the contenders' two threads, in a measurement that counts."""

REFERENCE_MACHINE = "AuthenticAMD family 26"
REFERENCE_LIMITS = Limits(read_rate=42e9, fp32=175e9, bf16=850e9, int8=1750e9)
REFERENCES = {
    "qwen3-0.6b": {
        (16, "llama.cpp"): {"decode": 25.3, "prefill512": 423, "batch8": 42, "batch32": 107},
        (8, "llama.cpp"): {"decode": 44.2, "prefill512": 254, "batch8": 64, "batch32": 76},
        (4, "llama.cpp"): {"decode": 66.4, "prefill512": 419, "batch8": 103, "batch32": 125},
        (8, "openvino"): {"decode": 45.9, "prefill512": 814, "batch8": 162, "batch32": 231},
        (4, "openvino"): {"decode": 44.8, "prefill512": 544, "batch8": 143, "batch32": 220},
        (16, "vllm"): {"decode": 24.1, "prefill512": 714, "batch8": 105, "batch32": 173},
        (16, "transformers"): {"decode": 15.3, "prefill512": 429, "batch8": 47},
    },
    "llama-3.2-1b": {
        (16, "llama.cpp"): {"decode": 16.4, "prefill512": 246},
        (8, "llama.cpp"): {"decode": 24.6, "prefill512": 134, "batch8": 41},
        (4, "llama.cpp"): {"decode": 41.2, "prefill512": 249, "batch8": 65, "batch32": 100},
        (8, "openvino"): {"decode": 27.4, "prefill512": 499, "batch8": 110, "batch32": 158},
        (4, "openvino"): {"decode": 32.5, "prefill512": 469, "batch8": 104},
        (16, "vllm"): {"decode": 18.7, "prefill512": 411, "batch8": 91},
        (16, "transformers"): {"decode": 7.8, "prefill512": 280},
    },
}
"""Speeds of the peers, tuned with care, on 2 cores of an AMD Zen 5 with these limits (2026-11-20): a peer that is far
below here is not run as it should be."""
BY_BANDWIDTH = "decode"
"""The cell that reads all weights for each token: how fast says little of the processor's instructions, so that its
references hold on every machine. The others depend on which instructions multiply."""
ENOUGH = 0.85
INVALID = "invalid: "
"""How such a peer's verdict begins."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One way of one contender in one cell.

    Attributes:
        speed: median of ``each``, in the cell's unit (of "s", seconds: less is better); 0 if it failed.
        rounds: of those in which all finalists ran; 0: its first run only.
        share: of the speed that the measured limits allow, median; None where no limit is stated.
        peak_bytes: greatest resident memory.
        ready_s: from the start of the process to the end of the warm-up, median.
        verdict: of a peer, beside its reference on another machine.
        error: why there is no figure.
    """

    peer: str
    setting: str
    version: str
    speed: float
    each: tuple[float, ...]
    rounds: int
    share: float | None
    peak_bytes: int
    ready_s: float
    verdict: str
    error: str
    command: str


@dataclass(frozen=True, slots=True)
class CellReport:
    """One piece of work.

    Attributes:
        ratio: median over the rounds of our speed over that of the best peer, so more than 1 is ahead; None if that
            peer is invalid, since being ahead of it is no win.
        note: why there is no ratio, and which other peers are invalid: run as it should be, one might be the best.
    """

    cell: str
    unit: str
    standings: tuple[Standing, ...]
    best_peer: str | None
    ratio: float | None
    ratios: tuple[float, ...]
    note: str


@dataclass(frozen=True, slots=True)
class PeersReport:
    """``limits``: lowest and highest of all rounds. ``load``: of the rounds; over 2.5 their figures are provisional."""

    shape: str
    bits: int
    cells: tuple[CellReport, ...]
    limits: tuple[Limits, Limits]
    load: tuple[float, float]
    threads: int
    machine: str
    turns: tuple[str, str]


def measure_peers(
    work: Path,
    *,
    shape: str,
    bits: int,
    cells: Sequence[str],
    only: Sequence[str] | None = None,
    rounds: int = 5,
    threads: int = 2,
    again: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PeersReport:
    """Measures what is not measured yet, and reports all of it.

    Args:
        work: folder for venvs, models and results; kept.
        only: contenders; all of them by default.
        again: what was measured of these cells and contenders does not count.
        say: told what goes on, a line at a time.
    """
    names = [name for name in SIDES if only is None or name in only]
    shop = Workshop(work)
    journal = Journal(shop.folder / "results.jsonl")
    contest = Contest(
        shop=shop,
        journal=journal,
        shape=shape,
        bits=bits,
        peers=names,
        threads=threads,
        rounds=rounds,
        limits=measure_limits(threads),
        say=say,
    )
    if again:
        for cell in cells:
            journal.drop(shape, bits, cell, names)
    for cell in cells:
        contest.play(cell)
    return report(contest, cells)


def report(contest: Contest, cells: Sequence[str]) -> PeersReport:
    known = {contest.key(cell, way) for cell in cells for way in contest.ways()}
    results = [result for result in contest.journal.results if result.key in known]
    limits = [limit for result in results for limit in (result.before, result.after)] or [contest.limits]
    loads, turns = [result.load for result in results] or [0.0], [result.turn for result in results] or [""]
    return PeersReport(
        shape=contest.shape,
        bits=contest.bits,
        cells=tuple(_cell(contest, cell) for cell in cells),
        limits=(_each(min, limits), _each(max, limits)),
        load=(min(loads), max(loads)),
        threads=contest.threads,
        machine=machine(),
        turns=(min(turns), max(turns)),
    )


def _cell(contest: Contest, cell: str) -> CellReport:
    turns = contest.turns(cell)
    finalists = {result.key: [turn[i] for turn in turns] for i, result in enumerate(turns[0])} if turns else {}
    standings = []
    for way in contest.ways():
        key = contest.key(cell, way)
        if runs := finalists.get(key) or contest.journal.of(key)[:1]:
            standings.append(_standing(runs, len(turns) if key in finalists else 0))
    unit = CELLS[cell].unit
    ahead = sorted((x for x in standings if not x.error), key=lambda x: x.speed, reverse=unit != "s")
    best = next((x for x in ahead if x.peer != OURS and x.rounds), None)
    ours = next((x for x in standings if x.peer == OURS and x.rounds), None)
    invalid = _invalid(ahead)
    ratios: list[float] = []
    if best and ours and best.peer not in invalid:
        pairs = zip(ours.each, best.each, strict=True)
        ratios = [round(theirs / mine if unit == "s" else mine / theirs, 3) for mine, theirs in pairs]
    return CellReport(
        cell=cell,
        unit=unit,
        standings=tuple(ahead + [x for x in standings if x.error]),
        best_peer=best.peer if best else None,
        ratio=round(statistics.median(ratios), 3) if ratios else None,
        ratios=tuple(ratios),
        note=_note(best.peer if best else None, invalid),
    )


def _invalid(ahead: Sequence[Standing]) -> dict[str, str]:
    """Peers whose best way is invalid, with what it reached; one measured in rounds goes before one measured once."""
    best: dict[str, Standing] = {}
    for x in sorted(ahead, key=lambda x: x.rounds, reverse=True):
        best.setdefault(x.peer, x)
    return {peer: x.verdict.removeprefix(INVALID) for peer, x in best.items() if x.verdict.startswith(INVALID)}


def _note(best: str | None, invalid: Mapping[str, str]) -> str:
    notes = [f"no ratio: the best peer ({best}) is invalid, {invalid[best]}"] if best and best in invalid else []
    notes += [f"{peer} is invalid, {reached}" for peer, reached in invalid.items() if peer != best]
    return "; ".join(notes)


def _standing(results: Sequence[Result], rounds: int) -> Standing:
    """``results``: of one way to run one contender, in order."""
    first = results[0]
    cell, spec = CELLS[first.cell], model_spec(SHAPES[first.shape])
    job = make_job(spec, cell, Path(), first.threads, {})
    runs = [result.run for result in results if result.run]
    each = tuple(round(1 / cell.speed(run) if cell.unit == "s" else cell.speed(run), 2) for run in runs)
    shares, beside = [], ""
    if runs and cell.unit != "s":
        around = [result.before.at_best(result.after) for result in results if result.run]
        least = [limit_seconds(spec, job, limits, first.bits) for limits in around]
        shares = [seconds / run.seconds for seconds, run in zip(least, runs, strict=True)]
        if first.peer != OURS:
            middle = around[least.index(statistics.median_low(least))]
            beside = verdict(first, statistics.median(each), middle)
    return Standing(
        peer=first.peer,
        setting=first.setting,
        version=first.version,
        speed=statistics.median(each) if each else 0.0,
        each=each,
        rounds=rounds,
        share=round(statistics.median(shares), 3) if shares else None,
        peak_bytes=max((run.peak_bytes for run in runs), default=0),
        ready_s=round(statistics.median(run.ready_s for run in runs), 2) if runs else 0.0,
        verdict=beside,
        error=first.error,
        command=first.command,
    )


def verdict(result: Result, speed: float, limits: Limits) -> str:
    """A peer's speed beside its reference, scaled by what the limits of then and of now allow."""
    figure = REFERENCES.get(result.shape, {}).get((result.bits, result.peer), {}).get(result.cell)
    if figure is None:
        return "no reference"
    if REFERENCE_MACHINE not in result.machine and result.cell != BY_BANDWIDTH:
        return "no reference for this processor"
    spec = model_spec(SHAPES[result.shape])
    job = make_job(spec, CELLS[result.cell], Path(), result.threads, {})
    then, now = (limit_seconds(spec, job, x, result.bits) for x in (REFERENCE_LIMITS, limits))
    share = speed / (figure * then / now)
    return f"{'valid: ' if share >= ENOUGH else INVALID}{100 * share:.0f} % of its reference"


def _each(choose: Callable[[list[float]], float], limits: Sequence[Limits]) -> Limits:
    return Limits(*(choose([getattr(limit, name) for limit in limits]) for name in Limits.__slots__))


def table(report: PeersReport) -> str:
    low, high = report.limits
    lines = [f"{report.shape}, weights of {report.bits} bits, {report.threads} threads"]
    for cell in report.cells:
        lines.append(f"{cell.cell} ({cell.unit})")
        for x in cell.standings:
            head = f"  {x.peer:12} {x.setting:32}"
            if x.error:
                lines.append(f"{head} failed: {reason(x.error)}")
                continue
            rounds = f"median of {len(x.each)}" if x.rounds else "1 run"
            digits = 2 if cell.unit == "s" else 1
            span = f"{min(x.each):.{digits}f} to {max(x.each):.{digits}f}"
            lines.append(f"{head} {x.speed:8.{digits}f} ({rounds}, {span})")
            if cell.unit == "s":
                lines[-1] += f"; {x.ready_s:.2f} s from the start of the process"
            if x.share is not None:
                lines[-1] += f"; {100 * x.share:.0f} % of the limit"
            lines[-1] += f"; peak {x.peak_bytes / (1 << 20):.0f} MiB"
            lines[-1] += f"; {x.verdict}" if x.verdict else ""
        if cell.ratio is not None:
            lines.append(
                f"  ratio to {cell.best_peer}: {cell.ratio:.2f} ({min(cell.ratios):.2f} to {max(cell.ratios):.2f})"
            )
        if cell.note:
            lines.append(f"  {cell.note}")
    spans = [
        f"{name} {getattr(low, name) / 1e9:.1f} to {getattr(high, name) / 1e9:.1f}" for name in ("fp32", "bf16", "int8")
    ]
    lines.append(f"limits: {low.read_rate / 1e9:.1f} to {high.read_rate / 1e9:.1f} GB/s read; {', '.join(spans)} Gop/s")
    lines.append(f"machine: {report.machine}; {report.turns[0][:16]} to {report.turns[1][:16]} UTC")
    if report.load[1] > QUIET:
        lines.append(f"PROVISIONAL: {report.load[0]:.1f} to {report.load[1]:.1f} processes wanted to run meanwhile")
    return "\n".join(lines)
