"""The folder of packed weights: found by key, bounded in size, least recently used out first. Whatever goes wrong with
it costs the time to make weights anew, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.base import ModelFormatError, PenstockError
from penstock.formats.digest import file_digest
from penstock.formats.files import UNFINISHED
from penstock.formats.packed import PackedFile, PackedTensor, write_packed

log = logging.getLogger(__name__)

ABANDONED_S = 3600.0
"""A file that is being written and was not for so long belongs to a process that is gone."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of the cache. Attributes: used: seconds since the epoch."""

    key: str
    path: Path
    bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class WeightCache:
    """Several processes may use one. A file that one removes stays mapped where another has it open.

    Attributes:
        limit: bytes that its files may have together.
        told: hears of progress where something takes long.
    """

    folder: Path
    limit: int
    told: Callable[[], None] = lambda: None

    def digest(self, path: Path) -> str:
        """As ``file_digest``, remembered from start to start."""
        return file_digest(path, self.folder / "digests.json", self.told)

    def find(self, key: str) -> PackedFile | None:
        path = self._path(key)
        try:
            found = PackedFile(path, key)
        except FileNotFoundError:
            return None
        except (ModelFormatError, OSError, ValueError) as error:
            self.discard(key, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def discard(self, key: str, error: Exception) -> None:
        """Removes what turned out to be damaged."""
        log.warning("%s", error.why if isinstance(error, PenstockError) else error)
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def keep(
        self,
        key: str,
        about: Mapping[str, str],
        tensors: Iterable[tuple[str, PackedTensor, memoryview]],
        size: int,
    ) -> bool:
        """Whether it is kept now: not if it is larger than the limit or than half of what the disk has left, or cannot
        be written."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > min(self.limit, free // 2):
                log.info("%d bytes of packed weights are not kept: limit %d, free %d", size, self.limit, free)
                return False
            self._make_room(self.limit - size)
            write_packed(self._path(key), key, about, tensors)
        except OSError as error:
            log.warning("packed weights are not kept: %s", error)
            return False
        return True

    def listing(self) -> list[Kept]:
        """What is kept, the latest used first."""
        return sorted(self._files(".packed"), key=lambda kept: kept.used, reverse=True)

    def about(self, kept: Kept) -> Mapping[str, str]:
        """What was said of it when it was written; nothing if it cannot be used."""
        with contextlib.suppress(ModelFormatError, OSError, ValueError):
            return PackedFile(kept.path, kept.key).about
        return {}

    def clear(self) -> list[Kept]:
        """Removes everything, remembered digests too; returns what was kept.

        Raises:
            OSError: something cannot be removed.
        """
        removed = self.listing()
        for kept in [*removed, *self._files(UNFINISHED)]:
            kept.path.unlink(missing_ok=True)
        (self.folder / "digests.json").unlink(missing_ok=True)
        return removed

    def _make_room(self, room: int) -> None:
        for kept in self._files(UNFINISHED):
            if time.time() - kept.used > ABANDONED_S:
                kept.path.unlink(missing_ok=True)
        for kept in self.listing():
            room -= kept.bytes
            if room < 0:
                kept.path.unlink(missing_ok=True)

    def _files(self, suffix: str) -> Iterator[Kept]:
        for path in self.folder.glob(f"*{suffix}"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                stat = path.stat()
                yield Kept(path.stem, path, stat.st_size, stat.st_mtime)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.packed"
