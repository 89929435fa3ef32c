"""The parts of ``penstock bench serve``: arithmetic on given times, arrivals, lengths, traces, the search, HTTP."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import h11
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base import PenstockError
from penstock.bench.load import machine
from penstock.bench.load.arrivals import arrival_times
from penstock.bench.load.checks import ClientLoad, warnings
from penstock.bench.load.drive import Record
from penstock.bench.load.http import Broken, ResponseParser, client_of
from penstock.bench.load.lengths import Lengths, parse_lengths
from penstock.bench.load.metrics import figures, meets, tpot
from penstock.bench.load.openai import Answer, Stream
from penstock.bench.load.options import Load, LoadOptions, parse_slo
from penstock.bench.load.plots import ticks
from penstock.bench.load.prompts import read_prompts
from penstock.bench.load.report import money
from penstock.bench.load.search import largest_rate
from penstock.bench.load.stats import percentile, spread
from penstock.bench.load.traces import mean_rate, read_trace
from penstock.bench.load.workload import Piece, Session, TokenWriter, Turn, WordWriter, fitted, synthetic

FINITE = st.floats(0, 1e6)

# -- figures -----------------------------------------------------------------------------------------------------------


def record(due: float = 0.0, times: tuple[float, ...] = (1.0, 1.5, 2.0), **others: object) -> Record:
    usual = {
        "session": 0,
        "turn": 0,
        "due": due,
        "sent": due,
        "done": times[-1] if times else due,
        "times": times,
        "asked_in": 10,
    }
    usual |= {
        "asked_out": len(times),
        "prompt_tokens": 10,
        "output_tokens": len(times),
        "cached_tokens": 0,
        "finish": "length",
    }
    return Record(**(usual | {"error": ""} | others))


def test_latency_counts_from_when_a_request_was_due() -> None:
    late = record(due=1.0, sent=4.0, times=(5.0, 5.5, 6.5), done=7.0)
    found = figures([late], {}, open_loop=True)
    assert (found.ttft.p50, found.e2e.p50, found.late.p50) == (4.0, 6.0, 3.0)
    assert (found.itl.n, found.itl.p50, found.itl.max, found.tpot.p50) == (2, 0.5, 1.0, 0.75)


def test_a_token_is_what_usage_says_and_an_event_what_came() -> None:
    bunched = record(times=(1.0, 2.0, 3.0), output_tokens=9)
    assert tpot(bunched) == 2.0 / 8 and tpot(record(times=(1.0,))) is None
    found = figures([bunched, record(times=(1.0, 2.0), output_tokens=None)], {}, open_loop=False)
    assert (found.output_tokens, found.events, found.offered_per_s) == (11, 5, None)


def test_failures_are_counted_and_measured_apart() -> None:
    records = [
        record(),
        record(due=1.0, times=(1.5, 2.0), done=3.0),
        record(due=2.0, times=(), error="http_503_queue_full", done=4.0),
        record(due=2.0, times=()),
    ]
    found = figures(records, {"ttft": 0.5, "itl": 9.0}, open_loop=True)
    assert found.errors == {"http_503_queue_full": 1, "no_text": 1} and found.succeeded == 2 and found.ttft.n == 2
    assert (found.good, found.good_tokens, found.good_per_s) == (1, 2, 1 / found.seconds)
    assert found.seconds == 4.0 and found.requests_per_s == 0.5 and found.offered_per_s == 1.5
    assert found.peak_in_flight == 2 and found.in_flight == (2 + 2 + 2 + 0) / 4
    assert money(found, 9.0).per_million_output == pytest.approx(1e6 * 9.0 * 4 / 3600 / 5)


@pytest.mark.parametrize(("slo", "met"), [("ttft=1", True), ("ttft=0.99", False), ("itl=0.5", True), ("itl=0.4", False),
    ("tpot=0.5", True), ("tpot=0.49", False), ("e2e=2,ttft=1", True), ("e2e=1.9,ttft=1", False)])  # fmt: skip
def test_goodput_is_of_requests_that_meet_every_limit(slo: str, met: bool) -> None:
    assert meets(record(), parse_slo(slo)) is met
    assert not meets(record(error="timeout"), {}) and not meets(record(times=()), {"e2e": 9.0})


def test_the_gap_that_counts_is_the_99th_percentile_of_a_hundred() -> None:
    times = (0.0, 10.0, *(10.0 + 0.1 * i for i in range(1, 100)))
    assert meets(record(times=times), {"itl": 0.2}) and not meets(record(times=times[:99]), {"itl": 0.2})


@given(st.lists(FINITE, min_size=1, max_size=200), st.sampled_from([1, 2.5, 50, 90, 95, 97.5, 99, 100]))
def test_percentiles_are_by_nearest_rank(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


@given(st.lists(st.lists(FINITE, max_size=9), max_size=20))
def test_a_spread_is_of_all_values(groups: list[list[float]]) -> None:
    values, found = list(itertools.chain(*groups)), spread(groups)
    assert (found is None) == (not values)
    if found is not None:
        assert found.n == len(values) and found.mean == pytest.approx(float(np.mean(values)))
        named = {f"p{p}": percentile(values, p) for p in (50, 90, 95, 99)}
        assert named == {name: getattr(found, name) for name in named} and found.max == max(values)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = random.Random(0)
    samples = [[[rng.expovariate(1.0)] for _ in range(60)] for _ in range(60)]
    found = [spread(sample) for sample in samples]
    means = sum(low <= 1.0 <= high for s in found for low, high in [s.mean_95])
    medians = sum(low <= math.log(2) <= high for s in found for low, high in [s.p50_95])
    assert means >= 50 and medians >= 50  # of 60, at 95 %


def test_values_of_one_request_are_no_independent_witnesses() -> None:
    rng = random.Random(1)
    levels = [rng.expovariate(1.0) for _ in range(30)]
    together = spread([[level] * 20 for level in levels])
    alone = spread([[level] for level in levels for _ in range(20)])
    wide, narrow = (high - low for low, high in (together.mean_95, alone.mean_95))
    assert together.mean == alone.mean and wide > 3 * narrow


QUIET = ClientLoad(0.1, 0.001, 0.01)
CLEAN = [record(due=i, times=(i + 0.1, i + 0.2, i + 0.3), session=i) for i in range(120)]


def said(records: list[Record], client: ClientLoad = QUIET) -> str:
    return "\n".join(warnings(records, figures(records, {}, open_loop=True), client))


def test_nothing_is_said_of_a_clean_run() -> None:
    assert said(CLEAN) == ""


@pytest.mark.parametrize(
    ("change", "client", "words"),
    [
        ({"error": "timeout", "message": "why"}, QUIET, "1 of 120 requests failed (1 timeout); the first said: why"),
        ({"asked_out": 9}, QUIET, "1 answers are shorter than asked: 3 tokens of 9"),
        ({"asked_out": 2}, QUIET, "1 answers are longer than asked"),
        ({"output_tokens": None}, QUIET, "no usage with 1 answers"),
        ({"output_tokens": 2, "asked_out": 2}, QUIET, "1 answers brought more events"),
        ({"prompt_tokens": 30}, QUIET, "1 prompts are of another length than asked: 30 tokens, asked were 10"),
        ({"sent": 9.0}, QUIET, "were sent"),
        ({}, ClientLoad(0.9, 0.0, 0.0), "it may be the bottleneck"),
        ({}, ClientLoad(0.1, 0.02, 0.0), "20 ms late"),
        ({}, ClientLoad(0.1, 0.0, 3.0), "stood still for 3.0 s"),
    ],
)
def test_each_doubt_has_its_cause(change: dict[str, object], client: ClientLoad, words: str) -> None:
    changed = [replace(CLEAN[0], **change), *CLEAN[1:]]
    if "sent" in change:
        changed = [replace(r, sent=r.due + 0.08) for r in CLEAN]
    assert words in said(changed, client) and len(said(changed, client).splitlines()) == 1


def test_few_requests_bunched_tokens_and_a_growing_queue_are_named() -> None:
    assert "p99 of 99 requests is their largest" in said(CLEAN[:99])
    bunched = [replace(r, output_tokens=6, asked_out=6) for r in CLEAN]
    assert "an event brings 2.00 tokens on average" in said(bunched)
    overrun = [record(due=i, times=(i + 0.1 * i, i + 0.1 * i + 1), done=200.0) for i in range(1, 121)]
    assert "the queue grew: median TTFT 2.00 s in the first third, 10.00 in the last" in said(overrun)


# -- arrivals, lengths, workloads --------------------------------------------------------------------------------------


@given(st.floats(0.01, 1000), st.floats(0.3, 30), st.integers(0, 2**32))
def test_arrivals_have_their_rate_and_burstiness(rate: float, shape: float, seed: int) -> None:
    n = 2000
    times = arrival_times(n, rate, shape, seed)
    gaps = np.diff([0.0, *times])
    assert times == sorted(times) and times == arrival_times(n, rate, shape, seed)
    assert abs(gaps.mean() * rate - 1) < 6 / math.sqrt(shape * n)
    assert abs(gaps.std() * rate * math.sqrt(shape) - 1) < 0.5
    assert np.allclose(times, np.asarray(arrival_times(n, 1.0, shape, seed)) / rate)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0] != arrival_times(3, 5.0, 1.0, 1)


def test_lengths_are_of_their_distribution() -> None:
    rng = random.Random(0)
    drawn = {text: [parse_lengths("--x", text).draw(rng) for _ in range(4000)]
             for text in ("7", "uniform:5:9", "lognormal:100:0.5", "lognormal:100:2:150")}  # fmt: skip
    assert set(drawn["7"]) == {7} and set(drawn["uniform:5:9"]) == {5, 6, 7, 8, 9}
    logs = np.log(drawn["lognormal:100:0.5"])
    assert abs(np.median(drawn["lognormal:100:0.5"]) - 100) < 5 and abs(logs.std() - 0.5) < 0.03
    assert max(drawn["lognormal:100:2:150"]) == 150 and min(drawn["lognormal:100:2:150"]) >= 1


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "uniform:9:5", "uniform:0:5", "lognormal:0:1", "normal:1:1", "9e9"]
)
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(PenstockError, match="--input-len"):
        LoadOptions(input_len=text)


@pytest.mark.parametrize(
    "options",
    [
        {"requests": 0}, {"rate": "0"}, {"rate": "x"}, {"concurrency": "1.5"}, {"rate": "1", "concurrency": "1,2"},
        {"scenario": "x"}, {"scenario": "server", "rate": "1"}, {"extra_body": "[]"}, {"extra_body": "{"},
        {"slo": "ttft"}, {"slo": "ttft=-1"}, {"slo": "x=1"}, {"slo": "ttft=1,ttft=2"}, {"rate": "nan"},
        {"trace": Path("x"), "turns": 2}, {"trace": Path("x"), "prompts": Path("y")}, {"timeout": math.nan},
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PenstockError) as caught:
        LoadOptions(**options)
    assert caught.value.code == "invalid_parameter" and caught.value.why


def test_options_say_what_is_measured() -> None:
    assert LoadOptions().loads() == [Load("concurrency", 8)]
    assert LoadOptions(rate="1,inf", concurrency="4").loads() == [Load("rate", 1.0, 4), Load("rate", math.inf, 4)]
    assert [str(load) for load in LoadOptions(rate="1,inf").loads()] == ["1/s", "all at once"]
    assert len(LoadOptions(quick=True).loads()) == 3 and LoadOptions(trace=Path("x")).loads() == [Load("trace", 0.0)]
    assert LoadOptions(scenario="interactive").limits() == {"ttft": 0.45, "tpot": 0.04}
    assert LoadOptions(scenario="server", slo="e2e=3").limits() == {"e2e": 3.0}
    assert LoadOptions(extra_body='{"top_p": 1}').extra() == {"temperature": 0.0, "ignore_eos": True, "top_p": 1}
    assert "ignore_eos" not in LoadOptions(ignore_eos=False).extra()


def test_prompts_are_as_long_as_asked_and_share_what_they_should() -> None:
    fixed = Lengths("fixed", 10)
    sessions = synthetic(6, fixed, fixed, 3, content="a", shared=20, groups=2)
    prompts = [TokenWriter(50)(session.turns[0].pieces) for session in sessions]
    assert {len(prompt) for prompt in prompts} == {30} and max(map(max, prompts)) < 50
    assert prompts[0][:20] == prompts[2][:20] != prompts[1][:20] and len({tuple(p) for p in prompts}) == 6
    assert prompts != [
        TokenWriter(50)(s.turns[0].pieces) for s in synthetic(6, fixed, fixed, 3, content="b", shared=20)
    ]
    assert sessions == synthetic(6, fixed, fixed, 3, content="a", shared=20, groups=2)
    words = WordWriter(2.0, 4.0)
    assert [len(words(s.turns[0].pieces).split()) for s in sessions] == [13] * 6  # 13 words are 26 tokens, and 4


turns = st.builds(
    lambda pieces, output: Turn(tuple(Piece(f"{i}", n) for i, n in enumerate(pieces)), output),
    st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 300),
)  # fmt: skip


@given(st.lists(st.lists(turns, min_size=1, max_size=4), max_size=5), st.integers(2, 500))
def test_what_is_sent_fits(sessions: list[list[Turn]], longest: int) -> None:
    given_ones = [Session(tuple(session)) for session in sessions]
    kept, cut = fitted(given_ones, longest)
    for session in kept:
        assert sum((turn.asked or 0) + turn.output for turn in session.turns) <= longest
        assert all(turn.asked for turn in session.turns)
    assert (cut == 0) == (kept == given_ones) and fitted(given_ones, None) == (given_ones, 0)


def test_traces_of_every_format(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,396,109\n"
    )
    found = read_trace(azure, 9, scale=0.5)
    assert [(s.at, s.turns[0].asked, s.turns[0].output) for s in found] == [(0.0, 187, 22), (4.0, 198, 54)]
    assert mean_rate(found) == 0.25 and len(read_trace(azure, 1)) == 1
    mooncake = tmp_path / "m.jsonl.gz"
    lines = [{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]},
             {"timestamp": 5500, "input_length": 600, "output_length": 6, "hash_ids": [7, 9]}]  # fmt: skip
    mooncake.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    first, second = read_trace(mooncake, 9)
    assert (first.at, second.at, first.turns[0].asked, second.turns[0].asked) == (0.0, 2.5, 700, 600)
    one, two = (TokenWriter(99)(s.turns[0].pieces) for s in (first, second))
    assert one[:512] == two[:512] and one[512:600] != two[512:600]
    vidur = tmp_path / "v.csv"
    vidur.write_text("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n")
    (session,) = read_trace(vidur, 9)
    assert session.at is None and session.turns[0].asked == 3772 and mean_rate([session]) == math.inf
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-q", str(azure)], check=True)
        assert read_trace(tmp_path / "azure.csv.zst", 9) == read_trace(azure, 9)


def test_servegen_is_sampled_window_by_window(tmp_path: Path) -> None:
    (tmp_path / "s_rates.csv").write_text(
        "client,ts_s,rate_rps,cv,arrival,param1,param2\n0,600,0.5,1,Gamma,1,2\n0,0,0.1,1,Weibull,1,9\n1,0,0.2,1,Gamma,0.5,9\n"
    )
    lengths = [{"client": 0, "ts_s": 0, "input_tokens": {"40": 0.5, "50": 0.5}, "output_tokens": {"7": 1}},
               {"client": 1, "ts_s": 0, "input_tokens": {}, "output_tokens": {}}]  # fmt: skip
    (tmp_path / "s_lengths.jsonl").write_text("\n".join(map(json.dumps, lengths)))
    found = read_trace(tmp_path / "s_rates.csv", 10_000, seed=1)
    times = [session.at for session in found]
    assert len(found) == 60 + 300 and times == sorted(times) and max(times) <= 1200  # client 1 has no lengths
    assert {s.turns[0].asked for s in found} == {40, 50} and {s.turns[0].output for s in found} == {7}
    assert found == read_trace(tmp_path / "s_rates.csv", 10_000, seed=1) != read_trace(tmp_path / "s_rates.csv", 10_000)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", ""),
        ("a.csv", "x,y\n1,2\n"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n"),
        ("a.jsonl", '{"timestamp": 1}\n'),
        ("a.jsonl", "{"),
        ("a.gz", "plain"),
        ("a.zst", "plain"),
        ("s_rates.csv", "client,ts_s,rate_rps,cv,arrival,param1,param2\n"),
    ],
)
def test_what_is_no_trace_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PenstockError) as caught:
        read_trace(tmp_path / name, 5)
    assert caught.value.code in ("invalid_trace", "file_not_found")


def test_files_of_prompts(tmp_path: Path) -> None:
    plain = tmp_path / "p.txt"
    plain.write_text("one\n\ntwo\n")
    assert read_prompts(plain, 3) == [["one"], ["two"], ["one"]]
    lines = ['"a"', '{"prompt": "b"}', '{"turns": ["c", "d"]}', '{"question": "e"}',
             '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "f"}]}']  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "p.jsonl", 5) == [["a"], ["b"], ["c", "d"], ["e"], ["f"]]
    for text in ("", "{}", '{"prompt": 3}', "[", '{"turns": [3]}', "7"):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(PenstockError, match="invalid_prompts"):
            read_prompts(tmp_path / "bad.jsonl", 1)


# -- the search --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_search_ends_within_its_tolerance(truth: float, start: float, tolerance: float) -> None:
    found = largest_rate(lambda rate, attempt: rate <= truth, start, tolerance=tolerance, probes=60)
    assert found.confirmed and found.rate <= truth < found.failed and found.failed / found.rate <= 1 + tolerance + 1e-9
    assert len(found.probes) <= 35


def test_a_lucky_run_is_not_believed() -> None:
    """At 10 and above only the first pattern of arrivals passes; what both pass ends at 8."""
    found = largest_rate(lambda rate, attempt: rate <= (10 if attempt == 0 else 8), 5.0, tolerance=0.05)
    assert found.confirmed and 8 / 1.06 < found.rate <= 8


def test_a_search_without_success_says_so() -> None:
    assert largest_rate(lambda rate, attempt: False, 5.0, probes=8).rate == 0.0
    endless = largest_rate(lambda rate, attempt: True, 5.0, probes=8)
    assert len(endless.probes) == 8 and endless.failed is None and endless.rate == 5.0 * 2**6


# -- HTTP and streams --------------------------------------------------------------------------------------------------

RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nt: v\r\n\r\n",
    b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 404 No\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno",
    b"HTTP/1.1 503 Busy\r\ntransfer-encoding: Chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
]


def by_h11(data: bytes) -> tuple[int, bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    status, body = 0, b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
    return status, body


@given(st.sampled_from(RESPONSES), st.lists(st.integers(1, 200), max_size=30))
def test_answers_are_read_as_h11_reads_them_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    body: list[bytes] = []
    parser = ResponseParser(body.append)
    bounds = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    for start, end in itertools.pairwise(bounds):
        parser.feed(data[start:end])
    if not parser.done:
        assert data.startswith(b"HTTP/1.0")
        parser.end()
    assert (parser.status, b"".join(body)) == by_h11(data)
    assert parser.reusable == (b"close" not in data and b"HTTP/1.0" not in data)


@given(st.binary(max_size=200))
def test_what_is_no_answer_never_ends_in_another_error(data: bytes) -> None:
    parser = ResponseParser(lambda part: None)
    try:
        parser.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)
        parser.feed(data)
        if not parser.done:
            parser.end()
    except Broken as broken:
        assert broken.code in ("bad_response", "connection_lost")


@pytest.mark.parametrize(
    "text",
    [
        "FTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        "x" * 70000,
    ],
)
def test_what_is_not_http_is_refused(text: str) -> None:
    with pytest.raises(Broken, match="bad_response"):
        ResponseParser(lambda part: None).feed(text.encode())


def read(parts: list[tuple[float, bytes]]) -> Answer:
    stream = Stream()
    for at, part in parts:
        stream.feed(at, part)
    return stream.answer(0.0, 99.0)


STREAM = (
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\r\n\r\n'
    b'data: {"choices": [{"delta": {"content": "a\xc3\xa9"}}]}\n\n: note\nevent: x\n'
    b'data: {"choices": [{"text": "b", "finish_reason": "stop"}], "usage": null}\n\n'
    b'data: {"choices": [{"delta": {"reasoning_content": "c"}}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'
)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=20))
def test_a_stream_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    parts = [(float(i), STREAM[a:b]) for i, (a, b) in enumerate(itertools.pairwise(bounds))]
    answer = read(parts)
    assert (answer.text, answer.finish, answer.error) == ("aébc", "stop", "")
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (3, 4, None)
    ends = [STREAM.index(b"\n", STREAM.index(mark)) for mark in (b'"a\xc3', b'"b"', b'"c"')]
    assert answer.times == tuple(float(sum(b <= end for b in bounds[1:])) for end in ends)


@pytest.mark.parametrize(("stream", "error"), [
    (b'data: {"choices": [{"text": "a"}]}\n\n', "stream_ended_early"),
    (b'data: {"error": {"code": "engine stopped", "message": "m"}}\n\n', "stream_engine_stopped"),
    (b'data: {"error": "m"}\n\n', "stream_error"), (b"data: x\n\ndata: [DONE]\n\n", "bad_event"),
    (b"data: 7\n\n", "bad_event"),
    (b'data: {"choices": 7}\n\ndata: [DONE]\n\n', "bad_event"), (b"", "stream_ended_early"),
])  # fmt: skip
def test_a_stream_that_goes_wrong_has_a_code(stream: bytes, error: str) -> None:
    assert read([(0.0, stream)]).error == error


def test_urls() -> None:
    client = client_of("https://host.example/base/v1/", "k")
    assert (client.host, client.port, client.prefix, client.tls is None) == ("host.example", 443, "/base/v1", False)
    local = client_of("localhost:8000")
    assert (local.port, local.prefix, local.local, local.tls) == (8000, "/v1", True, None)
    for url, key in (
        ("ftp://x", ""),
        ("http://", ""),
        ("http://x:port", ""),
        ("http://x", "a\r\nb"),
        ("http://x/ü", ""),
    ):
        with pytest.raises(PenstockError, match="invalid_parameter"):
            client_of(url, key)


# -- the machine -------------------------------------------------------------------------------------------------------


def test_energy_is_counted_past_the_end_of_a_counter(tmp_path: Path) -> None:
    assert "no counters" in machine.read_energy(tmp_path).why
    zone = tmp_path / machine.ZONES / "intel-rapl:0"
    (zone / "intel-rapl:0:0").mkdir(parents=True)
    (zone / "max_energy_range_uj").write_text("9999999\n")
    (zone / "energy_uj").write_text("9000000\n")
    before = machine.read_energy(tmp_path)
    (zone / "energy_uj").write_text("1000000\n")
    assert machine.read_energy(tmp_path).joules_since(before) == 2.0
    (zone / "energy_uj").unlink()
    unreadable = machine.read_energy(tmp_path)
    assert "root" in unreadable.why and unreadable.joules_since(before) is None


def test_a_process_is_counted_with_its_children(tmp_path: Path) -> None:
    for pid, parent, spent in ((5, 1, 100), (6, 5, 50), (7, 6, 25), (8, 1, 999)):
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True)
        (folder / "stat").write_text(f"{pid} (a) b) S {parent} 0 0 0 0 0 0 0 0 0 {spent} 1 0 0\n")
        (folder / "status").write_text(f"Name:\ta\nVmHWM:\t  {pid} kB\n")
    assert machine.family(5, tmp_path) == [5, 6, 7] and machine.peak_bytes(5, tmp_path) == 18 * 1024
    assert machine.cpu_seconds(5, tmp_path) == pytest.approx(178 / 100)


@given(st.floats(1e-6, 1e9))
def test_ticks_are_few_and_round(most: float) -> None:
    found = ticks(most)
    assert 3 <= len(found) <= 8 and found[0] == 0 and found[-1] <= most * (1 + 1e-6)
