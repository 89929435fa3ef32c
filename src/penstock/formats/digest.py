"""What a file holds, as one name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from penstock.base import ModelFormatError
from penstock.formats.files import written_whole
from penstock.formats.jsonfile import read_json_object

REMEMBERED = 256
"""Files whose digests are kept, the latest of them."""

SETTLED_NS = 2_000_000_000
"""A file changed so lately may change again within the same tick of its file system's clock."""

READ_AT_ONCE = 1 << 24

_known: dict[str, str] = {}


def file_digest(path: Path, memory: Path | None = None, told: Callable[[], None] = lambda: None) -> str:
    """sha256 in hex, computed once while place, size, times and inode stay the same. A hub cache names its files by
    just that, which is believed where nothing is kept for later: a blob may be mended under the name it had damaged.

    Args:
        memory: a file that remembers digests beyond this process. One that is damaged or cannot be written is none.
        told: hears that there is progress, every 16 MiB.
    """
    name = path.resolve().name if memory is None and path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", name):
        return name
    key, settled = _state(path)
    if key not in _known and memory is not None:
        _known.update(_read(memory))
    if key not in _known:
        digest = _digest(path, told)
        if not settled or _state(path)[0] != key:
            return digest
        _known[key] = digest
        if memory is not None:
            _write(memory, key, digest)
    return _known[key]


def _digest(path: Path, told: Callable[[], None]) -> str:
    digest, part = hashlib.sha256(), memoryview(bytearray(READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            digest.update(part[:count])
            told()
    return digest.hexdigest()


def _state(path: Path) -> tuple[str, bool]:
    """All that would be another if the file were; and whether its last change is long enough ago to show."""
    stat = path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)  # the latter cannot be set
    numbers = (stat.st_size, *times, stat.st_ino, stat.st_dev)
    return f"{' '.join(map(str, numbers))} {path.resolve()}", time.time_ns() - max(times) > SETTLED_NS


def _read(memory: Path) -> dict[str, str]:
    with contextlib.suppress(ModelFormatError):
        return {
            key: digest
            for key, digest in read_json_object(memory).items()
            if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        }
    return {}


def _write(memory: Path, key: str, digest: str) -> None:
    """Whoever writes at the same time may win; what is lost is computed again."""
    with contextlib.suppress(OSError):
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A file that changed has one entry, its latest.
        place = key.split(" ", 5)[5]
        others = [item for item in _read(memory).items() if item[0].split(" ", 5)[5:] != [place]]
        with written_whole(memory) as file:
            file.write(json.dumps(dict([*others, (key, digest)][-REMEMBERED:]), indent=0).encode())
