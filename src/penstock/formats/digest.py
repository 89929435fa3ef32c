"""What a file holds, as one name."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_known: dict[tuple[str, int, int, int], str] = {}


def file_digest(path: Path) -> str:
    """sha256 in hex, computed once per (path, size, mtime, inode). A hub cache names its files by just that."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if key not in _known:
        name = path.resolve().name if path.is_symlink() else ""
        if re.fullmatch("[0-9a-f]{64}", name):
            _known[key] = name
        else:
            with path.open("rb") as file:
                _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]
