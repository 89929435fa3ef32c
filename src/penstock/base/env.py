"""Every environment variable Penstock reads, and the only place that reads them. At most ten, ever; one is a family."""

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
    """PENSTOCK_DATA: where what clients have kept is; by default ``penstock`` in XDG_DATA_HOME or ~/.local/share."""
    if given := os.environ.get("PENSTOCK_DATA"):
        return Path(given)
    return Path(os.environ.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser()) / "penstock"


def cache_size() -> str:
    """PENSTOCK_CACHE_SIZE: bytes they may take together, such as "20G"."""
    return os.environ.get("PENSTOCK_CACHE_SIZE") or "20G"


def runtime_folder() -> Path | None:
    """``penstock`` in XDG_RUNTIME_DIR, which belongs to the user and ends with the session."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    return Path(given) / "penstock" if given else None


def config_file() -> Path | None:
    """PENSTOCK_CONFIG: the file of ``penstock serve`` where --config is left out."""
    given = os.environ.get("PENSTOCK_CONFIG")
    return Path(given) if given else None


_SERVE = "PENSTOCK_SERVE_"


def serve_options() -> dict[str, str]:
    """PENSTOCK_SERVE_PORT and the like, a variable for each option of ``penstock serve``: its name to its text."""
    return {name.removeprefix(_SERVE).lower(): text for name, text in os.environ.items() if name.startswith(_SERVE)}


def serve_option(name: str) -> str:
    """The variable of an option."""
    return _SERVE + name.upper()


OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def otlp_endpoint() -> str | None:
    """OTEL_EXPORTER_OTLP_ENDPOINT: where ``penstock serve`` sends spans if --otlp-endpoint is left out."""
    return os.environ.get(OTLP_ENDPOINT) or None


def _flag(name: str) -> bool:
    """Set to anything but nothing and 0."""
    return os.environ.get(name, "") not in ("", "0")
