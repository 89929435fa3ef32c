"""Sizes of memory and spans of time as people write them."""

from __future__ import annotations

import re

from penstock.base.errors import ConfigError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "2G", "512M", "1.5 GiB" or "1000000"; units are powers of 1024.

    Raises:
        ConfigError: (size_invalid).
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None or (size := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise ConfigError("size_invalid", f"{text!r} is not a size of memory", fix='write it like "512M" or "2G"')
    return size


SPANS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_span(text: str) -> float | None:
    """Seconds of "10m", "1.5 h" or "30"; None of "-1", which means for ever.

    Raises:
        ConfigError: (span_invalid).
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if match is None and text.strip() != "-1":
        fix = 'write it like "30s" or "10m"; -1 is for ever'
        raise ConfigError("span_invalid", f"{text!r} is not a span of time", fix=fix)
    return None if match is None else float(match[1]) * SPANS[match[2]]
