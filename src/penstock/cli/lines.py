"""Files of prompts, a line each, and the JSON lines that answer them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import IO, Any

from penstock.base import InvalidRequest, NotFound, PenstockError
from penstock.cli.answer import usage
from penstock.cli.exits import emit
from penstock.cli.terminal import is_terminal, peak_memory, size


def parsed(number: int, raw: bytes, as_jsonl: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a line holds: a prompt, under its key of PROMPTS, and whatever a JSON object says beside it.

    Raises:
        InvalidRequest: (invalid_line).
    """
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")  # Windows begins a file with a mark
        given = json.loads(text) if as_jsonl else text
    except (ValueError, RecursionError) as error:
        what = "not JSON" if as_jsonl else "not UTF-8 text"
        raise InvalidRequest("invalid_line", f"Line {number} is {what}", why=str(error)[:200]) from None
    if isinstance(given, str):
        return {"prompt": given}, {}
    kinds = given.keys() & PROMPTS if isinstance(given, dict) else ()
    if len(kinds) != 1:
        fix = f"write a JSON string, or an object with one of {', '.join(sorted(PROMPTS))}"
        raise InvalidRequest("invalid_line", f"Line {number} is not a prompt", fix=fix)
    (kind,) = kinds
    return {kind: given.pop(kind)}, given


PROMPTS = {"prompt", "messages", "prompt_token_ids"}
"""Keys of a JSON line, of which it has one."""


@contextmanager
def instead_of(kind: str, text: str | None) -> Iterator[None]:
    """Around what --input does. Beside it a single argument is the MODEL, also if it was meant as a text.

    Raises:
        InvalidRequest: (invalid_parameter) there is a text as well.
        NotFound: (model_not_found) with a hint, where nothing else is known of it.
    """
    why = f"with --input, the {kind}s are in the file, and an argument is the MODEL"
    if text is not None:
        raise InvalidRequest("invalid_parameter", f"{kind.upper()} and --input cannot both be given", why=why)
    try:
        yield
    except NotFound as error:
        if error.code != "model_not_found" or error.why:
            raise
        raise NotFound(error.code, error.what, why=why, fix=error.fix) from None


def is_jsonl(path: str, given: str | None) -> bool:
    """Whether lines are JSON: as was said, else by the ending of the name."""
    return path.endswith(".jsonl") if given is None else given == "jsonl"


def opened(path: str) -> IO[bytes] | nullcontext[IO[bytes]]:
    """The file of prompts, or stdin for "-". Raises NotFound: (input_unreadable)."""
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise NotFound(
            "input_unreadable",
            f"The input {path} cannot be read",
            why=why,
            fix="name a file of prompts, or - for stdin",
        ) from None


def numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


@contextmanager
def written(target: str | None, source: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what writes an object as a line, to stdout or to a file.

    Raises:
        InvalidRequest: (invalid_parameter) the output would overwrite the input.
        PenstockError: (output_failed).
    """
    if target is None or target == "-":
        yield lambda report: emit(json.dumps(report, ensure_ascii=False))
        return
    if os.path.exists(target) and source != "-" and os.path.samefile(source, target):
        raise InvalidRequest("invalid_parameter", f"{target} is both input and output", fix="write to another file")
    try:
        with open(target, "w", encoding="utf-8", buffering=1) as file:
            yield lambda report: print(json.dumps(report, ensure_ascii=False), file=file)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise PenstockError("output_failed", f"{target} cannot be written", why=why) from error


class Tally:
    """What a run has come to.

    Args:
        counted: the usage that its speed is counted in.
    """

    def __init__(self, load_s: float, counted: str = "completion_tokens") -> None:
        self.load_s, self.lines, self.failed = load_s, 0, 0
        self.first_error: PenstockError | None = None
        self._usage = dict.fromkeys(usage(0, 0, 0), 0)
        self._counted, self._started = counted, time.perf_counter()

    def add(self, report: Mapping[str, Any], error: PenstockError | None) -> None:
        self.lines += 1
        for name, count in report.get("usage", {}).items():
            self._usage[name] += count
        if error is not None:
            self.failed += 1
            self.first_error = self.first_error or error

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._started, 1e-9)

    @property
    def rate(self) -> float:
        return self._usage[self._counted] / self.seconds

    def report(self) -> dict[str, Any]:
        rate = self.rate
        return {
            "prompts": self.lines,
            "failed": self.failed,
            "usage": self._usage,
            "timings": {
                "load_s": round(self.load_s, 4),
                "total_s": round(self.seconds, 4),
                "tokens_per_s": round(rate, 2),
            },
            "peak_memory_bytes": peak_memory(),
        }

    def text(self) -> str:
        seconds, rate = self.seconds, self.rate
        failed = f", {self.failed} failed" if self.failed else ""
        prompts, cached = self._usage["prompt_tokens"], self._usage["cached"]
        return (
            f"{self.lines} prompts{failed}: {self._usage[self._counted]} tokens in {seconds:.2f} s, {rate:.0f} tokens/s"
            f" ({prompts} tokens of prompts, {cached} of them cached; loaded in {self.load_s:.2f} s;"
            f" peak memory {size(peak_memory())})"
        )


@contextmanager
def progress(file: IO[bytes], *, shown: bool) -> Iterator[Callable[[Tally], None]]:
    """Yields a function that shows how far a run is, on a terminal that shows nothing else."""
    if not shown or not is_terminal(sys.stderr):
        yield lambda tally: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = None
    if file.seekable():
        total = sum(1 for _ in numbered(file))
        file.seek(0)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeRemainingColumn())
    with Progress(TextColumn("Prompts"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, rate=0.0)
        yield lambda tally: bar.update(task, completed=tally.lines, rate=tally.rate)
