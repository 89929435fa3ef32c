"""/v1/embeddings as OpenAI's own client sees it, /v1/score and /v1/rerank: the vectors that ``LLM`` gives, in order."""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from penstock import LLM, AsyncLLM, PoolingParams
from penstock.base import Unavailable
from penstock.cli.serve import example
from penstock.serving import build_app
from penstock.serving.limits import MAX_TEXTS
from servers import MODEL, Server

TEXTS = ["Once upon a time", "The dog ran to the big tree.", "Lily was sad"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[LLM]:
    with LLM(str(stories), dtype="float32", num_threads=1) as llm:
        yield llm


def vectors(llm: LLM, texts: Any, **params: Any) -> list[list[float]]:
    return [out.outputs.embedding for out in llm.embed(texts, pooling_params=PoolingParams(**params))]


def post(server: Server, path: str, **fields: Any) -> Any:
    response = httpx.post(f"{server.url}/v1/{path}", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_embeddings_have_openai_s_shape(server: Server, llm: LLM) -> None:
    """Its client asks for base64 unless it is told otherwise, and unpacks it."""
    packed = server.client.embeddings.create(model=MODEL, input=TEXTS)
    plain = server.client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    assert packed.object == "list" and packed.model == MODEL
    assert [(one.object, one.index) for one in packed.data] == [("embedding", 0), ("embedding", 1), ("embedding", 2)]
    np.testing.assert_allclose([one.embedding for one in plain.data], vectors(llm, TEXTS), **CLOSE)
    for one, other in zip(packed.data, plain.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, **CLOSE)
    tokens = sum(len(out.prompt_token_ids) for out in llm.embed(TEXTS))
    assert (packed.usage.prompt_tokens, packed.usage.total_tokens) == (tokens, tokens)
    raw = post(server, "embeddings", input=TEXTS[0], encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), packed.data[0].embedding, **CLOSE)


@pytest.mark.parametrize("given", [TEXTS[0], [TEXTS[0]], [1, 403, 407], [[1, 403, 407], [1, 403]]])
def test_the_four_forms_of_input(server: Server, llm: LLM, given: Any) -> None:
    answer = server.client.embeddings.create(model=MODEL, input=given, encoding_format="float")
    np.testing.assert_allclose([one.embedding for one in answer.data], vectors(llm, given), **CLOSE)


def test_special_tokens_in_a_text_are_text(server: Server) -> None:
    """Of a text to embed; a prompt to complete is all of what the model reads, and may be written with them."""
    tokens = {
        path: post(server, path, **fields)["usage"]["prompt_tokens"]
        for path, fields in (
            ("embeddings", {"input": "</s>"}),
            ("completions", {"prompt": "</s>", "max_tokens": 1}),
        )
    }
    assert tokens["completions"] == 2 < tokens["embeddings"], "one, and the one that begins a text"


def test_dimensions_and_vllm_s_fields(server: Server, llm: LLM) -> None:
    short = server.client.embeddings.create(model=MODEL, input=TEXTS[1], dimensions=8, encoding_format="float")
    np.testing.assert_allclose(short.data[0].embedding, vectors(llm, TEXTS[1], dimensions=8)[0], **CLOSE)
    extra = {"normalize": False, "truncate_prompt_tokens": 3, "priority": -1}
    answer = server.client.embeddings.create(model=MODEL, input=TEXTS[1], encoding_format="float", extra_body=extra)
    expected = vectors(llm, TEXTS[1], normalize=False, truncate_prompt_tokens=3)
    np.testing.assert_allclose(answer.data[0].embedding, expected[0], **CLOSE)
    assert answer.usage.prompt_tokens == 3 and abs(np.linalg.norm(expected[0]) - 1) > 0.1


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("input", [], "invalid_parameter"), ("input", ["a"] * (MAX_TEXTS + 1), "invalid_parameter"),
        ("input", ["a", 1], "invalid_parameter"), ("input", None, "invalid_parameter"), ("input", "", "empty_prompt"),
        ("input", ["a", ""], "empty_prompt"), ("input", [10**6], "token_out_of_range"),
        ("input", "word " * 3000, "context_length_exceeded"), ("dimensions", 0, "invalid_parameter"),
        ("dimensions", 65, "invalid_parameter"), ("encoding_format", "int8", "invalid_parameter"),
        ("messages", [{}], "unsupported_parameter"), ("model", "other", "model_not_found"),
    ],
)  # fmt: skip
def test_bad_embedding_requests(server: Server, field: str, value: object, code: str) -> None:
    response = httpx.post(f"{server.url}/v1/embeddings", json={"input": "a", field: value}, timeout=60)
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400) and error["code"] == code
    assert error["param"] == field or code not in ("invalid_parameter", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError):
        server.client.embeddings.create(model=MODEL, input="")


