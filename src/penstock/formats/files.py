"""Whole files, read with a size limit and errors that name them, or written; and pages of mapped ones."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
        raise ModelFormatError(
            invalid,
            f"{path} is not usable",
            why=f"it is larger than {limit} bytes",
            fix="download the file again, or take another model: none that is known has one so large",
        )
    return data


UNFINISHED = ".unfinished"
"""Of the names of files that are being written, or were when something stopped it."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is on the disk: readers find all of it or none, whoever else writes the
    same. After an error nothing is left."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=UNFINISHED)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def release_pages(mapped: mmap.mmap, start: int, end: int) -> None:
    """Lets the system reclaim the pages of those bytes; views stay valid and would read the file again."""
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, end - first)
