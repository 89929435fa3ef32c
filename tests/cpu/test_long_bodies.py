"""Bodies that would hold up the event loop: ids come piece by piece, and of other values there is a most."""

from __future__ import annotations

import json
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serving.answers import VALUES, told
from penstock.serving.decoding import decode, in_batches
from penstock.serving.errors import HTTPError
from penstock.serving.limits import INLINE_BYTES, MAX_FIELDS_NOTED, MAX_JSON_VALUES, MAX_PROMPTS, NOTED_SECONDS
from penstock.serving.schemas import CompletionRequest, GenerationRequest
from penstock.serving.tokens import DetokenizeRequest
from penstock.serving.unread_fields import NotedFields
from penstock.serving.vectors import EmbeddingRequest
from penstock.spec import StructuredOutputs

IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)
GAPS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", ":")])


def plain(prompts: Any) -> Any:
    return [list(each) if isinstance(each, array) else each for each in prompts]


@settings(max_examples=settings.default.max_examples // 4)
@given(ids=IDS, several=st.booleans(), times=st.integers(1, 400), gaps=GAPS)
def test_ids_are_what_they_are_in_one_piece(ids: list[int], several: bool, times: int, gaps: tuple[str, str]) -> None:
    prompt: Any = [ids * times, ids] if several else ids * times
    body = json.dumps({"max_tokens": 1, "prompt": prompt, "stop": ["]"]}, separators=gaps).encode()
    asked = decode(body, CompletionRequest)
    assert plain(asked.prompts()) == (prompt if several else [prompt]) and (asked.max_tokens, asked.stop) == (1, ["]"])
    raw = json.dumps(prompt, separators=gaps)
    if len(raw) > INLINE_BYTES:
        assert isinstance(asked.prompts()[0], array)


def test_every_shape_that_takes_ids() -> None:
    ids = list(range(200_000))
    assert decode(json.dumps({"tokens": ids}).encode(), DetokenizeRequest).tokens == array("I", ids)
    assert plain(decode(json.dumps({"input": [ids, [1]]}).encode(), EmbeddingRequest).inputs()) == [ids, [1]]


@given(length=st.integers(0, 3 * VALUES), text=st.text(max_size=40), times=st.integers(0, 2000))
def test_an_object_in_pieces_is_what_it_is_in_one(length: int, text: str, times: int) -> None:
    lists = {"tokens": list(range(length)), "token_strs": [text] * (length % 5000)}
    plain = {"count": length, "none": None, "prompt": text * times}
    pieces = told(plain | {name: iter(values) for name, values in lists.items()})
    assert b"".join(pieces) == msgspec.json.encode(plain | lists)
    assert max(map(len, pieces)) <= VALUES * max(24, 6 * len(text.encode()) + 3) + 20


MANY = MAX_JSON_VALUES + 2


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": [0] * MANY + [-1]}, "too_many_values"),
        ({"prompt": [0] * MANY + [2**32]}, "too_many_values"),
        ({"prompt": [0] * MANY + ["a,b"]}, "too_many_values"),
        ({"prompt": [[0]] * MANY}, "too_many_values"),
        ({"prompt": [[0] * 99] * 2000}, "invalid_parameter"),
        ({"prompt": [[]] * MAX_PROMPTS + [[0] * MANY]}, "invalid_parameter"),
        ({"prompt": "a", "stop_token_ids": [0] * MANY}, "too_many_values"),
        ({"prompt": "a", "metadata": [{}] * MANY}, "too_many_values"),
        ({"prompt": "a"} | {f"f{i}": 0 for i in range(MANY)}, "too_many_values"),
        ({"prompt": "a", "response_format": {str(i): i for i in range(MANY)}}, "too_many_values"),
        ({"max_tokens": "a" * INLINE_BYTES, "prompt": "a"}, "invalid_parameter"),
    ],
    ids=range(11),
)
def test_many_other_values_are_refused(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(HTTPError) as refused:
        decode(json.dumps(fields).encode(), CompletionRequest)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "guided_json": {}}),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}}),
    ],
)
def test_the_form_of_a_line_of_a_batch_is_made_where_its_body_is_decoded(path: str, fields: dict[str, Any]) -> None:
    asked = in_batches()[path].decode(json.dumps(fields).encode())
    assert isinstance(asked, GenerationRequest)
    assert asked.params({}).structured_outputs is asked.structured_outputs == StructuredOutputs(json={})  # type: ignore[comparison-overlap]


def test_a_text_may_have_any_number_of_commas() -> None:
    text = ',:"\\' * MANY
    assert decode(json.dumps({"prompt": text}).encode(), CompletionRequest).prompt == [text]


@pytest.mark.parametrize("prompts", [([0] * 40_000, [7]), ([7], [0] * 40_000)], ids=["first", "last"])
def test_the_last_of_two_fields_of_a_name_counts(prompts: tuple[list[int], list[int]]) -> None:
    body = b'{"prompt":%s,"\\u0070rompt":%s}' % tuple(json.dumps(each).encode() for each in prompts)
    assert plain(decode(body, CompletionRequest).prompts()) == [prompts[1]]


def test_unknown_fields_are_told_once_in_a_while_and_not_all() -> None:
    noted = NotedFields()
    assert noted.line([], 0.0) is None
    assert str(noted.line(["a", "b"], 0.0)).endswith("ignored: ['a', 'b']")
    assert noted.line(["b", "a"], 1.0) is None
    assert str(noted.line(["b", "c"], 1.0)).endswith(": ['c']")
    lines = [noted.line([f"{i}" + "x" * 999], 2.0) for i in range(10_000)]
    said = [line for line in lines if line]
    assert len(said) == MAX_FIELDS_NOTED - 3 and max(map(len, said)) < 400
    assert noted.line(["d"], NOTED_SECONDS - 0.1) is None
    untold = 10_000 - len(said) + 1
    assert noted.line(["a"], NOTED_SECONDS) == (
        f"a request carries unknown fields, which are ignored (and {untold} more in the time before): ['a']"
    )
    assert noted.line(["a"], NOTED_SECONDS + 1) is None and noted.line(["a"], 2 * NOTED_SECONDS)
