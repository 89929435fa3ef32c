"""The three ways in which clients ask for a form: OpenAI's response_format, vLLM's structured_outputs, and its former
guided_* fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.serving.errors import HTTPError, unsupported
from penstock.spec import StructuredOutputs

GUIDED = ("json", "regex", "choice", "grammar")


def wanted_form(fields: Mapping[str, Any]) -> StructuredOutputs | None:
    """What the fields of a request ask for, None if the text is free.

    Raises:
        HTTPError: (invalid_parameter) several forms, or a response_format that is none; (unsupported_parameter)
            another type of it.
        InvalidRequest: as StructuredOutputs.
    """
    given: dict[str, StructuredOutputs] = {}
    if (value := fields.get("structured_outputs")) is not None:
        given["structured_outputs"] = StructuredOutputs.of(value)
    for kind in GUIDED:
        if (value := fields.get(f"guided_{kind}")) is not None:
            given[f"guided_{kind}"] = StructuredOutputs.of({kind: value})
    if (value := fields.get("response_format")) is not None and (form := _response_format(value)) is not None:
        given["response_format"] = form
    if len(given) > 1:
        raise HTTPError(
            "invalid_parameter",
            f"{' and '.join(given)} exclude each other",
            fix="send one of them",
            param=next(iter(given)),
        )
    return next(iter(given.values()), None)


def _response_format(value: Mapping[str, Any]) -> StructuredOutputs | None:
    match value:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return StructuredOutputs(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return StructuredOutputs.of({"json": schema})
        case {"type": "json_schema"}:
            raise HTTPError(
                "invalid_parameter",
                "response_format.json_schema cannot be used",
                why="it has no schema",
                param="response_format.json_schema.schema",
            )
    raise unsupported("response_format", what="response_format must be text, json_object or json_schema")
