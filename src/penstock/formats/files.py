"""Whole files, read with a size limit and errors that name them; and pages of mapped ones."""

from __future__ import annotations

import mmap
from pathlib import Path

from penstock.base import ModelFormatError


def read_bytes(path: Path, limit: int, invalid: str) -> bytes:
    """What is in a file.

    Args:
        limit: most bytes it may have.
        invalid: code of the error if it has more.

    Raises:
        ModelFormatError: (file_missing) it cannot be read; (``invalid``) it is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelFormatError(
            "file_missing",
            f"{path.name} cannot be read",
            why=f"{path}: {error.strerror or error}",
            fix="check that the model folder was downloaded completely",
        ) from None
    if len(data) > limit:
        raise ModelFormatError(invalid, f"{path} is not usable", why=f"it is larger than {limit} bytes")
    return data


def release_pages(mapped: mmap.mmap, start: int, end: int) -> None:
    """Lets the system reclaim the pages of those bytes; views stay valid and would read the file again."""
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, end - first)
