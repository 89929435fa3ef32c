"""Commands of the command line as processes, through pipes and through a terminal."""

from __future__ import annotations

import atexit
import gc
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NoReturn

GREEDY = ("--dtype", "float32", "--num-threads", "1", "--temperature", "0")


def argv(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "penstock.cli", *map(str, arguments)]


def penstock(
    *arguments: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A command's output and exit code. It runs in a process of its own, forked from one that has torch already."""
    with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as errors:
        given.write(stdin)
        given.seek(0)
        words = ["penstock", *map(str, arguments)]
        descriptors = [given.fileno(), out.fileno(), errors.fileno()]
        with _order(nursery(), words, str(cwd or Path.cwd()), os.environ | environment, descriptors) as answer:
            answer.readline()  # the process id
            code = int(answer.readline())
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), errors.read())


# -- commands without their second of imports: a process that has imported everything forks one for each ---------------


@cache
def nursery() -> str:
    """The socket at which a process waits that has imported what takes long. It lives as long as this one."""
    folder = TemporaryDirectory()
    path = f"{folder.name}/socket"
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import commands; commands.fork_for_orders({server.fileno()})"],
        pass_fds=[server.fileno()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )

    def end() -> None:
        process.kill()
        process.wait()
        server.close()
        folder.cleanup()

    atexit.register(end)
    return path


@contextmanager
def _order(path: str, words: list[str], cwd: str, env: dict[str, str], files: list[int]) -> Iterator[IO[str]]:
    """Asks for a command; yields where its process id and then its exit code will be written."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(path)
        socket.send_fds(connection, [b"\n"], files)
        connection.sendall(json.dumps([words, cwd, env]).encode() + b"\n")
        with connection.makefile() as answer:
            yield answer


def as_client(path: str, name: str) -> NoReturn:
    """What a script called ``penstock`` or ``python`` does: its command, by a process of the nursery."""
    with _order(path, [name, *sys.argv[1:]], os.getcwd(), dict(os.environ), [0, 1, 2]) as answer:
        pid = int(answer.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(answer.readline())
    sys.exit(code)


def fork_for_orders(descriptor: int) -> NoReturn:
    for module in ("penstock.llm", "penstock.runtime.service", "penstock.models", "penstock.kernels.torch"):
        import_module(module)
    from penstock.cli import main

    gc.freeze()  # children then share its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(fileno=descriptor)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _carry_out(connection, main)
        connection.close()


def _carry_out(connection: socket.socket, main: Callable[[], None]) -> NoReturn:
    """Ends without the interpreter's own end, which takes longer than most commands; other tests have it. Of that end
    it keeps the wait for threads that still have something to write."""
    for target, file in enumerate(socket.recv_fds(connection, 1, 3)[1]):
        os.dup2(file, target)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv, folder, environment = json.loads(connection.makefile().readline())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    connection.sendall(f"{os.getpid()}\n".encode())
    code: object = 1
    try:
        main() if sys.argv[0] == "penstock" else run_path(sys.argv[1], run_name="__main__")
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        threading._shutdown()  # type: ignore[attr-defined]  # executors' threads are told to end, and all are joined
        connection.sendall(f"{code}\n".encode())
        os._exit(0)


@contextmanager
def running(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that does not outlive a test that failed."""
    with subprocess.Popen(arguments, **options) as process:
        try:
            yield process
        finally:
            process.kill()


class Terminal:
    """A process on a pseudo-terminal, and a person who reads and types."""

    def __init__(self, arguments: list[str], kind: str = "dumb") -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(arguments[0], arguments, {**os.environ, "TERM": kind})

    def read_until(self, text: str, seconds: float = 60) -> str:
        """What appears on the screen, up to and including ``text``."""
        seen, deadline = b"", time.monotonic() + seconds
        while text.encode() not in seen:
            assert time.monotonic() < deadline, f"no {text!r} in {seen.decode(errors='replace')!r}"
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    seen += os.read(self._fd, 65536)
                except OSError:  # the other side is closed
                    raise AssertionError(f"the end, and no {text!r} in {seen.decode(errors='replace')!r}") from None
        return seen.decode(errors="replace").replace("\r\n", "\n")

    def read_text(self) -> None:
        """Waits for a letter, whichever it is."""
        while not os.read(self._fd, 4096).strip():
            pass

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        self.type("\x03")

    def interrupt_until(self, text: str) -> str:
        """Presses Ctrl-C until ``text`` appears: Python's readline sees one that comes just before it waits for a key
        only with the next key."""
        for _ in range(10):
            time.sleep(0.1)  # by when it waits, nearly always
            self.interrupt()
            with suppress(AssertionError):
                return self.read_until(text, seconds=5)
        raise AssertionError(f"Ctrl-C brings no {text!r}")

    def end(self, seconds: float = 30) -> int:
        """The exit code of a process that is about to end."""
        deadline = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, "it does not end"
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    os.read(self._fd, 65536)
                except OSError:
                    time.sleep(0.05)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)
