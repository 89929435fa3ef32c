"""Recorded traffic as sessions: when requests came, how long they were, and what their prompts had in common."""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest, NotFound
from penstock.bench.load.workload import Piece, Session, Turn

MOONCAKE_BLOCK = 512
"""Tokens behind each id of ``hash_ids``."""
Row = tuple[float | None, int, int, list[int]]
"""Seconds, tokens in, tokens out, ids of the prompt's blocks if the trace has them."""


def read_trace(path: Path, count: int, *, scale: float = 1.0, seed: int = 0, content: str = "") -> list[Session]:
    """The first ``count`` requests of a trace, times from 0.

    Formats, told apart by what is in the file (.gz and .zst are unpacked): Azure's CSV (TIMESTAMP, ContextTokens,
    GeneratedTokens), Vidur's lengths (num_prefill_tokens, num_decode_tokens; no times), Mooncake's JSON lines
    (timestamp in ms, input_length, output_length, hash_ids), and ServeGen's windows (NAME_rates.csv beside
    NAME_lengths.jsonl), which are sampled under the seed.

    Args:
        scale: of all lengths.
        content: as for ``synthetic``.

    Raises:
        NotFound: (file_not_found). InvalidRequest: (invalid_trace) it is of no such format, or empty.
    """
    lines = _lines(path)
    first = next(lines, "")
    try:
        rows = list(islice(_rows(path, first, lines, seed), count))
    except (ValueError, KeyError, TypeError, IndexError, EOFError, UnicodeDecodeError) as error:
        raise _invalid(path, f"a line cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not rows:
        raise _invalid(path, "it has no requests")
    start = rows[0][0] or 0.0
    return [_session(i, row, start, scale, content) for i, row in enumerate(rows)]


def _session(number: int, row: Row, start: float, scale: float, content: str) -> Session:
    at, tokens, output, ids = row
    asked, block = max(1, round(tokens * scale)), max(1, round(MOONCAKE_BLOCK * scale))
    pieces, left = [], asked
    for id in ids:  # equal ids are equal content; the last block is cut to the length
        if left > 0:
            pieces.append(Piece(f"{content} block {id}", min(block, left)))
            left -= block
    if left > 0:
        pieces.append(Piece(f"{content} own {number}", left))
    turn = Turn(tuple(pieces), max(1, round(output * scale)))
    return Session((turn,), None if at is None else at - start)


def _rows(path: Path, first: str, lines: Iterator[str], seed: int) -> Iterator[Row]:
    if first.startswith("{"):
        for line in (first, *lines) if path.name.count(".jsonl") else ():
            record = json.loads(line)
            ids = record.get("hash_ids", [])
            yield record["timestamp"] / 1000, int(record["input_length"]), int(record["output_length"]), list(ids)
        return
    head = first.strip().split(",")
    readers: dict[str, Callable[[dict[str, str]], Row]] = {"ContextTokens": _azure, "num_prefill_tokens": _vidur}
    reader = next((read for column, read in readers.items() if column in head), None)
    if reader is not None:
        yield from map(reader, csv.DictReader(lines, head))
    elif {"rate_rps", "param1"} <= set(head):
        yield from _servegen(path, csv.DictReader(lines, head), seed)
    else:
        raise _invalid(path, f"its first line is of no format that is known: {first.strip()[:80]!r}")


def _azure(record: dict[str, str]) -> Row:
    at = datetime.fromisoformat(record["TIMESTAMP"][:26]).timestamp()  # microseconds are enough
    return at, int(record["ContextTokens"]), int(record["GeneratedTokens"]), []


def _vidur(record: dict[str, str]) -> Row:
    return None, int(record["num_prefill_tokens"]), int(record["num_decode_tokens"]), []


# -- ServeGen: clients, each with a rate and lengths of its own in each window -----------------------------------------

WINDOW = 600.0


def _servegen(path: Path, windows: Iterator[dict[str, Any]], seed: int) -> Iterator[Row]:
    """Windows in order of time; in each, every client's arrivals and lengths."""
    lengths = _servegen_lengths(path)
    by_start: dict[float, list[dict[str, Any]]] = {}
    for window in windows:
        by_start.setdefault(float(window["ts_s"]), []).append(window)
    for start in sorted(by_start):
        rows: list[Row] = []
        for window in by_start[start]:
            client = int(window["client"])
            known = lengths.get(client, [])
            latest = bisect.bisect_right([at for at, _, _ in known], start)
            if latest:
                rng = random.Random(f"servegen {seed} {client} {start}")
                _, inputs, outputs = known[latest - 1]
                rows += [(start + at, inputs(rng), outputs(rng), []) for at in _window_arrivals(window, rng)]
        yield from sorted(rows, key=lambda row: row[0] or 0.0)


def _window_arrivals(window: dict[str, Any], rng: random.Random) -> list[float]:
    """Intervals from the window's distribution, stretched so that it holds its rate times its length."""
    count = round(float(window["rate_rps"]) * WINDOW)
    a, b = float(window["param1"]), float(window["param2"])
    match window["arrival"]:
        case "Gamma":
            intervals = [rng.gammavariate(a, b) for _ in range(count)]
        case "Weibull":
            intervals = [rng.weibullvariate(b, a) for _ in range(count)]
        case _:
            intervals = [rng.expovariate(1.0) for _ in range(count)]
    times = list(accumulate(intervals))
    return [at * WINDOW / times[-1] * count / (count + 1) for at in times] if times and times[-1] > 0 else []


Draw = Callable[[random.Random], int]


def _servegen_lengths(path: Path) -> dict[int, list[tuple[float, Draw, Draw]]]:
    name = path.name.partition("_rates.csv")[0]
    beside = next((p for p in sorted(path.parent.glob(f"{name}_lengths.jsonl*"))), None)
    if beside is None:
        raise NotFound("file_not_found", f"There is no {name}_lengths.jsonl beside {path.name}", fix="put it there")
    out: dict[int, list[tuple[float, Draw, Draw]]] = {}
    for line in _lines(beside):
        record = json.loads(line)
        inputs = record["input_tokens"] if "input_tokens" in record else record["text_tokens"]
        if not inputs or not record["output_tokens"]:  # a window in which nothing came
            continue
        entry = (float(record["ts_s"]), _drawing(inputs), _drawing(record["output_tokens"]))
        out.setdefault(int(record["client"]), []).append(entry)
    for entries in out.values():
        entries.sort(key=lambda entry: entry[0])
    return out


def _drawing(shares: dict[str, float]) -> Draw:
    values, weights = [max(1, int(float(v))) for v in shares], list(accumulate(shares.values()))
    return lambda rng: rng.choices(values, cum_weights=weights)[0]


# -- files -------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".zst":
            yield from io.StringIO(_unpacked(path))
        else:
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
                yield from file
    except FileNotFoundError:
        raise NotFound("file_not_found", f"There is no file {path}", fix="check the path") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _invalid(path, (getattr(error, "strerror", "") or str(error)).lower()[:200]) from None


def _unpacked(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError
    if shutil.which("zstd") is None:
        raise _invalid(path, "unpacking it needs the program zstd, which is not installed")
    done = subprocess.run(["zstd", "-dcq", str(path)], capture_output=True, check=False)
    if done.returncode:
        raise _invalid(path, done.stderr.decode(errors="replace").strip()[:200])
    return done.stdout.decode()


def _invalid(path: Path, why: str) -> InvalidRequest:
    fix = "give a trace of Azure, Vidur, Mooncake or ServeGen; docs/how-to/benchmark.md describes them"
    return InvalidRequest("invalid_trace", f"{path} cannot be used as a trace", why=why, fix=fix)


def mean_rate(sessions: list[Session]) -> float:
    """Arrivals a second of a trace; infinite if all come at once or it has no times."""
    times = [session.at for session in sessions if session.at is not None]
    span = (max(times) - min(times)) if times else 0.0
    return (len(times) - 1) / span if span > 0 else math.inf
