"""keep_alive of Ollama's API, where there are several models and keys: who may say it, and what comes of it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import ollama
import pytest

from commands import argv, penstock, running

Client = Callable[[str], ollama.Client]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of a role."""
    folder = tmp_path_factory.mktemp("keep")
    added = {role: penstock("keys", "add", folder / "keys", "--role", role) for role in ("inference", "admin")}
    keys = {role: done.stdout.decode().strip() for role, done in added.items()}
    options = ["--keys", folder / "keys", "--port", "0", "--num-threads", "1", "--store", folder / "store"]
    arguments = argv("serve", "penstock-nano", "penstock-tiny", *options)
    with running(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        made = {role: ollama.Client(url, headers={"x-api-key": key}, timeout=60) for role, key in keys.items()}
        yield made.__getitem__
        process.terminate()
        assert process.wait(60) == 0


def expires(client: ollama.Client) -> dict[str, datetime]:
    """Of the models in memory."""
    return {str(model.model): model.expires_at for model in client.ps().models if model.expires_at is not None}


def wait_until_gone(client: ollama.Client, model: str) -> None:
    deadline = time.monotonic() + 60
    while model in expires(client):
        assert time.monotonic() < deadline, expires(client)
        time.sleep(0.02)


def test_a_request_says_how_long_its_model_stays(client: Client) -> None:
    admin, model = client("admin"), "penstock-nano"
    options = {"num_predict": 2}
    for given, hours in (("1h30m", 1.5), (None, 1.5), (7200, 2.0), ("90m", 1.5)):
        admin.generate(model, "Once", options=options, keep_alive=given)
        left = expires(admin)[model] - datetime.now(expires(admin)[model].tzinfo)
        assert hours - 0.1 < left.total_seconds() / 3600 <= hours
    for given in ("999999999h999999999h", -1):
        admin.chat(model, [{"role": "user", "content": "Hi"}], options=options, keep_alive=given)
        assert expires(admin)[model].year == 9999
    others = client("inference")
    assert others.generate(model, "Once", options=options, keep_alive=0).done_reason == "length"
    assert others.generate(model, keep_alive=0).done_reason == "load" and expires(admin)[model].year == 9999
    pieces = list(admin.generate(model, "Once", options=options, keep_alive=0, stream=True))
    assert pieces[-1].done_reason == "length"
    wait_until_gone(admin, model)
    assert admin.generate(model, keep_alive=0).done_reason == "unload" and model not in expires(admin), (
        "nor is it loaded"
    )
    admin.generate(model)
    assert expires(admin)[model].year == 9999, "what was said of it went with it"
    assert admin.chat(model, keep_alive=0).done_reason == "unload"
    wait_until_gone(admin, model)
