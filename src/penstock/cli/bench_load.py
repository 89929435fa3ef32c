"""``penstock bench serve``, ``latency``, ``offline`` and ``cost``: load, what came of it, and what it costs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.base import EngineError, InvalidRequest, PenstockError
from penstock.bench.load.options import LoadOptions
from penstock.cli.exits import emit
from penstock.cli.options import engine_options, field_options, flags_of

if TYPE_CHECKING:
    from penstock.bench.load.ceiling import Ceiling
    from penstock.bench.load.report import Report
    from penstock.bench.load.run import Bench
    from penstock.spec import ModelSpec

QUICK = {"requests": 64, "input_len": "64", "output_len": "32"}
"""What --quick makes of options that are left at their defaults."""
CLEAR = "\r\x1b[K"
ONLINE = """
    url api_key chat turns think rate burstiness concurrency scenario tolerance slo extra_body vocabulary timeout quick
""".split()
"""Options that mean nothing without a server."""


@engine_options
@field_options(LoadOptions, "load")
def serve(*, load: dict[str, Any], engine: dict[str, Any]) -> None:
    """Load on a server over HTTP: latencies, throughput, goodput, and how far they can be trusted.

    TTFT, time to first token: from when a request was due (its intended arrival, however late the client was) to its
    first event with text. ITL, inter-token latency: from an event with text to the next of the same request. TPOT, time
    per output token: from the first event with text to the last, over tokens - 1. E2E: from due to the last byte.
    """
    if load["quick"]:
        load |= {name: value for name, value in QUICK.items() if load[name] == LoadOptions.default(name)}
    options = _asked(load)
    _write(_measured(options, engine, lambda bench: bench.run()), options)


@engine_options
def latency(
    url: Annotated[str | None, typer.Option(help="server to measure; without it one is started here and ended")] = None,
    api_key: Annotated[str | None, typer.Option(help="key that it wants")] = None,
    model: Annotated[str | None, typer.Option(help="as for serve")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask /chat/completions, not /completions")] = False,
    input_len: Annotated[str, typer.Option(help="tokens of a prompt; several with commas")] = "16,128,512",
    output_len: Annotated[int, typer.Option(min=1, max=1_000_000, help="tokens of each answer")] = 32,
    batch: Annotated[int, typer.Option(min=1, max=65536, help="requests at a time")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="requests at each length, for each at a time")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="of the prompts")] = 0,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="prompts of random token ids below this")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything to this file; - is stdout")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with plots to this file")] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """One request at a time: what a prompt of each length takes, and each token after it."""
    given: dict[str, Any] = {
        "url": url, "api_key": api_key, "model": model, "chat": chat, "seed": seed, "vocabulary": vocabulary,
        "output_len": str(output_len), "concurrency": str(batch), "requests": rounds * batch, "warmup": 2,
    }  # fmt: skip
    options = _asked(given | {"json_file": json_file, "html_file": html_file})
    lengths = input_len.split(",")
    for each in lengths:
        dataclasses.replace(options, input_len=each)  # refuses what is no length
    _write(_measured(options, engine, lambda bench: bench.by_length(lengths)), options)


@engine_options
@field_options(LoadOptions, "load", *ONLINE)
def offline(*, load: dict[str, Any], engine: dict[str, Any]) -> None:
    """All prompts at once, in this process and without a server: tokens a second, peak memory, share of the limit."""
    from penstock import __version__
    from penstock.bench.load.offline import measure_offline

    options = _asked(load)
    spec, quant = _looked_at(options.model, engine)
    before = _ceiling(spec, quant, engine)
    report = measure_offline(options, engine, __version__)
    _write(_with_limits(report, before.again()), options)


def cost(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT...", help="files that --json of a bench wrote")],
    price_per_hour: Annotated[float, typer.Option(min=0, help="dollars of the machine: rent, or depreciation")],
    watts: Annotated[float, typer.Option(min=0, help="that it draws, where joules were not measured")] = 0.0,
    price_per_kwh: Annotated[float, typer.Option(min=0, help="dollars of energy")] = 0.0,
    utilization: Annotated[float, typer.Option(min=0.001, max=1, help="share of the hours with such load")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Dollars for a million tokens, by load: from measurements and prices."""
    from penstock.bench.load.cost import Prices, costs, table

    prices = Prices(price_per_hour, watts, price_per_kwh, utilization)
    found = costs(reports, prices)
    if as_json:
        prices_and_costs = {"prices": dataclasses.asdict(prices), "costs": [dataclasses.asdict(each) for each in found]}
        emit(json.dumps(prices_and_costs))
    else:
        emit(table(found, prices))


