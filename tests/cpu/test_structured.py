"""Structured outputs on the bundled model: what ends is valid, whatever the form, the limit and the neighbours."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from penstock import LLM, SamplingParams
from penstock.base import InvalidRequest
from penstock.spec import StructuredOutputs

BENCH = Path(__file__).parents[3] / "shared/data/prompts/jsonschemabench/sample_a.jsonl"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    model = LLM(backend="torch", max_num_seqs=16)
    yield model
    model.close()


def texts(llm: LLM, wanted: list[StructuredOutputs], **options: object) -> list[tuple[str, str | None]]:
    params = [
        SamplingParams(**{"max_tokens": 80, "seed": seed, **options}, structured_outputs=one)  # type: ignore[arg-type]
        for seed, one in enumerate(wanted)
    ]
    outputs = llm.generate(["Once upon a time"] * len(wanted), params, use_tqdm=False)
    return [(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, object]] = [
    PERSON,
    {"type": "array", "items": PERSON, "minItems": 1},
    {"enum": ["red", "green", 3, None]},
    {"const": {"a": [1, 2]}},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
    {"type": "string", "minLength": 20, "maxLength": 40},
    {"type": "string", "format": "date"},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 7, "minimum": 50},
    {"type": ["boolean", "null"]},
    {"anyOf": [PERSON, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}]},
    {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 10}]},
    {"allOf": [{"minLength": 3, "type": "string"}, {"maxLength": 6}]},
    {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 2},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
    {"type": "array", "contains": {"const": 42}, "maxItems": 4},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2},
    {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,6}$"}, "maxProperties": 3},
    {"type": "object", "properties": {"a": {}, "b": {}}, "not": {"required": ["a"]}, "required": ["b"]},
    {"properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"], "if": {"properties": {"kind": {"const": "x"}}},
     "then": {"required": ["size"]}, "type": "object"},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
    {"$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"},
    {"$schema": "http://json-schema.org/draft-04/schema#", "type": "number", "minimum": 1, "exclusiveMinimum": True},
]  # fmt: skip


@pytest.mark.parametrize("max_tokens", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_every_completion_is_an_instance(llm: LLM, max_tokens: int) -> None:
    wanted = [StructuredOutputs(json=schema) for schema in SCHEMAS]
    for schema, (text, reason) in zip(SCHEMAS, texts(llm, wanted, max_tokens=max_tokens), strict=True):
        assert reason == "stop", (schema, text)
        dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        dialect(schema).validate(json.loads(text))


def test_the_other_forms(llm: LLM) -> None:
    sql = 'root ::= "SELECT " column " from " table\ncolumn ::= "name" | "age"\ntable ::= "t1" | "t2"'
    wanted = [
        StructuredOutputs(choice=["Positive", "Negative"]),
        StructuredOutputs(regex=r"\w+@\w+\.com\n"),
        StructuredOutputs(grammar=sql),
        StructuredOutputs(grammar="start: /[0-9]{3}/ (\"-\" /[0-9]{2}/)*"),
        StructuredOutputs(json_object=True),
        StructuredOutputs(json=PERSON, disable_any_whitespace=True),
    ]  # fmt: skip
    out = texts(llm, wanted)
    assert [reason for _, reason in out] == ["stop"] * 6, out
    assert out[0][0] in ("Positive", "Negative")
    assert re.fullmatch(r"\w+@\w+\.com\n", out[1][0])
    assert re.fullmatch("SELECT (name|age) from t[12]", out[2][0])
    assert re.fullmatch("[0-9]{3}(-[0-9]{2})*", out[3][0])
    assert isinstance(json.loads(out[4][0]), dict)
    assert re.fullmatch(r'\{"name":"[^"\\]*(\\.[^"\\]*)*","age":\d+\}', out[5][0])


def test_a_batch_and_preemptions_change_no_token() -> None:
    """Few blocks, so that requests lose theirs and matchers are made anew from the tokens that were emitted."""
    wanted = [StructuredOutputs(json=schema) for schema in SCHEMAS[:2] + SCHEMAS[13:16]]
    params = [
        SamplingParams(max_tokens=40, seed=seed, structured_outputs=one, repetition_penalty=1.1)
        for seed, one in enumerate(wanted)
    ]
    prompts = ["Once upon a time there was a king"] * len(params)
    alone = LLM(backend="ref", max_num_seqs=1, enable_prefix_caching=False)
    one_by_one = [o.outputs[0].token_ids for o in alone.generate(prompts, params, use_tqdm=False)]
    alone.close()
    tight = LLM(backend="ref", max_num_seqs=8, max_model_len=96, kv_memory="320K", depth=2)
    together = [o.outputs[0].token_ids for o in tight.generate(prompts, params, use_tqdm=False)]
    preempted = tight.engine.service.status().counters.preemptions
    tight.close()
    assert together == one_by_one
    assert preempted > 0


def test_refused_before_anything_runs(llm: LLM) -> None:
    for wanted, code in (
        (StructuredOutputs(regex="a("), "invalid_regex"),
        (StructuredOutputs(grammar="root ::= nothing"), "invalid_grammar"),
        (StructuredOutputs(json={"$ref": "https://example.org/x.json"}), "unsupported_schema"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            texts(llm, [StructuredOutputs(choice=["a"]), wanted])
        assert caught.value.code == code


def test_a_contradiction_ends_its_request_alone(llm: LLM) -> None:
    """The grammar wants one word, min_tokens many: nothing may come after the word."""
    params = [
        SamplingParams(max_tokens=30, min_tokens=20, structured_outputs=StructuredOutputs(choice=["yes"])),
        SamplingParams(max_tokens=30, structured_outputs=StructuredOutputs(choice=["yes"])),
    ]
    failed, fine = llm.generate(["Well,", "Well,"], params, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error"
    assert fine.outputs[0].finish_reason == "stop" and fine.outputs[0].text == "yes"


def test_greedy_and_several_samples(llm: LLM) -> None:
    wanted = StructuredOutputs(json=PERSON)
    params = SamplingParams(temperature=0.0, max_tokens=40, structured_outputs=wanted)
    first, second = (llm.generate("A boy:", params, use_tqdm=False)[0].outputs[0].text for _ in range(2))
    assert first == second
    jsonschema.validate(json.loads(first), PERSON)
    sampled = llm.generate("A boy:", SamplingParams(n=4, seed=3, max_tokens=40, structured_outputs=wanted))[0].outputs
    for output in sampled:
        jsonschema.validate(json.loads(output.text), PERSON)
    assert len({output.text for output in sampled}) > 1


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="needs the shared data")
def test_a_part_of_the_benchmark() -> None:
    from penstock.bench.structured import measure_structured

    report = measure_structured(BENCH, max_tokens=512, limit=150)
    assert report.exact + report.wider >= 0.86 * report.schemas
    assert report.finished_valid == report.finished
    assert set(report.unfinished) == set(report.too_long), "one that fits was cut"
    assert len(report.too_long) <= 3  # of 600 to 1,000 tokens with this tokenizer
    assert (report.valid_accepted, report.invalid_rejected) == (report.valid, report.invalid)
