"""Errors that a person can act on.

PenstockError
├── InvalidRequest    the caller asked for something that cannot be served (HTTP 400)
│   └── ContextOverflow  a prompt that is longer than the context
├── NotFound          a model, adapter or file that does not exist (HTTP 404)
├── Unavailable       it could be served, but not now (HTTP 503)
│   └── OverLimit     this caller has had its share for the moment (HTTP 429)
├── ModelFormatError  a model folder or file is damaged or not understood
├── ConfigError       this configuration cannot run on this build or machine
└── EngineError       a step failed; the fault is ours or the hardware's (HTTP 500)
"""

from __future__ import annotations


class PenstockError(Exception):
    """What happened, why (with numbers), what to do, and a code that never changes.

    Args:
        code: stable snake_case identifier; documented, safe to match on.
        what: one sentence saying what failed.
        why: the cause, with the numbers that were compared.
        fix: what the reader can do about it.
    """

    status = 500

    def __init__(self, code: str, what: str, *, why: str = "", fix: str = "") -> None:
        self.code, self.what, self.why, self.fix = code, what, why, fix
        super().__init__(code, what, why, fix)

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.fix:
            text += f". {self.fix[0].upper()}{self.fix[1:]}"
        return f"{text} [{self.code}]"


class InvalidRequest(PenstockError):
    status = 400


class ContextOverflow(InvalidRequest):
    """Attributes:
    tokens: of the prompt; None where they were not counted.
    most: that a prompt may have.
    """

    def __init__(
        self, code: str, what: str, *, why: str = "", fix: str = "", tokens: int | None = None, most: int = 0
    ) -> None:
        super().__init__(code, what, why=why, fix=fix)
        self.tokens, self.most = tokens, most


class NotFound(PenstockError):
    status = 404


class Unavailable(PenstockError):
    """Attributes:
    retry_after: seconds after which it is worth another try.
    """

    status = 503

    def __init__(self, code: str, what: str, *, why: str = "", fix: str = "", retry_after: float = 1.0) -> None:
        super().__init__(code, what, why=why, fix=fix)
        self.retry_after = retry_after


class OverLimit(Unavailable):
    status = 429


class ModelFormatError(PenstockError):
    status = 500


class ConfigError(PenstockError):
    status = 500


class EngineError(PenstockError):
    status = 500
