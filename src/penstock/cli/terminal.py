"""What commands print: model text that cannot drive the terminal, and what a run has cost."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from penstock.cli.exits import emit

MIB = 1 << 20


class TextOutput:
    """Prints pieces of text at once. On a terminal, control characters are shown, never obeyed."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # None where stdout is closed
            sys.stdout.reconfigure(errors="replace")
        self._controls = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}
        self._plain = not is_terminal(sys.stdout)

    def __call__(self, text: str) -> None:
        if text:
            emit(text if self._plain else text.translate(self._controls), end="")


def is_terminal(stream: object) -> bool:
    """False for a stream that is closed or missing as well."""
    return isinstance(stream, io.TextIOBase) and not stream.closed and stream.isatty()


def note(text: str) -> None:
    """A line on stderr, where it does not mix with the output."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def peak_memory() -> int:
    """Most bytes this process held at once; on a GPU, those the device held for it are added."""
    device = sys.modules["torch"].cuda.max_memory_allocated() if "torch" in sys.modules else 0
    return _peak_resident() + int(device)


def _peak_resident() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource  # macOS; on Linux its figure may be that of the process which started this one

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def size(count: int) -> str:
    """ "1.50 GiB" for a number of bytes."""
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {name}"
    return f"{count / 1024:.1f} KiB"


def human(count: int) -> str:
    """ "11.0M" for a number of things."""
    for power, name in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.4g}{name}"
    return str(count)
