"""A process started to be spoken to over a Unix socket that nobody else can open."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from penstock.base import ConfigError, EngineError
from penstock.wire.frames import Connection

log = logging.getLogger(__name__)

LEAVE_SECONDS = 60.0
"""How long a process may take to end of itself: its last step, and weights that it is writing to the cache."""

_LOOK = 0.05


class EngineProcess:
    """Runs ``argv`` with the path of a socket as its last argument. It is its own process group, so that Ctrl-C in a
    terminal reaches only whoever serves; it has to end when its socket does.

    Raises:
        ConfigError: (engine_process) it cannot be started.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="penstock-"))  # 0700
        except OSError as error:
            raise _unstarted(str(error)) from error
        self.path = self._folder / "engine"
        try:
            self._listener = listen(self.path)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise _unstarted(str(error)) from error
        try:
            self.process = subprocess.Popen([*argv, str(self.path)], stdin=subprocess.DEVNULL, process_group=0)
        except OSError as error:
            self._forget()
            raise _unstarted(str(error)) from error

    def connect(self) -> Connection:
        """Waits for the process to knock; nothing is left of the socket in the file system afterwards.

        Raises:
            EngineError: (engine_died) it ended instead.
        """
        try:
            while True:
                with suppress(TimeoutError):
                    accepted, _ = self._listener.accept()
                    if peer_of(accepted) in (None, self.process.pid):
                        accepted.settimeout(None)
                        return Connection(accepted)
                    accepted.close()
                if self.process.poll() is not None:
                    raise EngineError("engine_died", f"The engine process {self.fate()}", fix="see the log for why")
        finally:
            self._forget()

    def end(self, seconds: float) -> None:
        """Waits so long for it to end of itself, then kills it. Its connection must be closed before."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(_LOOK / 5)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def memory(self) -> int | None:
        """Bytes of it that no other process and no file has, as Linux counts them (proc_pid_statm(5)); else None."""
        try:
            _, resident, shared, *_ = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except (OSError, ValueError):
            return None
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    def fate(self) -> str:
        """How it ended, for a sentence that begins with its name."""
        code = self.process.returncode
        if code is None:
            return "has not ended"
        return f"ended with status {code}" if code >= 0 else f"was killed by signal {-code}"

    def _forget(self) -> None:
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user can connect to. The folder must be private already."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
        listener.settimeout(_LOOK)
    except OSError:
        listener.close()
        raise
    return listener


def peer_of(connected: socket.socket) -> int | None:
    """The process at the other end (SO_PEERCRED of unix(7)); None where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid: int = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[
        0
    ]
    return pid


def python(module: str) -> list[str]:
    """A command line that runs a module with this interpreter; it looks in this directory only if this process does."""
    here = {"", os.getcwd()}.intersection(sys.path)
    return [sys.executable, *([] if here else ["-P"]), "-m", module]


def _unstarted(why: str) -> ConfigError:
    return ConfigError(
        "engine_process",
        "The engine process cannot be started",
        why=why[:200],
        fix="see that TMPDIR is short and writable, and that the system has descriptors (ulimit -n) and memory left",
    )
