"""Where the time of a request went, told from its line in the log."""

from __future__ import annotations

import errno
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.fleet import Admission
from penstock.serving.gate import Caller, Gate
from penstock.serving.history import History, Visit, phases, why
from penstock.serving.keys import Key
from penstock.serving.limits import MAX_REMEMBERED, MAX_REMEMBERED_IN_ALL
from penstock.serving.requestlog import Line, RequestLog
from penstock.serving.texts import Texts

NO_TOKENIZER: Any = None


def line(*marks: float | None, **fields: Any) -> Line:
    admitted, started, first, total = marks
    plain: dict[str, Any] = {"id": "a", "tenant": None, "key": None, "path": "/v1/completions", "status": 200}
    plain |= {"model": "m", "prompt_tokens": 90, "cached_tokens": 50, "completion_tokens": 11, "finish": "length"}
    plain |= {"ahead": 3, "longest_gap_s": 0.1, "admitted_s": admitted, "started_s": started, "first_token_s": first}
    return Line(**plain | {"time": datetime.now(UTC), "total_s": total} | fields)


@pytest.mark.parametrize(
    ("ended", "spans", "told"),
    [
        (line(7, 8, 9, 10), {"read": 7, "queue": 1, "prompt": 1, "decode": 1}, "7.000 of 10.000 s .*in tokens, 90 of"),
        (line(1, 8, 9, 10, ahead=1), {"read": 1, "queue": 7, "prompt": 1, "decode": 1}, "7.000 .*1 other request was"),
        (line(1, 2, 7, 8), {"read": 1, "queue": 1, "prompt": 5, "decode": 1}, ": 40 of 90 .*, 8 tokens .*; 3 other"),
        (line(1, 2, 3, 8, ahead=0), {"read": 1, "queue": 1, "prompt": 1, "decode": 5}, "11 tokens, 2 a second; no oth"),
        (line(1, 2, 3, 8, longest_gap_s=4), {"read": 1, "queue": 1, "prompt": 1, "decode": 5}, "one of which took 4.0"),
        (line(1, None, None, 5, status=499), {"read": 1, "queue": 4}, "it ended, before its first token"),
        (line(1, None, None, 4), {"read": 1, "queue": 0, "prompt": 3}, "its 11 tokens: .* 17 tokens were computed"),
        (line(1, None, None, 5, completion_tokens=0), {"read": 1, "queue": 0, "prompt": 4}, "its prompt: .* 10 tokens"),
        (line(None, None, None, 2, status=400), {"read": 2}, "refused with status 400"),
        (
            line(1, 2, 5, 9, preempted=2, starved_s=5, starved_first_s=2),
            {"read": 1, "queue": 1, "prompt": 1, "decode": 1, "memory": 5},
            "5.000 of 9.000 s passed while KV blocks were short: it was preempted 2 times; 3 other",
        ),
        (line(1, 2, None, 4, status=499, starved_s=9), {"read": 1, "queue": 1, "prompt": 0, "memory": 2}, "short: "),
        (line(1, 2, 3, 9, client_s=5), {"read": 1, "queue": 1, "prompt": 1, "decode": 1, "client": 5}, "client took"),
    ],
)  # fmt: skip
def test_a_request_says_what_took_it_so_long(ended: Line, spans: dict[str, float], told: str) -> None:
    assert phases(ended) == spans
    assert re.search(told, why(ended)), why(ended)


def test_history_is_bounded_and_leaves_out_what_computed_nothing() -> None:
    history, anybody = History(), Caller(Gate(Admission(1)), "x")
    history.add(Visit(line(None, None, None, 1), 0.0))  # the tokenizer alone
    assert history.seen_by(anybody) == []
    for _ in range(MAX_REMEMBERED + 9):
        history.add(Visit(line(1, 2, 3, 4), 0.0))
    assert len(history.seen_by(anybody)) == MAX_REMEMBERED


def test_nobody_s_requests_make_those_of_others_go() -> None:
    """A quiet tenant keeps its own, however much others ask and however many they are."""
    history, gate = History(), Gate(Admission(1))

    def seen(tenant: str, role: Any = "inference") -> list[Any]:
        key = Key(id="0" * 8, sha256="0" * 64, tenant=tenant, role=role, created=datetime.now(UTC))
        return [msgspec.json.decode(told) for told in history.seen_by(Caller(gate, "x", key, tenant=tenant))]

    def add(tenant: str, id: str) -> None:
        history.add(Visit(line(1, 2, 3, 4, tenant=tenant, id=id), 0.0))

    for i in range(3):
        add("quiet", f"q{i}")
    for i in range(20 * MAX_REMEMBERED):
        add(f"busy {i % 20}", f"b{i}")
    assert [each["id"] for each in seen("quiet")] == ["q2", "q1", "q0"]
    assert [each["id"] for each in seen("", "admin")] == [f"b{i}" for i in reversed(range(1900, 2000))]
    sizes = [len(seen(f"busy {i}")) for i in range(20)]
    assert sum(sizes) + 3 == MAX_REMEMBERED_IN_ALL and max(sizes) - min(sizes) <= 1
    assert seen("busy 7")[0]["id"] == "b1987"
    for i in range(2 * MAX_REMEMBERED_IN_ALL):
        add(f"tenant {i}", "")
    assert sum(len(seen(f"tenant {i}")) for i in range(2 * MAX_REMEMBERED_IN_ALL)) == MAX_REMEMBERED_IN_ALL


def test_what_a_request_said_is_for_whoever_may_see_it_and_goes_with_it() -> None:
    history, gate, texts = History(), Gate(Admission(1)), Texts(NO_TOKENIZER, [], False)

    def seen(tenant: str, id: str = "x", role: Any = "inference") -> Texts | None:
        key = Key(id="0" * 8, sha256="0" * 64, tenant=tenant, role=role, created=datetime.now(UTC))
        return history.texts(Caller(gate, "y", key, tenant=tenant), id)

    history.add(Visit(line(1, 2, 3, 4, tenant="a", id="x"), 0.0), texts)
    assert seen("a") is seen("", role="admin") is texts and seen("b") is seen("a", "z") is None
    history.add(Visit(line(1, 2, 3, 4, tenant="b", id="x"), 0.0))  # of the same id, which clients choose
    assert seen("a") is texts and seen("b") is None
    for _ in range(MAX_REMEMBERED):
        history.add(Visit(line(1, 2, 3, 4, tenant="a", id="w"), 0.0))
    assert seen("a") is None


def test_a_line_that_a_full_disk_tore_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no place for the end of the second line and the third; then it has."""
    whole, room = os.write, [700]

    def limited(file: int, data: bytes) -> int:
        if data and not room[0]:
            raise OSError(errno.ENOSPC, "no space left")
        taken = whole(file, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", limited)
    log = RequestLog(tmp_path / "log")
    log._write([line(1, 2, 3, 4, id=f"{i}") for i in range(3)])
    size = len(msgspec.json.encode(line(1, 2, 3, 4, id="0"))) + 1
    assert log.dropped == 3 - 700 // size and size < 700
    room[0] = 1 << 20
    log._write([line(1, 2, 3, 4, id="later")])
    log.close()
    *good, torn, later = (tmp_path / "log").read_text().splitlines()
    assert json.loads(later)["id"] == "later" and len(good) == 700 // size and not torn.endswith("}")
    assert log.dropped == 3 - 700 // size
