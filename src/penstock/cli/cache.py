"""``penstock cache``: packed weights that are kept on disk for the next start."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

from penstock.base import env, parse_size
from penstock.cli.exits import emit
from penstock.cli.terminal import size


def cache(
    *,
    clear: Annotated[bool, typer.Option("--clear", help="remove all that is kept")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each file")] = False,
) -> None:
    """List the packed weights that are kept on this machine, the latest used first."""
    from penstock.formats import WeightCache

    store = WeightCache(env.cache_folder(), parse_size(env.cache_size()))
    kept = [(file, store.about(file)) for file in store.listing()]
    if clear:
        store.clear()
    if as_json:
        for file, about in kept:
            emit(json.dumps(dict(about) | {"path": str(file.path), "bytes": file.bytes, "used": file.used}))
        return
    for file, about in kept:
        used = datetime.fromtimestamp(file.used).strftime("%Y-%m-%d %H:%M")
        emit(f"{used}  {size(file.bytes):>10}  {about.get('weights', '?'):8}  {about.get('model', '?')}")
    total = size(sum(file.bytes for file, _ in kept))
    if clear:
        emit(f"{total} removed from {store.folder}")
    else:
        emit(f"{total} of at most {size(store.limit)} in {store.folder}")