def test_scores_and_ranks(server: Server, llm: LLM) -> None:
    expected = [out.outputs.score for out in llm.score(TEXTS[2], TEXTS)]
    answer = post(server, "score", model=MODEL, text_1=TEXTS[2], text_2=TEXTS)
    assert answer["object"] == "list" and [one["index"] for one in answer["data"]] == [0, 1, 2]
    np.testing.assert_allclose([one["score"] for one in answer["data"]], expected, **CLOSE)
    pairs = post(server, "score", text_1=TEXTS, text_2=TEXTS)
    expected_pairs = [out.outputs.score for out in llm.score(TEXTS, TEXTS)]
    np.testing.assert_allclose([one["score"] for one in pairs["data"]], expected_pairs, **CLOSE)
    assert answer["usage"]["total_tokens"] == sum(len(o.prompt_token_ids) for o in llm.score(TEXTS[2], TEXTS))

    best = sorted(range(3), key=lambda i: -expected[i])
    assert best != [0, 1, 2]
    ranked = post(server, "rerank", query=TEXTS[2], documents=TEXTS)["results"]
    assert [one["index"] for one in ranked] == best
    assert [one["document"] for one in ranked] == [{"text": TEXTS[i]} for i in best]
    np.testing.assert_allclose([one["relevance_score"] for one in ranked], [expected[i] for i in best], **CLOSE)
    assert [one["index"] for one in post(server, "rerank", query=TEXTS[2], documents=TEXTS, top_n=1)["results"]] == [2]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("score", {"text_1": "a"}, "text_2"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a"]}, None),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
    ],
)
def test_bad_scores(server: Server, path: str, fields: dict[str, Any], param: str | None) -> None:
    response = httpx.post(f"{server.url}/v1/{path}", json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_parameter", param)


@pytest.mark.parametrize(("kind", "path"), [("headless", "embeddings"), ("classifier", "score")])
def test_the_line_to_paste_is_of_what_a_model_can_do(server: Server, llm: LLM, kind: str, path: str) -> None:
    pooling = replace(llm.engine.pooling, **{"headless": True, kind: True})
    _, url, *_, data = shlex.split(example(server.url, replace(llm.engine, name=MODEL, pooling=pooling)))
    assert url == f"{server.url}/v1/{path}" and post(server, path, **json.loads(data))["data"]


def test_a_server_that_ends_and_a_client_that_goes_away(llm: LLM) -> None:
    """Either ends the work, and nothing of it stays in the engine."""

    async def main() -> None:
        _, context = build_app(AsyncLLM(llm.engine))
        for end in ("server", "client"):
            work = context.llm.embed_all(["the dog " * 40 + str(i) for i in range(400)])
            asked = asyncio.ensure_future(context.until_aborted(work))
            while not llm.engine.service.status().running and not asked.done():
                await asyncio.sleep(0.001)
            await (context.abort_all() if end == "server" else asyncio.sleep(0))
            if end == "client":
                asked.cancel()
            with pytest.raises(Unavailable if end == "server" else asyncio.CancelledError):
                await asked
            assert not context.tasks
            while (status := llm.engine.service.status()).running or status.waiting:
                await asyncio.sleep(0.001)

    before = llm.engine.service.status().counters.steps
    asyncio.run(asyncio.wait_for(main(), 60))
    assert llm.engine.service.status().counters.steps - before < 50  # all of it would take twice as many
