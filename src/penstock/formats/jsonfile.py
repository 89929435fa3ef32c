"""Small JSON files of a model folder, read with a size limit and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from penstock.base import ModelFormatError

MAX_JSON_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelFormatError: (file_missing) there is no such file; (json_invalid) it is too large, not UTF-8,
            not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFormatError(
            "file_missing",
            f"{path.name} cannot be read",
            why=f"{path}: {error.strerror or error}",
            fix="check that the model folder was downloaded completely",
        ) from None
    if len(data) > MAX_JSON_BYTES:
        raise _invalid(str(path), f"it is larger than {MAX_JSON_BYTES} bytes")
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """Strict: no duplicate keys, no NaN or Infinity, bounded nesting. ``source`` names the bytes in errors."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise _invalid(source, str(error) or type(error).__name__) from None
    if not isinstance(value, dict):
        raise _invalid(source, f"it holds a JSON {type(value).__name__}, not an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _invalid(source: str, why: str) -> ModelFormatError:
    return ModelFormatError(
        "json_invalid", f"{source} is not a usable JSON file", why=why[:300], fix="download the file again"
    )
