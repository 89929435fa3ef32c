"""The servers that run on this machine for this user: a file for each, in a folder that nobody else can enter."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from penstock.base import env


class Presence(msgspec.Struct, kw_only=True, frozen=True):
    """Attributes:
    began: when its process did, in clock ticks of this boot: a process that has got its id since is another.
    admin: where administration is spoken to; the url itself where there is no port for that.
    token: a key of the role admin that this process alone knows, until it ends; None if it asks for none.
    certificate: file of the one that it proves itself with; None without HTTPS.
    """

    pid: int
    began: int
    model: str
    url: str
    admin: str
    token: str | None = None
    certificate: str | None = None


def folder() -> Path | None:
    """Where the files are; None if there can be no such folder that is ours alone."""
    place = env.runtime_folder() or Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"
    with suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077:
            return place
    return None


def began(pid: int) -> int | None:
    """When a process did, in clock ticks of this boot, 0 where that is not told; None if there is none."""
    try:
        os.kill(pid, 0)  # asks only whether it is there, and ours
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (ProcessLookupError, PermissionError):
        return None
    except OSError:
        return 0
    return int(fields[19])  # the 22nd of proc(5), counted after the name


@contextmanager
def present(presence: Presence) -> Iterator[None]:
    """Is found by ``servers`` meanwhile. A folder that cannot be had is no reason not to serve."""
    place = folder()
    path = None if place is None else place / f"{presence.pid}.json"
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(presence))
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def servers() -> list[Presence]:
    """Those that live, by process id. Files of those that do not are removed."""
    place, found = folder(), []
    for path in sorted(place.glob("*.json")) if place is not None else ():
        try:
            presence = msgspec.json.decode(path.read_bytes(), type=Presence)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue  # being written, or not ours
        if path.stem == str(presence.pid) and began(presence.pid) == presence.began:
            found.append(presence)
        else:
            with suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda presence: presence.pid)
