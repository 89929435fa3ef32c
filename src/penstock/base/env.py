"""Every environment variable Penstock reads, and the only place that reads them. At most ten, ever."""

from __future__ import annotations

import os
from pathlib import Path


def debug() -> bool:
    """PENSTOCK_DEBUG=1: the command line shows the traceback of an error as well as its explanation."""
    return _flag("PENSTOCK_DEBUG")


def cache_folder() -> Path:
    """PENSTOCK_CACHE: where packed weights are kept; by default ``penstock`` in XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("PENSTOCK_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "penstock"


def data_folder() -> Path:
    """PENSTOCK_DATA: where uploaded files are kept; by default ``penstock`` in XDG_DATA_HOME or ~/.local/share."""
    if given := os.environ.get("PENSTOCK_DATA"):
        return Path(given)
    return Path(os.environ.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser()) / "penstock"


def cache_size() -> str:
    """PENSTOCK_CACHE_SIZE: bytes they may take together, such as "20G"."""
    return os.environ.get("PENSTOCK_CACHE_SIZE") or "20G"


def _flag(name: str) -> bool:
    """Set to anything but nothing and 0."""
    return os.environ.get(name, "") not in ("", "0")
