"""RemoteService: an engine process may die at any moment, and nobody who waits for tokens learns of it."""

from __future__ import annotations

import os
import queue
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.base import ConfigError, EngineError, PenstockError
from penstock.core.service import Submission, Update
from penstock.sim.toy import toy_completion, toy_reports
from penstock.spec import EngineConfig, SamplingParams, TokenLogprobs
from penstock.wire import RemoteService, remote, restarts
from penstock.wire.process import EngineProcess
from penstock.wire.restarts import MAX_RESTARTS
from toyhost import DEADLY, ENDLESS, LATE, VOCAB

ARGV = [sys.executable, str(Path(__file__).with_name("toyhost.py"))]
PROMPT = (5, 6, 7)


def job(id: str, max_tokens: int = 8, *, n: int = 1, tokens: tuple[int, ...] = PROMPT, seed: int = 0) -> Submission:
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=0)
    return Submission(id=id, tokens=tokens, params=params, seed=seed)


class Heard:
    """Collects news of a service until every sample has ended."""

    def __init__(self, service: RemoteService) -> None:
        self.service = service
        self.news: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self.left: set[tuple[str, int]] = set()
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.reports: dict[str, list[TokenLogprobs]] = {}
        self.last: dict[tuple[str, int], Update] = {}

    def submit(self, submission: Submission) -> None:
        self.left |= {(submission.id, sample) for sample in range(submission.params.n)}
        self.service.submit(submission, self.news.put)

    def until(self, done: Callable[[], bool]) -> Heard:
        while not done():
            update = self.news.get(timeout=60)
            key = (update.id, update.sample)
            assert key not in self.last, "something after the end"
            self.tokens.setdefault(key, []).extend(update.tokens)
            self.reports.setdefault(update.id, []).extend(update.prompt_logprobs)
            if update.finish_reason:
                self.last[key] = update
                self.left.discard(key)
        return self

    def all(self) -> Heard:
        return self.until(lambda: not self.left)

    def verify(self, submission: Submission) -> None:
        """It has what it gets from an engine that nothing happens to."""
        for sample in range(submission.params.n):
            assert self.last[submission.id, sample].finish_reason == "length"
            count = submission.params.max_tokens
            assert count is not None
            expected = toy_completion(submission.tokens, count, [None], submission.seed, sample, VOCAB)
            assert self.tokens[submission.id, sample] == expected
        assert self.reports[submission.id] == toy_reports(submission.tokens, [None])


@pytest.fixture
def service() -> Iterator[RemoteService]:
    service = RemoteService(ARGV, EngineConfig())
    service.ready()
    yield service
    service.close()
    assert service._process.process.poll() is not None


