"""``penstock bench serve`` against a server whose delays and faults are scripted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.base import EngineError
from penstock.bench.load import report as report_module
from penstock.bench.load.checks import ClientLoad
from penstock.bench.load.cost import Prices, costs
from penstock.bench.load.cost import table as cost_table
from penstock.bench.load.html import page
from penstock.bench.load.machine import growth, resident_bytes
from penstock.bench.load.metrics import Figures
from penstock.bench.load.options import Load, LoadOptions
from penstock.bench.load.report import SCHEMA, Report, as_json
from penstock.bench.load.run import Bench, target_of
from penstock.bench.load.stats import Spread
from penstock.bench.load.table import table
from penstock.cli.app import app
from scripted_server import Script, Scripted

SMALL: dict[str, Any] = {"requests": 12, "input_len": "20", "output_len": "5", "warmup": 0, "timeout": 20.0}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "bench-report.md"


def measured(server: Scripted, **options: Any) -> Report:
    async def run() -> Report:
        async with server.serving():
            asked = LoadOptions(**(SMALL | options), url=server.url)
            return await Bench(asked, target_of(asked), "0").run()

    return asyncio.run(run())


def honest(number: int, asked: dict[str, Any]) -> Script:
    return Script()


def test_a_run_is_what_was_asked_for() -> None:
    server = Scripted(honest)
    report = measured(server, vocabulary=90, concurrency="1,3", api_key="secret", warmup=2, price_per_hour=1.0)
    assert [len(asked["prompt"]) for asked in server.seen] == [20] * (2 + 2 * 12)
    assert len({tuple(asked["prompt"]) for asked in server.seen}) == 26  # no prompt comes twice
    assert {asked["max_tokens"] for asked in server.seen} == {5} and server.seen[0]["ignore_eos"] is True
    assert set(server.keys) == {"Bearer secret"} and "secret" not in as_json(report)
    assert [point.load for point in report.points] == ["1 at a time", "3 at a time"] and report.model == "scripted"
    for point, most in zip(report.points, (1, 3), strict=True):
        f = point.figures
        assert (f.requests, f.succeeded, f.errors) == (12, 12, {}) and f.peak_in_flight <= most
        assert (f.input_tokens, f.output_tokens, f.events) == (240, 60, 60)
        assert f.ttft is not None and f.itl is not None and (f.ttft.n, f.itl.n) == (12, 48)
        assert point.money is not None and point.money.output_tokens_per_dollar == pytest.approx(3600 * f.output_per_s)


def test_words_are_counted_by_the_server() -> None:
    """Two tokens a word and three more: 20 tokens are 8 words and a half."""
    server = Scripted(honest)
    report = measured(server, warmup=1)
    prompts = [asked["prompt"] for asked in server.seen if asked["max_tokens"] == 5]
    assert len(prompts) == 13 and {len(prompt.split()) for prompt in prompts} <= {8, 9}
    assert not any("another length" in warning for warning in report.points[0].warnings)


@pytest.mark.parametrize(("model", "longest"), [("long", 4000), ("short", 100), (None, 100)])
def test_prompts_fit_into_the_context_of_the_model_that_is_asked(model: str | None, longest: int) -> None:
    server = Scripted(honest, models={"short": 100, "long": 4000})
    asked = {"model": model, "vocabulary": 90, "requests": 2, "input_len": "700", "output_len": "5"}
    report = measured(server, **asked)
    assert {asked["model"] for asked in server.seen} == {model or "short"}
    lengths = {len(asked["prompt"]) for asked in server.seen}
    assert lengths == {700} if longest == 4000 else max(lengths, default=0) < longest, (lengths, report.notes)


def test_delays_are_seen_where_they_are() -> None:
    report = measured(Scripted(lambda number, asked: Script(first=0.05, gap=0.02)), requests=4, concurrency="4")
    f = report.points[0].figures
    assert f.ttft and f.itl and f.tpot and f.e2e
    assert f.ttft.p50 >= 0.05 and f.itl.p50 >= 0.02 and f.tpot.p50 >= 0.02 and f.e2e.p50 >= 0.05 + 5 * 0.02


def test_a_slow_server_cannot_hide_the_queue() -> None:
    """One request at a time, 30 ms each, all due at once: the k-th waits for k, wherever it queues."""
    for most in (None, "1"):
        server = Scripted(lambda number, asked: Script(first=0.03), alone=most is None)
        point = measured(server, rate="inf", requests=6, concurrency=most).points[0]
        waits = sorted(row[2] - row[0] for row in point.requests)
        assert all(wait >= 0.03 * (k + 1) for k, wait in enumerate(waits)), waits
        late = point.figures.late
        assert late is not None and (late.p50 >= 0.06) == (most is not None)


def test_faults_have_codes_and_harm_nobody_else() -> None:
    kinds = [
        Script(),
        Script(status=503),
        Script(cut=2),
        Script(last='{"error": {"code": "engine_stopped"}}'),
        Script(tokens=0),
    ]
    server = Scripted(lambda number, asked: kinds[(number - 2) % 5] if number >= 2 else Script())  # two calibrate
    report = measured(server, requests=10, concurrency="1")
    f, warnings = report.points[0].figures, " ".join(report.points[0].warnings)
    assert f.errors == {"http_503_queue_full": 2, "connection_lost": 2, "stream_engine_stopped": 2, "no_text": 2}
    assert f.succeeded == 2 and f.ttft is not None and f.ttft.n == 2 and f.output_tokens == 10
    assert "8 of 10 requests failed" in warnings and "no room" in warnings


def test_timeouts_are_errors_too() -> None:
    server = Scripted(lambda number, asked: Script(gap=5.0 if number == 4 else 0.0))
    f = measured(server, requests=4, timeout=0.5).points[0].figures
    assert f.errors == {"timeout": 1} and f.succeeded == 3


def test_counts_that_disagree_are_reported() -> None:
    def warned(**script: Any) -> str:
        server = Scripted(lambda number, asked: Script() if number < 2 else Script(**script))
        return "\n".join(measured(server).points[0].warnings)

    assert "12 answers are shorter than asked: 36 tokens of 60" in warned(tokens=3)
    assert "the server sent no usage with 12 answers" in warned(usage=None)
    assert "12 answers brought more events" in warned(usage=4)
    assert "an event brings 2.50 tokens" in warned(tokens=2, usage=5)
    assert "in the server's cache" in warned(cached=15)


def test_turns_hold_what_was_said_before() -> None:
    server = Scripted(honest)
    report = measured(server, chat=True, requests=2, turns=3, concurrency="1")
    asked = [body["messages"] for body in server.seen[2:]]
    assert [len(messages) for messages in asked] == [1, 3, 5] * 2
    assert asked[2][:3] == [*asked[1][:2], asked[1][2]] and asked[1][1] == {"role": "assistant", "content": "w " * 5}
    assert report.points[0].figures.offered_per_s is None
    broken = Scripted(lambda number, asked: Script(status=500 if number == 3 else 200))
    assert measured(broken, chat=True, requests=2, turns=3, concurrency="1").points[0].figures.requests == 5


def test_a_trace_keeps_its_times_and_a_rate_stretches_them(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    lines = [{"timestamp": 100 * i, "input_length": 9, "output_length": 2} for i in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    for rate, gap in ((None, 0.1), ("20", 0.05)):
        due = [row[0] for row in measured(Scripted(honest), trace=trace, rate=rate).points[0].requests]
        assert due == pytest.approx([gap * i for i in range(5)])


def test_too_long_prompts_are_cut_and_told() -> None:
    server = Scripted(honest)
    report = measured(server, vocabulary=9, requests=3, input_len="900")
    assert {len(asked["prompt"]) for asked in server.seen} == {495}
    assert report.notes == ("3 turns did not fit into the context of 500 tokens and were cut or left out",)


def test_a_scenario_finds_the_rate_that_the_server_can_keep() -> None:
    """A server that takes 10 ms for each request, one at a time, and limits that allow no queue to speak of."""
    server = Scripted(lambda number, asked: Script(first=0.01), alone=True)
    report = measured(
        server, scenario="server", slo="ttft=0.2", requests=60, tolerance=0.5, vocabulary=9, output_len="1"
    )
    search = report.search
    assert search is not None and search.limits == {"ttft": 0.2} and 0 < search.rate < 110
    assert len(search.probes) == len(report.points) - 1 and report.points[0].load == "all at once"
    passed = {point.value: point.figures.ttft.p99 <= 0.2 for point in report.points[1:] if point.figures.ttft}
    assert (passed[search.rate] or not search.confirmed) and (search.failed is None or search.failed > search.rate)
    assert measured(server, scenario="offline", vocabulary=9).search is None


def test_servers_that_are_none_are_named() -> None:
    async def run(url: str) -> None:
        asked = LoadOptions(**SMALL, url=url)
        await Bench(asked, target_of(asked)).run()

    for url in ("http://127.0.0.1:9", f"http://{'a' * 80}"):
        with pytest.raises(EngineError, match="server_unreachable"):
            asyncio.run(run(url))
    with pytest.raises(EngineError, match="bad_server"):
        measured(Scripted(lambda number, asked: Script(usage=None)))


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> Report:
    report = measured(Scripted(honest), concurrency="1,4", slo="ttft=1", price_per_hour=2.0, vocabulary=9)
    return dataclasses.replace(report, notes=("<b>a note</b>",))


def test_the_json_is_the_report(full: Report, tmp_path: Path) -> None:
    read = json.loads(as_json(full))
    assert read["schema"] == SCHEMA and len(read["points"]) == 2 and read["points"][0]["figures"]["succeeded"] == 12
    assert len(read["points"][0]["requests"]) == 12
    nowhere = dataclasses.replace(full.points[0], value=math.inf, joules=math.nan)
    assert json.loads(as_json(dataclasses.replace(full, points=(nowhere,))))["points"][0]["joules"] is None


def test_every_field_of_the_json_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    kinds = [
        Report,
        Figures,
        Spread,
        ClientLoad,
        *(getattr(report_module, n) for n in "Point Search ServerLoad Share Money".split()),
    ]
    missing = [
        f"{kind.__name__}.{f.name}" for kind in kinds for f in dataclasses.fields(kind) if f"`{f.name}`" not in text
    ]
    assert not missing and f"`{SCHEMA}`" in text


class Parsed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


def test_the_page_needs_nothing_but_itself(full: Report) -> None:
    text = page(full)
    parsed = Parsed()
    parsed.feed(text)
    assert parsed.links == [] and not {"script", "link", "img", "iframe", "b"} & set(parsed.tags)
    assert parsed.tags.count("svg") == 2 + 2 + 2 and "url(" not in text and "@import" not in text
    assert "&lt;b&gt;a note" in text and "time to first token" in text


def test_the_table_has_every_load_and_definition(full: Report) -> None:
    text = table(full)
    for words in (
        "1 at a time",
        "4 at a time",
        "goodput",
        "TPOT  time per output token",
        "energy not readable",
        "client ",
    ):
        assert words in text
    assert "WARNING p99 of 12 requests" in text and "dollars an hour" in text


def test_costs_follow_from_tokens_and_prices(full: Report, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(as_json(full))
    plain, half, powered = (costs([path], Prices(*p))[0] for p in ((3.6,), (3.6, 0, 0, 0.5), (0.0, 1000.0, 3.6)))
    f = full.points[0].figures
    assert plain.output == pytest.approx(1e6 * f.seconds * 0.001 / 60, rel=1e-4)
    assert plain.all == pytest.approx(plain.output * 60 / 300) and plain.good == pytest.approx(plain.output)
    assert half.output == pytest.approx(2 * plain.output) and powered.output == pytest.approx(plain.output)
    assert (plain.of_energy, powered.of_energy) == (0.0, 1.0)
    assert "cheapest: " in cost_table(costs([path, path], Prices(1.0)), Prices(1.0))


def test_the_commands_refuse_what_they_cannot_use(tmp_path: Path) -> None:
    other = tmp_path / "x.json"
    other.write_text('{"schema": "penstock.bench/0", "model": "m", "points": []}')
    cases = [
        (["cost", str(other), "--price-per-hour", "1"], "invalid_report"),
        (["cost", str(tmp_path / "none"), "--price-per-hour", "1"], "file_not_found"),
        (["serve", "--url", "http://127.0.0.1:9", "--quant", "int8"], "invalid_parameter"),
        (["serve", "--url", "http://127.0.0.1:9"], "server_unreachable"),
        (["serve", "--slo", "x"], "invalid_parameter"),
        (["serve", "--url", "http://127.0.0.1:9", "--json", f"{tmp_path}/no/r.json"], "output_failed"),
        (["latency", "--input-len", "16,x"], "invalid_parameter"),
        (["serve", "--model", str(tmp_path)], "model_not_found"),
    ]
    for words, code in cases:
        done = CliRunner().invoke(app, ["bench", *words])
        assert done.exit_code in (1, 2, 3) and f"code: {code}" in done.output + done.stderr, (words, done.output)


def test_a_load_has_a_name() -> None:
    assert str(Load("trace", 0.0)) == "as recorded"


def test_answers_are_asked_for_again_alone() -> None:
    """Six at a time; of the second six the server gives one another answer than it gives to the same request alone."""
    for options, expected in (({"verify": 4}, (4, 0)), ({"verify": 99, "swapped": True}, (6, 1))):
        odd = options.pop("swapped", False)
        server = Scripted(lambda number, asked, odd=odd: Script(tokens=4 if odd and number == 5 else None))
        report = measured(server, requests=6, concurrency="6", **options)
        assert report.points[0].verified == expected
        assert ("1 DIFFER" in table(report)) == odd


def test_memory_that_grows() -> None:
    assert growth([1]) is None
    assert growth([50, 100, *[100] * 8]) == 0.0
    assert growth([100] * 18 + [110] * 2) == pytest.approx(0.1)
    assert resident_bytes(os.getpid()) > 1 << 20