def _asked(load: dict[str, Any]) -> LoadOptions:
    """Raises InvalidRequest: invalid_parameter. PenstockError: (output_failed) of a file, before any measurement."""
    options = LoadOptions(**load)
    for path in (options.json_file, options.html_file):
        if path is not None and str(path) != "-":
            _save(path, "")
    return options


def _measured(
    options: LoadOptions, engine: dict[str, Any], run: Callable[[Bench], Coroutine[Any, Any, Report]]
) -> Report:
    from penstock import __version__
    from penstock.bench.load.run import Bench, Target, target_of

    if options.url is not None:
        if given := flags_of(engine):
            why = "they say how a server is started, and --url names one that runs"
            raise InvalidRequest(
                "invalid_parameter", f"{given[0]} does not go with --url", why=why, fix="leave one out"
            )
        bench = Bench(options, target_of(options), __version__, _say, _progress)
        return asyncio.run(run(bench))
    from penstock.bench.load.http import client_of
    from penstock.bench.load.target import own_server

    spec, quant = _looked_at(options.model, engine)
    with own_server(options.model, flags_of(engine)) as own:
        client = client_of(own.url, options.api_key or "")
        target = Target(client, shlex.join(own.command), pid=own.pid, vocabulary=spec.vocab_size)
        before = _ceiling(spec, quant, engine)
        report = asyncio.run(run(Bench(options, target, __version__, _say, _progress)))
        ceiling = before.again()
    return _with_limits(report, ceiling)


def _with_limits(report: Report, ceiling: Ceiling) -> Report:
    points = [dataclasses.replace(point, limit=ceiling.share(point.figures)) for point in report.points]
    return dataclasses.replace(report, points=tuple(points))


def _looked_at(model: str | None, engine: dict[str, Any]) -> tuple[ModelSpec, str]:
    """A decoder's numbers, and the integers that its weights will be.

    Raises:
        InvalidRequest: (model_does_not_generate).
    """
    from penstock.assemble import find_model
    from penstock.quant import stored_quantization
    from penstock.spec import ModelSpec
    from penstock.spec.encoder import read_any_spec

    folder = find_model(model)
    spec = read_any_spec(folder)
    if not isinstance(spec, ModelSpec):
        fix = "name a model that generates text"
        raise InvalidRequest("model_does_not_generate", f"{folder.name} makes vectors, not text", fix=fix)
    return spec, stored_quantization(folder, engine["quant"])


def _ceiling(spec: ModelSpec, quant: str, engine: dict[str, Any]) -> Ceiling:
    from penstock.bench.load.ceiling import Ceiling

    return Ceiling.measure(spec, quant, engine["dtype"], engine["num_threads"])


def _say(line: str) -> None:
    typer.echo(f"{CLEAR if sys.stderr.isatty() else ''}{line}", err=True)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and done % max(1, total // 50) == 0:
        typer.echo(f"{CLEAR}{done} of {total}", nl=False, err=True)


def _write(report: Report, options: LoadOptions) -> None:
    from penstock.bench.load.html import page
    from penstock.bench.load.report import as_json
    from penstock.bench.load.table import table

    if options.html_file is not None:
        _save(options.html_file, page(report))
    if options.json_file is not None and str(options.json_file) == "-":
        emit(as_json(report))
    else:
        if options.json_file is not None:
            _save(options.json_file, as_json(report) + "\n")
        emit(table(report))
    if not any(point.figures.succeeded for point in report.points):
        why = "; ".join(f"{n} {code}" for point in report.points for code, n in point.figures.errors.items())
        raise EngineError("bench_run_failed", "No request was answered", why=why, fix="see the warnings above")


def _save(path: Path, text: str) -> None:
    """Raises PenstockError: (output_failed)."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise PenstockError("output_failed", f"{path} cannot be written", why=why, fix="name another file") from error
