"""Models by hub id, against a server on this machine that speaks as much of the hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import penstock
from penstock.cli import terminal

FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"\x0a\x00",
    "merges.txt": b"a b",
    "vocab.txt": b"[UNK]",
    "qwen.tiktoken": b"IQ== 0",
    "tokenizer.model.v3": b"\x0a\x01",
    "chat_template.jinja": b"{{ messages }}",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model.safetensors": bytes(300_000),
    "consolidated.safetensors": bytes(10),
    "original/params.json": b"{}",
    "onnx/model.safetensors": bytes(10),
    "fp32/model.safetensors": bytes(10),
    "pytorch_model.bin": b"code",
    "README.md": b"# x",
}
WANTED = set(FILES) - {
    "consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "fp32/model.safetensors",
    "pytorch_model.bin", "README.md",
}  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"

TINY = Path(penstock.__file__).parent / "bundled"

SCRIPT = """
import json, sys
from pathlib import Path
from penstock.assemble import find_model
from penstock.base import PenstockError
for name in sys.argv[1:]:
    try:
        folder = find_model(name)
        print(json.dumps(sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())))
    except PenstockError as error:
        print(json.dumps([type(error).__name__, error.code, str(error)]))
"""


@dataclass
class Hub:
    endpoint: str
    home: Path
    gets: list[str] = field(default_factory=list)

    def find(self, *names: str, **environment: str) -> list[Any]:
        """What ``find_model`` says of each name in a new process."""
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, *names], env=self.environment(environment), capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "%" not in run.stderr and "━" not in run.stderr  # no bar where there is no terminal
        return [json.loads(line) for line in run.stdout.splitlines()]

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        return kept | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"} | extra


def handler(gets: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path.removeprefix("/api/models")
            _, owner, name, *rest = path.split("/")
            files = content_of(name)
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if name == "gated" and not allowed:
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif name == "private" and not allowed:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif name == "broken":
                self.answer(500, b"{}")
            elif name not in ("tiny", "private", "gated", "real", "sharded"):
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif not rest or rest[0] == "revision":
                siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
                self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}).encode())
            elif rest[0] == "tree":
                tree = [{"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in files.items()]
                self.answer(200, json.dumps(tree).encode())
            else:
                content = files["/".join(rest[2:])]
                if self.command == "GET":
                    gets.append("/".join(rest[2:]))
                self.answer(200, content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


@cache
def content_of(name: str) -> dict[str, bytes]:
    """The files of a repository: those above, or a real model, or one in two shards that differ in size."""
    if name not in ("real", "sharded"):
        return FILES
    files = {path.name: path.read_bytes() for path in TINY.iterdir()} | {"fp16.safetensors": bytes(7)}
    if name == "sharded":
        weights, shards = files.pop("model.safetensors"), ["model-1.safetensors", "model-2.safetensors"]
        files |= {shards[0]: weights[:-1000], shards[1]: bytes(1000)}
        index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    gets: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(gets))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "home", gets)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_a_model_needs_is_downloaded_once(hub: Hub) -> None:
    assert hub.find("org/tiny") == [sorted(WANTED)]
    assert sorted(hub.gets) == sorted(WANTED)
    assert hub.find("org/tiny", HF_HUB_OFFLINE="1") == [sorted(WANTED)]
    assert hub.find("org/tiny", HF_ENDPOINT="http://127.0.0.1:9") == [sorted(WANTED)]  # nobody answers there
    assert len(hub.gets) == len(WANTED)


def show(hub: Hub, *arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "penstock.cli", "show", "--json", "--num-threads", "1", *arguments]
    done = subprocess.run(command, env=hub.environment(environment), capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(done.stdout if done.returncode == 0 else done.stderr)
    return facts


def test_show_downloads_no_weights_until_they_are_there(hub: Hub) -> None:
    facts, local = show(hub, "org/real"), show(hub, str(TINY))
    assert hub.gets and not [file for file in hub.gets if file.endswith(".safetensors")]
    size = (TINY / "model.safetensors").stat().st_size
    assert facts["weights"] == {"files": 1, "bytes": size, "bytes_by_dtype": {}, "downloaded": False}
    for same in ("architecture", "parameters", "context", "tokenizer", "chat_template"):
        assert facts[same] == local[same]
    assert facts["here"]["weight_bytes"] == local["here"]["weight_bytes"] and facts["here"]["fits"]
    assert show(hub, "org/real", HF_HUB_OFFLINE="1")["error"]["code"] == "hub_unreachable"
    hub.find("org/real")
    before = len(hub.gets)
    assert show(hub, "org/real", HF_HUB_OFFLINE="1")["weights"] == local["weights"]
    assert len(hub.gets) == before and local["weights"]["downloaded"]


def test_show_adds_up_the_files_of_the_index(hub: Hub) -> None:
    command = [sys.executable, "-m", "penstock.cli", "show", "org/sharded"]
    shown = subprocess.run(command, env=hub.environment({}), capture_output=True, text=True).stdout
    size = terminal.size((TINY / "model.safetensors").stat().st_size)
    assert f"weights       {size} in 2 files, not downloaded\n" in shown
    assert not [file for file in hub.gets if file.endswith(".safetensors")]


def test_show_refuses_as_a_download_does(hub: Hub) -> None:
    names = ("org/gated", "org/broken")
    for name, (_, code, text) in zip(names, hub.find(*names), strict=True):
        error = show(hub, name)["error"]
        assert error["code"] == code and error["what"] in text and error["fix"].lower() in text.lower()


def test_what_cannot_be_had_is_said(hub: Hub) -> None:
    absent, private, gated, broken, spelt = hub.find("org/absent", "org/private", "org/gated", "org/broken", "o--r/-x-")
    assert absent[:2] == private[:2] == gated[:2] == spelt[:2] == ["NotFound", "model_not_found"]
    assert "404" in absent[2] and "check the spelling" in absent[2].lower()
    assert "401" in private[2] and "HF_TOKEN" in private[2]
    assert "403" in gated[2] and "conditions" in gated[2]
    assert "valid hub id" in spelt[2]
    assert broken[:2] == ["Unavailable", "hub_unreachable"]


def test_a_token_opens_what_is_private(hub: Hub) -> None:
    assert hub.find("org/private", "org/gated", HF_TOKEN=TOKEN) == [sorted(WANTED)] * 2


def test_without_hub_and_cache(hub: Hub) -> None:
    (offline,) = hub.find("org/tiny", HF_HUB_OFFLINE="1")
    (alone,) = hub.find("org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    for outcome in (offline, alone):
        assert outcome[:2] == ["Unavailable", "hub_unreachable"] and "HF_HUB_OFFLINE" in outcome[2]


def test_a_terminal_sees_a_bar_while_something_is_downloaded(hub: Hub) -> None:
    seen = on_a_terminal(hub)
    assert "org/tiny" in seen and "━" in seen and "300" in seen.replace(".", "")
    assert on_a_terminal(hub) == ""


def on_a_terminal(hub: Hub) -> str:
    terminal, stderr = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "org/tiny"],
        env=hub.environment({"TERM": "xterm", "COLUMNS": "100"}),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    ) as process:
        os.close(stderr)
        seen = b""
        try:
            while data := os.read(terminal, 4096):
                seen += data
        except OSError:  # Linux says so when the other side is closed
            pass
    os.close(terminal)
    assert process.returncode == 0
    return seen.decode(errors="replace")
