"""Other people's clients, each in a venv of its own (``make test-all``)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from commands import argv, penstock, running
from penstock.text import Tokenizer
from scripted import saying
from servers import Server
from venvs import python_of

FOLDER = Path(__file__).parent / "clients"
sys.path.append(str(FOLDER))
from common import hurried  # noqa: E402
from retrying import check_retries  # noqa: E402

PARIS = '{"city": "Paris", "days": 3}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
SAYS = {
    "plain": "Hello there.",
    "call": f"I will look.\n{CALL}",
    "only": CALL,
    "record": CALL.replace("get_weather", "Weather"),
    "thought": "<think>\nParis is in France.\n</think>\n\nYes.",
    "json": PARIS,
}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server with room for one long request at a time, and its keys."""
    folder = tmp_path_factory.mktemp("narrow")
    tenants = {"single": ("--concurrency", "1"), "acme": (), "birch": ()}
    keys = {}
    for name, options in tenants.items():
        keys[name] = penstock("keys", "add", folder / "keys", "--tenant", name, *options).stdout.decode().strip()
    arguments = argv("serve", "--keys", folder / "keys", "--port", "0", "--queue-tokens", "400")
    with running([*arguments, "--served-model-name", "m", "--num-threads", "1"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = re.search(rb"(http://\S+)/v1", process.stdout.readline())
        assert found
        yield {"url": found[1].decode(), "model": "m", **keys}


def test_retries_wait_as_long_as_they_are_told(keyed: dict[str, Any]) -> None:
    check_retries(openai, keyed, lambda client: client.completions)
    said = {"messages": [{"role": "user", "content": "Once"}]}
    check_retries(anthropic, keyed, lambda client: client.messages, said)


def test_a_request_whose_answer_was_lost_is_sent_again_and_made_once(hermes: Server) -> None:
    """The official client sends it again of itself; what makes it one is the key that its caller gave."""
    lost: list[str] = []

    def lose(response: httpx2.Response) -> None:
        if response.request.method == "POST" and response.request.headers["x-stainless-retry-count"] == "0":
            lost.append(str(response.status_code))
            raise httpx2.ReadError("the connection broke")

    clients = {"event_hooks": {"response": [lose]}}
    client = openai.OpenAI(
        base_url=f"{hermes.url}/v1", api_key="x", max_retries=1, http_client=openai.DefaultHttpxClient(**clients)
    )
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}
    before = len(client.files.list().data), len(client.batches.list().data)
    with hurried(lambda: None):
        file = client.files.create(
            file=("in.jsonl", json.dumps(line).encode()), purpose="batch", extra_headers={"Idempotency-Key": "f"}
        )
        asked: Any = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.batches.create(**asked, extra_headers={"Idempotency-Key": "b"})
    assert lost == ["200", "200"] and batch.input_file_id == file.id
    assert len(client.batches.list().data) == before[1] + 1
    assert [each.id for each in client.files.list(purpose="batch").data].count(file.id) == 1
    assert len(client.files.list(purpose="batch").data) <= before[0] + 1
    with pytest.raises(openai.ConflictError, match="idempotency_key_reused"):
        client.batches.create(**asked, metadata={"a": "b"}, extra_headers={"Idempotency-Key": "b"})
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
        client.batches.create(**asked, extra_headers={"Idempotency-Key": "a b"})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["openai2", "litellm", "langchain"])
def test_documented_calls(name: str, hermes: Server, tokenizer: Tokenizer, keyed: dict[str, Any]) -> None:
    given = {"url": hermes.url, "keyed": keyed, "says": {k: saying(text, tokenizer) for k, text in SAYS.items()}}
    argv = [str(python_of(name)), str(FOLDER / f"with_{name}.py")]
    done = subprocess.run(argv, input=json.dumps(given), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert len(done.stdout.split()) >= 8
