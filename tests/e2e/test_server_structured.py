"""Structured outputs over HTTP: OpenAI's response_format, vLLM's structured_outputs and guided_* fields."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from servers import MODEL, PROMPT, Server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
USER: Any = [{"role": "user", "content": "Who?"}]


def test_response_format_as_openai_s_client_sends_it(server: Server) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = server.client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=60, seed=1, response_format=form
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"} and answer.choices[0].finish_reason == "stop"
    stream = server.client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=40, seed=2, response_format={"type": "json_object"}, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]+ "b"'}}, "a[0-9]+b"),
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_json": {"enum": [7]}}, "7"),
    ],
)
def test_vllm_s_fields(server: Server, extra: dict[str, object], pattern: str) -> None:
    answer = server.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, extra_body=extra)
    assert re.fullmatch(pattern, answer.choices[0].text) and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"guided_regex": "a("}, "invalid_regex"),
        ({"guided_grammar": "root ::= missing"}, "invalid_grammar"),
        ({"guided_json": {"$ref": "https://example.org/x"}}, "unsupported_schema"),
        ({"guided_json": "{"}, "invalid_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "invalid_parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "invalid_parameter"),
        ({"structured_outputs": {"jsn": {}}}, "invalid_parameter"),
        ({"structured_outputs": {}}, "invalid_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_cannot_be_had_is_a_400_with_its_code(
    server: Server, extra: dict[str, object], code: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(model=MODEL, prompt=PROMPT, extra_body={**extra, "stream": stream})
    assert caught.value.code == code