def until(done: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(service: RemoteService) -> None:
    os.kill(service._process.process.pid, signal.SIGKILL)


def test_what_a_service_promises(service: RemoteService) -> None:
    ready = service.ready()
    assert ready.pools == ((512, None),) and ready.numerics_id == b"toy" and ready.one_answer and not ready.whole
    assert service.progress == 0.5, "what the toy told"
    assert service.held == 1, "of the toy, which adds one to what others need"
    assert service.alive and not service._process.path.parent.exists()
    heard, jobs = Heard(service), [job(str(i), 20 + i, n=1 + i % 3, seed=i) for i in range(8)]
    for submission in jobs:
        heard.submit(submission)
    with pytest.raises(PenstockError, match="duplicate_request_id"):
        heard.submit(jobs[0])
    for submission in jobs:
        heard.all().verify(submission)
    heard.submit(job("long", 400, n=2))
    heard.until(lambda: bool(heard.tokens.get(("long", 1))))
    assert service.status().running == 2
    service.abort("long", 0)
    heard.until(lambda: ("long", 0) in heard.last)
    service.abort("nobody")
    service.abort("long")
    heard.all()
    assert {heard.last["long", i].finish_reason for i in (0, 1)} == {"abort"}
    heard.submit(job("refused", tokens=(1,) * 512))
    error = heard.all().last["refused", 0].error
    assert error is not None and error.code == "prompt_too_long"
    until(lambda: service.status().blocks_used == 0)
    assert service.status().counters.restarts == 0 and service.status().blocks_total == 512


def test_streams_go_on_when_engines_die(service: RemoteService) -> None:
    """Thirty-two requests of one to three samples, and three engines killed at any moment."""
    dice = random.Random(1)
    heard = Heard(service)
    jobs = [
        job(
            str(i),
            dice.randint(40, 160),
            n=1 + i % 3,
            seed=i,
            tokens=tuple(dice.choices(range(64), k=90 if i % 2 else 3)),
        )
        for i in range(32)
    ]
    for submission in jobs:
        heard.submit(submission)
    for number in range(1, 3):
        enough = number * sum(job.params.max_tokens or 0 for job in jobs) // 3
        heard.until(lambda enough=enough: sum(map(len, heard.tokens.values())) > enough)  # type: ignore[misc]
        kill(service)
        until(lambda number=number: service.status().counters.restarts == number)
    for submission in jobs:
        heard.all().verify(submission)
    until(lambda: service.status().blocks_used == 0)
    assert service.status().counters.generated_tokens >= sum(map(len, heard.tokens.values()))


def test_who_was_aborted_while_there_was_no_engine_stays_so(service: RemoteService) -> None:
    heard = Heard(service)
    for id in ("stays", "goes"):
        heard.submit(job(id, 300, n=2))
    heard.until(lambda: len(heard.tokens) == 4)
    kill(service)
    until(lambda: not service.alive)
    service.abort("goes")
    service.abort("stays", 1)
    heard.submit(job("late"))  # waits for the next engine
    heard.all()
    assert {key: last.finish_reason for key, last in heard.last.items()} == {
        ("goes", 0): "abort",
        ("goes", 1): "abort",
        ("stays", 0): "length",
        ("stays", 1): "abort",
        ("late", 0): "length",
    }
    assert heard.tokens["stays", 0] == toy_completion(PROMPT, 300, [None], 0, 0, VOCAB)
    heard.verify(job("late"))


def test_a_request_that_kills_engines_ends_alone(service: RemoteService) -> None:
    heard = Heard(service)
    mates = [job(str(i), 200, seed=i, tokens=(i + 1, 2)) for i in range(6)]
    for submission in mates[:3]:
        heard.submit(submission)
    heard.submit(job("deadly", tokens=(1, DEADLY)))
    for submission in mates[3:]:
        heard.submit(submission)
    heard.all()
    error = heard.last["deadly", 0].error
    assert error is not None and error.code == "request_quarantined"
    for submission in mates:
        heard.verify(submission)
    assert service.status().counters.restarts == remote.MAX_DEATHS


@pytest.mark.parametrize("when", ["at once", "while others are tried", "after that"])
def test_a_client_that_sends_it_again_takes_nobody_along(service: RemoteService, when: str) -> None:
    """As clients do that are told 500: under a new id, and nothing is known of it."""
    heard = Heard(service)
    mates = [job(str(i), 400, seed=i, n=1 + i % 2, tokens=(i + 1, 2)) for i in range(6)]
    for submission in mates:
        heard.submit(submission)
    heard.submit(job("deadly", tokens=(1, DEADLY)))
    heard.until(lambda: ("deadly", 0) in heard.last)
    if when == "while others are tried":
        until(lambda: service._tried is not None)
    elif when == "after that":
        until(lambda: service.alive and service._tried is None)
    heard.submit(job("again", tokens=(1, DEADLY)))
    heard.submit(late := job("late"))
    for submission in [*mates, late]:
        heard.all().verify(submission)
    for id in ("deadly", "again"):
        error = heard.last[id, 0].error
        assert error is not None and error.code == "request_quarantined"
    assert service.status().counters.restarts <= MAX_RESTARTS and service.fault is None


def test_who_kills_engines_late_is_found_as_well(service: RemoteService) -> None:
    """It dies of a later part of its prompt; what is told of the first acquits nobody."""
    heard = Heard(service)
    mates = [job(str(i), 300, seed=i, tokens=(i + 1, 2)) for i in range(3)]
    late = job("late", tokens=(1, LATE) * 200)
    for submission in [*mates, late]:
        heard.submit(submission)
    heard.all()
    error = heard.last["late", 0].error
    assert error is not None and error.code == "request_quarantined"
    for submission in mates:
        heard.verify(submission)


def test_an_engine_that_is_started_again_leaves_others_what_they_need_by_then(service: RemoteService) -> None:
    service.taken = lambda: 41
    kill(service)
    until(lambda: service.status().counters.restarts and service.alive)
    until(lambda: service.held == 42)  # of the toy, which adds one


def test_an_engine_that_hangs_is_replaced(service: RemoteService, caplog: pytest.LogCaptureFixture) -> None:
    """Stopped, it is there and silent. One that has nothing to do is silent too, and lives."""
    service.step_timeout = 1.0
    heard, jobs = Heard(service), [job(str(i), 400, n=1 + i % 2, seed=i) for i in range(6)]
    for submission in jobs:
        heard.submit(submission)
    heard.until(lambda: bool(heard.tokens))
    os.kill(service._process.process.pid, signal.SIGSTOP)
    for submission in jobs:
        heard.all().verify(submission)
    engine = service._process.process.pid
    time.sleep(2.0)
    assert service.status().counters.restarts >= 1 and service._process.process.pid == engine
    assert "it hangs" in caplog.text and "was killed by signal 9 while" in caplog.text


def test_looks_do_not_keep_an_engine_that_hangs(service: RemoteService) -> None:
    """Its other thread answers them."""
    service.step_timeout = 1.0
    Heard(service).submit(job("deadly", tokens=(1, ENDLESS)))
    deadline = time.monotonic() + 10
    while not service.status().counters.restarts:
        assert time.monotonic() < deadline
        service.look(1.0)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_request_that_hangs_engines_ends_alone(service: RemoteService) -> None:
    service.step_timeout = 2.0
    heard, mate = Heard(service), job("mate", 300, tokens=(1, 2))
    heard.submit(mate)
    heard.submit(job("deadly", tokens=(1, ENDLESS)))
    error = heard.all().last["deadly", 0].error
    assert error is not None and error.code == "request_quarantined"
    heard.verify(mate)


@pytest.mark.parametrize("when", ["before it knocks", pytest.param("while it loads", marks=pytest.mark.slow)])
def test_an_engine_that_hangs_before_it_has_its_model_is_given_up(when: str, caplog: pytest.LogCaptureFixture) -> None:
    service = RemoteService(ARGV, EngineConfig(model="ever"))
    if when == "while it loads":
        until(lambda: service.progress == 0.25)
        service.load_timeout = 2.0
        time.sleep(3.0)
        assert not service._first.done(), "it tells of progress"
    service.load_timeout = 1.0
    os.kill(service._process.process.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"nothing for 1 s.*--load-timeout.*load_timeout"):
        service.ready()
    assert "it hangs" in caplog.text
    service.close()


def test_an_engine_that_hangs_while_it_loads_again_stays_dead(tmp_path: Path) -> None:
    """It would not die often enough to be given up for that."""
    service = RemoteService(ARGV, EngineConfig(model=f"ever:{tmp_path / 'started'}"))
    service.ready()
    heard = Heard(service)
    heard.submit(job("a", 400, n=2))
    heard.until(lambda: bool(heard.tokens))
    kill(service)
    until(lambda: service.progress == 0.25)
    service.load_timeout = 1.0
    os.kill(service._process.process.pid, signal.SIGSTOP)
    heard.all()
    assert {last.error.code for last in heard.last.values() if last.error} == {"load_timeout"}
    assert service.fault is not None and not service.alive and service.status().counters.restarts == 1
    with pytest.raises(EngineError, match="load_timeout"):
        heard.submit(job("b"))
    service.close()


@pytest.mark.slow
def test_a_download_does_not_count_as_a_hang() -> None:
    service = RemoteService(ARGV, EngineConfig(model="fetch"))
    until(lambda: service._fetching)
    service.load_timeout = 2.0
    service.ready()
    service.close()


def test_an_engine_that_cannot_start_again_stays_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.01)
    service = RemoteService(ARGV, EngineConfig(model=f"once:{tmp_path / 'started'}"))
    service.ready()
    heard = Heard(service)
    heard.submit(job("a", 400, n=2))
    heard.until(lambda: bool(heard.tokens))
    kill(service)
    heard.all()
    assert {last.error.code for last in heard.last.values() if last.error} == {"engine_dead"}
    assert not service.alive and service.status().counters.restarts == MAX_RESTARTS
    with pytest.raises(EngineError, match=r"ended with status 3.*5 times in 60 seconds.*engine_dead"):
        heard.submit(job("b"))
    service.close()


