"""Server processes on free loopback ports, and what tests ask them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import openai

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MODEL = "stories"
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def metric(self, name: str, labels: str = "") -> float:
        """The sum over all series of the name, or the value of one."""
        series = rf"\{{{re.escape(labels)}\}}" if labels else r"(?:\{[^}]*\})?"
        found = re.findall(rf"^{name}{series} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.metric("penstock_requests_running") or self.metric("penstock_requests_waiting"):
            assert time.monotonic() < deadline, "requests are still running"
            time.sleep(0.02)


def start(model: Path, *options: str, log: IO[str] | None = None) -> Server:
    """Waits for the line that says where it serves. Each has files of its own, unless they are named."""
    if "--store" not in options:
        options = (*options, "--store", tempfile.mkdtemp(dir=os.environ["PENSTOCK_DATA"]))
    argv = [sys.executable, "-m", "penstock.cli", "serve", str(model), "--port", "0", "--num-threads", "1", *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"Serving (.+) at (http://127\.0\.0\.1:\d+)/v1\n", line)
    assert found, line + process.communicate()[0]
    return Server(found[2], process)
