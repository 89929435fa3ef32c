"""Sampling parameters from what was given on the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest, NotFound
from penstock.spec import SamplingParams, StructuredOutputs

FORMS = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Options that say what form a text must have, and the field of StructuredOutputs that each one is."""


def asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of SamplingParams what was given by those of ``cli.options.SAMPLING``, checked.

    What was not given is left open for the model to recommend, and then for the command.

    Raises:
        NotFound, InvalidRequest: (input_unreadable) a schema or grammar file; what SamplingParams and
            StructuredOutputs raise.
    """
    values = {name: value for name, value in given.items() if name not in FORMS}
    form = {kind: given[name] for name, kind in FORMS.items() if name in given}
    if "json" in form and not form["json"].lstrip().startswith("{"):
        form["json"] = _text_of(form["json"])
    if "grammar" in form and os.path.isfile(form["grammar"]):
        form["grammar"] = _text_of(form["grammar"])
    if form:
        values["structured_outputs"] = StructuredOutputs(**form)
    SamplingParams(**{"max_tokens": None} | values)
    return values


def _text_of(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except OSError as error:
        raise NotFound(
            "input_unreadable",
            f"{path} cannot be read",
            why=(error.strerror or str(error)).lower(),
            fix="check the path",
        ) from None
    except ValueError:
        raise InvalidRequest(
            "invalid_text", f"{path} is not UTF-8 text", fix="convert it, as with iconv -t utf-8"
        ) from None
