"""``penstock doctor``: what this machine can do for a model, and what is off."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.exits import emit


def doctor(
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="how long to watch what else runs here")] = 10.0,
    folder: Annotated[
        Path | None, typer.Option(help="where models lie, for the disk; the hub's cache if left out", exists=True)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure this machine: kernels, processors, memory, matrix rates, disk, GPUs, who else takes time, and what each
    means for tokens a second."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from penstock.bench.doctor import examine, folder_for_models
    from penstock.bench.doctor_report import concerns, table

    found = examine(seconds, folder or folder_for_models(HF_HUB_CACHE))
    if not as_json:
        emit(table(found))
        return
    facts = dataclasses.asdict(found) | {"features": sorted(found.features)}
    facts["limits"] = dataclasses.asdict(found.limits)
    emit(json.dumps(facts | {"off": [dataclasses.asdict(concern) for concern in concerns(found)]}))
