"""Where a model is: in the package, on this machine, or on a hub."""

from __future__ import annotations

from pathlib import Path

from penstock.base import NotFound
from penstock.formats.gguf import gguf_file

BUNDLED = Path(__file__).parents[1] / "bundled"
BUNDLED_NAME = "penstock-tiny"
BUNDLED_MODELS = {BUNDLED_NAME: BUNDLED, "penstock-nano": BUNDLED.with_name("bundled_nano")}
"""Of one tokenizer; the second drafts for the first."""


def locate(model: str | None) -> Path | str:
    """A folder or GGUF file of this machine, or a hub id. Raises NotFound: (model_not_found) it is neither."""
    model = model or BUNDLED_NAME
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model]
    path = Path(model).expanduser()
    if path.exists():
        return gguf_file(path) or path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        fix = "give a folder, a GGUF file or a hub id such as org/name"
        raise NotFound("model_not_found", f"There is no model {model!r}", fix=fix)
    return model
