"""Sizes of memory as people write them."""

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