def test_an_engine_that_cannot_be_started_for_a_moment_costs_no_stream(
    service: RemoteService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when descriptors, memory or room for its socket are short: one more death, with its pause."""
    heard = Heard(service)
    heard.submit(job("a", 400, n=2))
    heard.until(lambda: bool(heard.tokens))
    with monkeypatch.context() as short:
        short.setattr(tempfile, "tempdir", "/nowhere")
        kill(service)
        until(lambda: "[engine_process]" in caplog.text)
    heard.all().verify(job("a", 400, n=2))
    assert service.status().counters.restarts == 1


def test_an_engine_that_can_never_be_started_again_is_given_up(
    service: RemoteService, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(service)
    heard.submit(job("a", 400, n=2))
    heard.until(lambda: bool(heard.tokens))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    kill(service)
    heard.all()
    with pytest.raises(EngineError, match=r"cannot be started: .*/nowhere.*5 times in 60 seconds.*engine_dead"):
        heard.submit(job("b"))
    assert service.status().counters.restarts == 0


def test_why_the_first_engine_does_not_start() -> None:
    service = RemoteService(ARGV, EngineConfig(model="refuse"))
    with pytest.raises(ConfigError) as refused:
        service.ready()
    assert (refused.value.code, refused.value.why, refused.value.fix) == ("too_small", "1 < 2", "buy another")
    for argv, why in ((ARGV, "status 3"), ([sys.executable, "-c", "import os; os.abort()"], "signal 6")):
        with pytest.raises(EngineError, match=f"{why}.*engine_died"):
            RemoteService(argv, EngineConfig(model="exit")).ready()
    with pytest.raises(ConfigError, match="engine_process"):
        RemoteService(["/nowhere/python"], EngineConfig())


def test_closing_tells_everybody(service: RemoteService) -> None:
    heard = Heard(service)
    heard.submit(job("a", 400, n=2))
    heard.until(lambda: bool(heard.tokens))
    service.close()
    assert {last.error.code for last in heard.all().last.values() if last.error} == {"engine_closed"}
    with pytest.raises(EngineError, match="engine_closed"):
        heard.submit(job("b"))


def test_a_sink_that_raises_ends_its_own_sample_alone(service: RemoteService) -> None:
    calls: list[Update] = []

    def bad(update: Update) -> None:
        calls.append(update)
        raise RuntimeError("Event loop is closed")

    heard = Heard(service)
    service.submit(job("bad", 400), bad)
    heard.submit(job("good", 100))
    heard.all().verify(job("good", 100))
    assert len(calls) < 40 and calls[-1].finish_reason == "abort"


ODD = """
import socket, sys, time
from penstock.core.service import Counters, Status, Update
from penstock.wire import Connection, News, Ready, decode_to_engine, encode
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
connection = Connection(sock)
start = decode_to_engine(connection.receive())
connection.send(encode(Ready(start.epoch, start.config, (), b"", False, True)))
asked = decode_to_engine(connection.receive())
status = Status(running=0, waiting=0, blocks_total=1, blocks_used=0, counters=Counters())
if start.epoch == 0:
    connection.send(b"\\xc1")
elif start.epoch == 1:
    connection.send(encode(News(0, (Update(asked.id, 0, (66,)),), status)))
else:
    connection.send(encode(News(2, (Update(asked.id, 0, (9,), finish_reason="length"),), status)))
time.sleep(60)
"""


def test_bad_and_late_frames_are_fenced_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The first engine talks nonsense, the second says what only the first could say."""
    service = RemoteService([sys.executable, "-c", ODD], EngineConfig())
    heard = Heard(service)
    heard.submit(job("a"))
    assert heard.all().tokens == {("a", 0): [9]}
    counters = service.status().counters
    assert (counters.bad_frames, counters.restarts) == (2, 2)
    assert "it is of engine 0, and this is 1" in caplog.text
    service._process.process.kill()
    service.close()


def test_an_engine_ends_with_whoever_started_it() -> None:
    code = f"""
import sys, time
from penstock.spec import EngineConfig
from penstock.wire import RemoteService
service = RemoteService({ARGV!r}, EngineConfig())
service.ready()
print(service._process.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        engine = int(front.stdout.readline())
        os.kill(engine, signal.SIGTERM)  # a service manager may tell all processes; it is the front that ends them
        time.sleep(0.1)
        assert _runs(engine)
        front.kill()
    until(lambda: not _runs(engine), 10)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_socket_is_private_and_short_lived() -> None:
    process = EngineProcess([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = process.path.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(process.path.stat().st_mode) == 0o600
    process.process.kill()
    with pytest.raises(EngineError, match="killed by signal 9"):
        process.connect()
    assert not folder.exists()
    process.end(1)


def test_a_folder_whose_path_is_too_long_for_a_socket_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(ConfigError, match="TMPDIR is short"):
        RemoteService(ARGV, EngineConfig())
    assert not list(folder.iterdir())
