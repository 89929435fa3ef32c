"""Structured outputs over a file of JSON schemas: what compiles, what is told apart, what a model makes of it, and its
cost.

A file has one JSON object to a line: ``schema``, and optionally ``id`` and ``tests``, a list of ``data`` with ``valid``
(the form of guidance-ai/jsonschemabench and of the JSON-Schema-Test-Suite by groups).
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for

from penstock.base import InvalidRequest, NotFound
from penstock.llm import LLM
from penstock.spec import CompletionOutput, SamplingParams, StructuredOutputs

PROMPT = "A JSON document:\n"


@dataclass(slots=True)
class StructuredReport:
    """Attributes:
    schemas: how many there were.
    exact, wider: compiled with the schema's language, or with a wider one that validation narrows.
    refused: id -> the reason.
    compile_ms: median, 99th percentile and worst of all compilations.
    valid_accepted, valid, invalid_rejected, invalid: given instances of schemas that compiled.
    misjudged: ids of schemas with an instance that was not told apart.
    finish_reasons: of one completion for each schema.
    finished_valid, finished: completions that ended by themselves, and those that jsonschema finds valid.
    broken: ids of schemas whose finished completion is not valid.
    unfinished: ids of schemas whose completion did not end by itself.
    too_long: those of them whose shortest known instance has more tokens than a completion may have.
    tokens: generated in all.
    mask_us: median and 99th percentile of the time the grammar takes for a token (mask, looking ahead, advancing).
    first_mask_ms: median and 99th percentile of what a known grammar adds to the time to the first token.
    """

    schemas: int = 0
    exact: int = 0
    wider: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    compile_ms: tuple[float, ...] = ()
    valid_accepted: int = 0
    valid: int = 0
    invalid_rejected: int = 0
    invalid: int = 0
    misjudged: list[str] = field(default_factory=list)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    finished_valid: int = 0
    finished: int = 0
    broken: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    tokens: int = 0
    mask_us: tuple[float, ...] = ()
    first_mask_ms: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Case:
    id: str
    schema: Any
    tests: Sequence[dict[str, Any]]
    wanted: StructuredOutputs
    grammar: Any  # a penstock.grammar.Grammar


def measure_structured(
    file: Path, model: str | None = None, *, max_tokens: int = 512, temperature: float = 1.0, limit: int | None = None
) -> StructuredReport:
    """Runs everything; the generation is one batch of requests with seeds 0, 1, ...

    Raises:
        NotFound: (file_not_found) there is no such file.
    """
    started = time.perf_counter()
    llm, report = LLM(model), StructuredReport()
    cases = _compile(_read(file, limit), llm, report)
    for case in cases:
        _judge(case, report)
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, structured_outputs=case.wanted)
        for seed, case in enumerate(cases)
    ]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * len(cases), params)] if cases else []
    for case, output in zip(cases, outputs, strict=True):
        _validate(case, output, report)
    report.finish_reasons = dict(Counter(str(output.finish_reason) for output in outputs))
    _time_masks(cases, outputs, llm, max_tokens, report)
    llm.close()
    report.seconds = round(time.perf_counter() - started, 1)
    return report


def _read(file: Path, limit: int | None) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines][:limit]
    except OSError as error:
        raise NotFound("file_not_found", f"{file} cannot be read", why=str(error.strerror)) from None


def _compile(rows: Iterable[dict[str, Any]], llm: LLM, report: StructuredReport) -> list[_Case]:
    cases, times = [], []
    for number, row in enumerate(rows):
        id, started = str(row.get("id", number)), time.perf_counter()
        report.schemas += 1
        try:
            wanted = StructuredOutputs(json=json.dumps(row["schema"]))
            grammar = llm.engine.grammars().compile(wanted)
        except InvalidRequest as error:
            report.refused[id] = error.why or error.what
        else:
            report.exact += grammar.check is None
            report.wider += grammar.check is not None
            cases.append(_Case(id, row["schema"], row.get("tests", ()), wanted, grammar))
        times.append(1e3 * (time.perf_counter() - started))
    report.compile_ms = (*_spread(times), round(max(times, default=0.0), 3))
    return cases


def _judge(case: _Case, report: StructuredReport) -> None:
    right = True
    for test in case.tests:
        accepted = case.grammar.accepts(test["data"])
        right &= accepted == test["valid"]
        if test["valid"]:
            report.valid, report.valid_accepted = report.valid + 1, report.valid_accepted + accepted
        else:
            report.invalid, report.invalid_rejected = report.invalid + 1, report.invalid_rejected + (not accepted)
    if not right:
        report.misjudged.append(case.id)


def _validate(case: _Case, output: CompletionOutput, report: StructuredReport) -> None:
    report.tokens += len(output.token_ids)
    if output.finish_reason != "stop":
        report.unfinished.append(case.id)
        return
    report.finished += 1
    try:
        validator = validator_for(case.schema, default=Draft202012Validator)(case.schema)
        valid = validator.is_valid(json.loads(output.text))
    except (ValueError, RecursionError, SchemaError):
        valid = False
    report.finished_valid += valid
    if not valid:
        report.broken.append(case.id)


def _time_masks(
    cases: Sequence[_Case], outputs: Sequence[CompletionOutput], llm: LLM, room: int, report: StructuredReport
) -> None:
    """Goes through the completions once more, without the model."""
    grammars, vocabulary = llm.engine.grammars(), llm.engine.vocabulary
    end_ids = tuple(sorted(vocabulary.eos_ids))
    each: list[float] = []
    first: list[float] = []
    for case, output in zip(cases, outputs, strict=True):
        started = time.perf_counter()
        matcher = grammars.matcher(case.wanted, room, end_ids)
        matcher.mask(vocabulary.size)
        if output.finish_reason == "length" and (matcher.least or room) > room:
            report.too_long.append(case.id)
        first.append(1e3 * (time.perf_counter() - started))
        for token in output.token_ids:
            started = time.perf_counter()
            matcher.mask(vocabulary.size)
            matcher.admits(token)
            matcher.advance(token)
            each.append(1e6 * (time.perf_counter() - started))
    report.mask_us, report.first_mask_ms = _spread(each), _spread(first)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    if len(values) < 2:
        return (round(sum(values), 3),) * 2
    return round(statistics.median(values), 3), round(statistics.quantiles(values, n=100)[98], 3)
