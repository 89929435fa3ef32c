"""The sampling parameters that a model recommends, in generation_config.json or in its GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest, ModelFormatError
from penstock.formats import read_gguf, read_json_object
from penstock.spec.sampling import SamplingParams

RECOMMENDED = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Keys of generation_config.json that are taken over, and the fields of SamplingParams they are, as in vLLM."""
GGUF_RECOMMENDED = {f"general.sampling.{name}": name for name in ("top_p", "top_k", "min_p")} | {
    "general.sampling.temp": "temperature",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""The same, of a GGUF file's metadata."""


def read_recommended(folder: Path) -> dict[str, Any]:
    """What a folder or a GGUF file recommends, by the names of SamplingParams; empty if it does not say.

    Every face puts it over its own defaults and under what a request says.

    Raises:
        ModelFormatError: json_invalid; (generation_config_invalid) it recommends what cannot be used.
    """
    path, keys = folder / "generation_config.json", RECOMMENDED
    if folder.is_file():
        path, keys = folder, GGUF_RECOMMENDED
        said = dict(read_gguf(path).metadata)
    else:
        said = read_json_object(path) if path.exists() else {}
    recommended = {name: said[key] for key, name in keys.items() if said.get(key) is not None}
    try:
        SamplingParams(**recommended)
    except InvalidRequest as error:
        raise ModelFormatError(
            "generation_config_invalid",
            f"The model recommends what cannot be: {error.what}",
            why=error.why,
            fix='correct the file, or pass it over with generation_config = "none"',
        ) from None
    return recommended
