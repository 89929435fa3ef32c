"""``penstock bench``: what Penstock says about its speed, measured here."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Annotated

import typer

from penstock.cli.exits import emit, guarded
from penstock.cli.options import MODEL_HELP

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure on this machine."""


@app.command("startup")
@guarded
def startup(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="measured runs, after one to warm the file cache")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time from the start of the process to the first token; the bundled model by default."""
    from penstock.bench.startup import measure_startup

    report = measure_startup(model, runs=runs)
    if as_json:
        emit(json.dumps(dataclasses.asdict(report)))
        return
    emit(f"process start to first token: median {report.median_s:.2f} s of {runs} runs")
    emit(f"  from {report.min_s:.2f} to {report.max_s:.2f} s; first run, cold file cache: {report.first_s:.2f} s")
    emit(f"  command: {shlex.join(report.command)}")
    emit(f"  machine: {report.machine}, {report.cpus} CPUs, Python {report.python}; {report.date}")


@app.command("overhead")
@guarded
def overhead(
    running: Annotated[int, typer.Option(min=1, max=4096, help="requests in each step")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time per step spent outside the model: scheduler and batch arrays."""
    from penstock.bench.overhead import measure_overhead

    rows = measure_overhead(running)
    if as_json:
        emit(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    for row in rows:
        emit(
            f"{row.scenario:15} {row.total_ms:.3f} ms a step at {row.running} requests"
            f" (scheduler {row.scheduler_ms:.3f}, inputs {row.inputs_ms:.3f}; worst round {row.worst_round_ms:.3f};"
            f" {row.arrivals:.1f} arrivals a step)"
        )
