"""How a command ends: errors as one short block on stderr, exit codes that scripts can rely on.

0    done
1    the fault is ours or the machine's
2    the request was wrong: a bad option, a prompt that cannot be served
3    the model or the configuration was wrong: missing, damaged, not supported, does not fit
130  interrupted (Ctrl-C)
141  whoever read the output went away
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from penstock.base import ConfigError, InvalidRequest, ModelFormatError, NotFound, PenstockError, env

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wraps a command so that every way out of it is quiet and has its code."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            emit("", end="")
        except PenstockError as error:
            explain(error, as_json=kwargs.get("as_json") is True)
            sys.exit(exit_code(error))
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            _discard_stdout()
            sys.exit(141)
        except Exception as error:
            explain(_unexpected(error), as_json=kwargs.get("as_json") is True)
            sys.exit(1)

    return wrapper


def emit(text: str, *, end: str = "\n") -> None:
    """Prints at once; nothing where stdout is closed.

    Raises:
        BrokenPipeError: whoever read it went away.
        PenstockError: (output_failed) it cannot be written, as on a full disk.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise PenstockError(
            "output_failed",
            "The output cannot be written",
            why=(error.strerror or str(error)).lower(),
            fix="see where stdout goes",
        ) from error


def exit_code(error: PenstockError) -> int:
    if isinstance(error, InvalidRequest):
        return 2
    return 3 if isinstance(error, (ModelFormatError, ConfigError, NotFound)) else 1


def explain(error: PenstockError, *, as_json: bool = False) -> None:
    """Prints what, why, fix and code on stderr, as lines or as one JSON object; under PENSTOCK_DEBUG=1 the traceback
    first."""
    if env.debug():
        import traceback

        traceback.print_exception(error.__cause__ or error)
    if as_json:
        print(json.dumps({"error": as_dict(error)}), file=sys.stderr)
        return
    lines = [f"Error: {error.what}", f"  why:  {error.why}", f"  fix:  {error.fix}", f"  code: {error.code}"]
    kept = [line for line, part in zip(lines, (error.what, error.why, error.fix, error.code), strict=True) if part]
    print("\n".join(kept), file=sys.stderr)


def as_dict(error: PenstockError) -> dict[str, str]:
    """As it appears in JSON output."""
    return {"code": error.code, "what": error.what, "why": error.why, "fix": error.fix}


def _unexpected(cause: Exception) -> PenstockError:
    error = PenstockError(
        "internal_error",
        "Something went wrong inside Penstock",
        why=f"{type(cause).__name__}: {cause}",
        fix="set PENSTOCK_DEBUG=1 to see where, and please report it",
    )
    error.__cause__ = cause
    return error


def _discard_stdout() -> None:
    """The interpreter flushes stdout once more on its way out; that flush must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
