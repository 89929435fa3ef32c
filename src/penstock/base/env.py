"""Every environment variable Penstock reads, and the only place that reads them. At most ten, ever."""

from __future__ import annotations

import os


def debug() -> bool:
    """PENSTOCK_DEBUG=1: the command line shows the traceback of an error as well as its explanation."""
    return _flag("PENSTOCK_DEBUG")


def _flag(name: str) -> bool:
    """Set to anything but nothing and 0."""
    return os.environ.get(name, "") not in ("", "0")
