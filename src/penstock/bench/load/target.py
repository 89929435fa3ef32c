"""A ``penstock serve`` of our own, for the time of a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from penstock.base import EngineError

START_SECONDS, END_SECONDS = 600, 15


@dataclass(frozen=True, slots=True)
class OwnServer:
    url: str
    pid: int
    command: tuple[str, ...]


@contextmanager
def own_server(model: str | None, flags: Sequence[str]) -> Iterator[OwnServer]:
    """Serves a model on any free port of loopback until the block ends.

    Args:
        flags: options of the engine, as ``penstock serve`` takes them.

    Raises:
        EngineError: (server_did_not_start) its own message is the cause.
    """
    words = ["serve", *([model] if model else []), "--port", "0", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        impatient = threading.Timer(START_SECONDS, process.kill)
        impatient.start()
        try:
            url = _announced(process)
            impatient.cancel()
            if url is None:
                process.wait()
                log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
                why = log.read().decode(errors="replace").strip() or f"it ended with exit code {process.returncode}"
                fix = f"run it by itself: penstock {' '.join(words)}"
                raise EngineError("server_did_not_start", "The server to be measured did not start", why=why, fix=fix)
            yield OwnServer(url, process.pid, ("penstock", *words))
        finally:
            impatient.cancel()
            _end(process)


def _announced(process: subprocess.Popen[str]) -> str | None:
    """The URL that it prints when it is ready. What it prints later is read and forgotten, so that it never waits."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"Serving .* at (http://\S+)/v1", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return found[1]
    return None


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
