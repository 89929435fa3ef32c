"""What requests said, of a server that keeps it and of one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers import MODEL, PROMPT, Server, start

GREEDY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def keeping(stories: Path) -> Iterator[Server]:
    server = start(stories, "--dtype", "float32", "--served-model-name", MODEL, "--keep-texts")
    yield server
    server.process.terminate()
    assert server.process.wait(30) == 0


def ask(server: Server, id: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=GREEDY | fields, headers={"x-request-id": id}, timeout=60)


def kept(server: Server, id: str) -> httpx.Response:
    return httpx.get(f"{server.url}/requests/{id}")


def test_a_prompt_and_each_token_with_its_probability_is_kept(keeping: Server, server: Server) -> None:
    (choice,) = ask(keeping, "plain").json()["choices"]
    assert choice == ask(server, "plain").json()["choices"][0], "the answer is what it would be, and has no more"
    told = kept(keeping, "plain").json()
    tokenized = httpx.post(f"{keeping.url}/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert told["prompt"] == tokenized["token_strs"]
    assert "".join(token["token"] for token in told["tokens"]) == choice["text"]
    (with_logprobs,) = ask(keeping, "asked", logprobs=2).json()["choices"]
    assert [token["logprob"] for token in told["tokens"]] == with_logprobs["logprobs"]["token_logprobs"]
    assert len(with_logprobs["logprobs"]["top_logprobs"][0]) >= 2 and kept(keeping, "asked").json() == told
    assert '"logprobs":null' in ask(keeping, "stream", stream=True).text and kept(keeping, "stream").json() == told
    ask(keeping, "several", prompt=[PROMPT, "The dog"], n=2)
    assert kept(keeping, "several").json() == told, "the first prompt and the first answer"
    listed = {each["id"]: each["kept"] for each in httpx.get(f"{keeping.url}/requests").json()["requests"]}
    assert listed == dict.fromkeys(("plain", "asked", "stream", "several"), True)


def test_what_is_not_kept_is_told_so(keeping: Server, server: Server) -> None:
    assert ask(server, "unkept").status_code == 200
    for asked, id in ((server, "unkept"), (keeping, "nobody")):
        refused = kept(asked, id)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "texts_not_kept")
    assert not any(each["kept"] for each in httpx.get(f"{server.url}/requests").json()["requests"])
