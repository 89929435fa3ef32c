"""``penstock models``: which models are on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from penstock.base import NotFound
from penstock.cli.exits import emit
from penstock.cli.terminal import human, size


def models(
    folder: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="list the model folders in it instead of the hub's cache")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each model")] = False,
) -> None:
    """List the models on this machine: the bundled ones and those in the Hugging Face cache."""
    from penstock.cli.inventory import cached_folders, folders_in, look_at
    from penstock.spec.location import BUNDLED_MODELS

    if folder is not None and not Path(folder).is_dir():
        raise NotFound("model_not_found", f"There is no folder {folder}")
    if folder is None:
        places = [*BUNDLED_MODELS.items(), *cached_folders()]
    else:
        places = [(str(path), path) for path in folders_in(Path(folder))]
    found = (look_at(name, path) for name, path in places)
    if as_json:
        for model in found:
            emit(json.dumps(model.report()))
        return
    rows = [("MODEL", "FAMILY", "PARAMETERS", "CONTEXT", "SIZE", "RUNS HERE")]
    for model in found:
        rows.append(
            (
                model.name,
                model.family or "?",
                "?" if model.parameters is None else human(model.parameters),
                "?" if model.context is None else f"{model.context}",
                size(model.bytes),
                "yes" if model.runs else f"no: {model.problem}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
