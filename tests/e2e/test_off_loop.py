"""What takes long of a large body is done beside the event loop, whichever API it comes by."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import AsyncLLM
from penstock.fleet import Admission
from penstock.serving import app, build_app, kserve, model_routes
from penstock.serving.edge import parse, shaped
from penstock.serving.errors import HTTPError
from penstock.serving.gate import Caller, Gate, current
from penstock.serving.keys import change_keys, new_key
from penstock.serving.limits import INLINE_BYTES, MAX_JSON_VALUES
from penstock.serving.schemas import CompletionRequest
from penstock.serving.vectors import EmbeddingRequest
from penstock.spec import EngineConfig, StructuredOutputs
from penstock.text import ChatTemplate
from servers import MODEL, PROMPT, TEMPLATE


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(stories), served_model_name=MODEL, dtype="float32", num_threads=1))
    yield AsyncLLM(replace(llm.engine, chat=ChatTemplate(TEMPLATE)))
    llm.close()


def sent(
    llm: AsyncLLM, path: str, body: object, gate: Gate | None = None, headers: dict[str, str] | None = None
) -> httpx.Response:
    async def send() -> httpx.Response:
        app, context = build_app(llm, gate=gate)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            answer = await client.post(path, json=body, headers=headers)
        await context.batches.close()
        return answer

    return asyncio.run(send())


def threads_of(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[threading.Thread]:
    """Where it is called from now on."""
    seen: list[threading.Thread] = []
    work: Callable[..., object] = getattr(owner, name)

    def seeing(*args: Any, **kwargs: Any) -> object:
        seen.append(threading.current_thread())
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, seeing)
    return seen


SCHEMA = {"description": "x" * INLINE_BYTES, "type": "object"}
SAID = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
TENSOR = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
FORMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 1, "structured_outputs": {"json": SCHEMA}},
    "/v1/chat/completions": SAID | {"guided_json": SCHEMA},
    "/v1/responses": {"input": "Who?", "max_output_tokens": 1, "store": False, "text": {"format": FORMAT}},
    "/v1/messages": SAID | {"output_config": {"format": FORMAT}},
    "/v1/messages/count_tokens": {"messages": SAID["messages"], "output_format": FORMAT},
    "/api/chat": {"messages": SAID["messages"], "format": SCHEMA, "options": {"num_predict": 1}, "stream": False},
    "/api/generate": {"prompt": PROMPT, "raw": True, "format": SCHEMA, "max_tokens": 1, "stream": False},
    f"/v2/models/{MODEL}/generate": {"text_input": PROMPT, "max_tokens": 1, "parameters": {"guided_json": SCHEMA}},
    f"/v2/models/{MODEL}/infer": {"inputs": [TENSOR], "parameters": {"max_tokens": 1, "guided_json": SCHEMA}},
}


@pytest.mark.parametrize("path", FORMS)
def test_forms_are_made_beside_the_loop(llm: AsyncLLM, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threads_of(monkeypatch, StructuredOutputs, "__post_init__")
    answer = sent(llm, path, FORMS[path])
    assert answer.status_code == 200, answer.text
    assert seen and threading.current_thread() not in seen


def test_texts_become_prompts_as_they_are() -> None:
    """By Triton's generate and the Open Inference Protocol: they are not written as JSON and read again."""
    current.set(Caller(Gate(Admission(1)), "a"))
    tensor = msgspec.convert(TENSOR | {"data": ["a text"]}, kserve.Tensor)
    fields: dict[str, Any] = {"max_tokens": 1, "logit_bias": {"5": 1}}
    asked, _ = kserve._asked(kserve.InferRequest(inputs=[tensor], parameters=fields), generates=True)
    vector, _ = kserve._asked(kserve.InferRequest(inputs=[tensor]), generates=False)
    whole = kserve.GenerateRequest(text_input=tensor.data[0], parameters=fields).completion()
    assert isinstance(asked, CompletionRequest) and isinstance(vector, EmbeddingRequest)
    for [text] in (asked.prompt, whole.prompt, vector.input):  # type: ignore[misc]
        assert text is tensor.data[0]
    assert asked.logit_bias == whole.logit_bias == {5: 1.0}


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "n": st.sampled_from([1, 1.0, 1.5, "1", True, 2**70]),
        "temperature": st.sampled_from([0, 1, 0.5, None, "0", 2**70]),
        "logit_bias": st.dictionaries(st.sampled_from(["1", "01", "a", "-1"]), st.sampled_from([1, 0.5, None])),
        "stop": st.sampled_from(["a", "", ["a"], [""], ["a"] * 99, [1], {}]),
        "stream_options": st.sampled_from([{}, {"include_usage": True}, {"include_usage": 1}, []]),
        "service_tier": st.sampled_from(["auto", "x", 1]),
        "prompt": st.sampled_from(["a", ["a"], [1], [[1], [2]], [1.0], None, {}]),
        "response_format": st.just({"a": [1, 2.5, None, {"b": 2**70}]}),
    },
)


@given(fields=BODIES)
def test_fields_have_a_shape_as_their_json_has(fields: dict[str, Any]) -> None:
    def made(work: Callable[[], object]) -> object:
        try:
            return work()
        except HTTPError as error:
            return str(error), error.param

    body = json.dumps(fields).encode()
    told = made(lambda: parse(body, CompletionRequest))
    assert told == made(lambda: shaped(msgspec.json.decode(body), CompletionRequest))


def test_a_parameter_in_a_text_is_as_bounded_as_others() -> None:
    for text, code in (
        ("[" * 9000, "invalid_parameter"),
        ('{"a": [%s1]}' % ("1," * (MAX_JSON_VALUES + 1)), "too_many_values"),
    ):
        with pytest.raises(HTTPError) as refused:
            kserve.GenerateRequest(text_input="a", sampling_parameters=text).completion()
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("path", "module", "work"), [("/api/show", app, "decode"), ("/models/load", model_routes, "parse")]
)
def test_what_only_names_a_model_is_read_beside_the_loop(
    llm: AsyncLLM, path: str, module: object, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threads_of(monkeypatch, module, work)
    answer = sent(llm, path, {"model": MODEL, "x": "x" * INLINE_BYTES})
    assert answer.status_code == 200, answer.text
    assert seen and threading.current_thread() not in seen


def test_to_be_shown_a_model_is_a_request(llm: AsyncLLM, tmp_path: Path) -> None:
    secret, record = new_key([], tenant="acme", role="inference", requests_per_minute=1)
    change_keys(tmp_path / "keys", lambda _: [record])
    gate, headers = Gate(Admission(5000), tmp_path / "keys"), {"x-api-key": secret}
    answers = [sent(llm, "/api/show", {"model": MODEL}, gate=gate, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].json()["code"] == "requests_over_rate" and gate.live == set()
