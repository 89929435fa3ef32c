"""HTTPS, and web pages of other origins: both off unless they are asked for."""

from __future__ import annotations

import logging
import re
import ssl
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from penstock.base import ConfigError, PenstockError

_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d{1,5})?")
_LEFT = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
_ANSWERS = ["x-request-id", "retry-after", "x-should-retry", *_LEFT]
_log = logging.getLogger(__name__)


class Certificate:
    """What a server proves its name with. Connections made after ``reload`` see what the files hold then.

    Args:
        key: None if the private key is in the same file.

    Raises:
        ConfigError: (tls_unusable) they cannot be read or do not belong together.
    """

    def __init__(self, path: Path, key: Path | None = None) -> None:
        self.path, self._key = path, key
        self.context = self._loaded()

    def reload(self) -> None:
        """All or nothing. Raises ConfigError, as the constructor; what was loaded before is still good."""
        self._loaded()
        self.context.load_cert_chain(self.path, self._key, _no_password)

    def reload_or_log(self) -> None:
        try:
            self.reload()
        except PenstockError as error:
            _log.error("the certificate was not reloaded, the one from before stays: %s", error)

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.path, self._key, _no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            raise ConfigError(
                "tls_unusable",
                f"The certificate {self.path} cannot be used",
                why=why[:200],
                fix="name a PEM file of the certificates, and with --tls-key the private key of the first",
            ) from None
        return context


def _no_password() -> str:
    """Rather than have OpenSSL ask a terminal."""
    raise ValueError("the private key has a password")


def origins_of(text: str) -> tuple[str, ...]:
    """Exact origins (RFC 6454), with commas between.

    Raises:
        ConfigError: (invalid_origin) one is none, such as a pattern or a URL with a path.
    """
    found = tuple(part.strip().lower() for part in text.split(","))
    for origin in found:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                "invalid_origin",
                f"{origin!r} is no origin of web pages",
                why="it must be scheme, host and port as browsers send them, and no pattern",
                fix="write it like https://chat.example or http://localhost:3000",
            )
    return found


def shared_with(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Lets scripts of these origins read answers (Fetch Standard, CORS protocol). They send a key as anybody does:
    browsers are never told to send what they keep for this server by themselves."""
    if not origins:
        return app
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=methods, allow_headers=["*"], expose_headers=_ANSWERS
    )
