"""What a page of another site can do in a browser to a server that asks nobody for a key."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from servers import PROMPT, Server, start
from test_dashboard import browser

__all__ = ["browser"]

SEND = """
async ([url, method, type, body]) => {
  const headers = type ? { "content-type": type } : {};
  const mode = method === "POST" && type !== "application/json" ? "no-cors" : "cors";
  const answer = await fetch(url, { method, mode, body, headers }).catch((error) => error);
  return answer instanceof Error ? "not sent, or not read" : answer.type;
}
"""
UPLOAD = """
async (url) => {
  const form = new FormData();
  form.append("purpose", "batch");
  form.append("file", new Blob(["{}"]), "a.jsonl");
  return (await fetch(url, { method: "POST", mode: "no-cors", body: form })).type;
}
"""
NOT_SENT, SENT = "not sent, or not read", "opaque"
"""The latter of an answer that the page may not read, to a request that was sent all the same."""


class Blank(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title>")

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = start(Path("penstock-nano"), "penstock-tiny", "--max-loaded", "1", "--store", str(tmp_path / "store"))
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0


@pytest.fixture
def elsewhere(browser: Browser) -> Iterator[Page]:
    """A page of another port, which is another origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Blank) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{other.server_port}/")
        yield page
        context.close()
        other.shutdown()


@pytest.mark.slow
def test_a_page_of_another_site_changes_nothing(server: Server, elsewhere: Page) -> None:
    """What a browser asks about first it does not send; what it sends at once is refused, whatever the page knows."""
    url, long = server.url, {"prompt": PROMPT, "max_tokens": 500, "ignore_eos": True}
    made = httpx.post(f"{url}/v1/conversations", json={}).json()["id"]
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": long} for i in range(400)]
    form = {"files": {"file": ("a.jsonl", "\n".join(map(json.dumps, lines)).encode())}, "data": {"purpose": "batch"}}
    file = httpx.post(f"{url}/v1/files", **form).json()["id"]  # type: ignore[arg-type]
    asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = httpx.post(f"{url}/v1/batches", json=asked).json()["id"]
    unload = json.dumps({"model": "penstock-nano"})
    for method, where, body in (
        ("DELETE", f"/v1/conversations/{made}", None),
        ("DELETE", f"/v1/files/{file}", None),
        ("POST", "/v1/conversations", "{}"),
        ("POST", "/models/unload", unload),
    ):
        kind = "application/json" if body else ""
        assert elsewhere.evaluate(SEND, [url + where, method, kind, body]) == NOT_SENT, where
    for where, kind, body in (
        ("/v1/conversations", "text/plain", "{}"),
        ("/models/unload", "text/plain", unload),
        ("/api/generate", "text/plain", json.dumps({"model": "penstock-tiny", "prompt": "a"})),
        ("/api/generate", "", json.dumps({"model": "penstock-nano", "keep_alive": 0})),
        (f"/v1/batches/{batch}/cancel", "", None),
    ):
        assert elsewhere.evaluate(SEND, [url + where, "POST", kind, body]) == SENT, where
    assert elsewhere.evaluate(UPLOAD, f"{url}/v1/files") == SENT
    states = {model["name"]: model["state"] for model in httpx.get(f"{url}/models").json()["models"]}
    assert states == {"penstock-nano": "loaded", "penstock-tiny": "unloaded"}
    assert httpx.get(f"{url}/v1/conversations/{made}").status_code == 200
    assert [each["id"] for each in httpx.get(f"{url}/v1/files").json()["data"]] == [file]
    assert httpx.get(f"{url}/v1/batches/{batch}").json()["status"] == "in_progress"
    assert httpx.post(f"{url}/v1/batches/{batch}/cancel").json()["status"] == "cancelling", "what is no page may"
