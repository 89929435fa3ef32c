"""API keys: a file of records, one JSON object a line, and the ring of those that open something now.

A key is ``penstock-`` and 256 random bits. It is shown once, when it is made; the file has its SHA-256, which is enough
to know a key again and useless to whoever reads the file. (No salt and no slow hash: there is nothing to guess.)
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.base import ConfigError, NotFound
from penstock.core.service import MAX_PRIORITY
from penstock.fleet import Rates

PREFIX = "penstock-"
MAX_KEY_LENGTH = 256
"""Of what a client may send as a key."""

MAX_FILE_BYTES = 64 << 20
MAX_RATE = 10**12

Role = Literal["inference", "admin"]
Limit = Annotated[int, Meta(ge=1, le=MAX_RATE)]
Tenant = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]


class Key(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One record. Rates that are absent are not limited; those of a tenant are in its latest key that is not revoked.

    Attributes:
        id: names the key in lists and logs.
        sha256: of the key, in hexadecimal.
        tenant: whose it is: rates are counted, and cached prefixes are shared, within one.
        role: "inference" may use the models; "admin" may also look at the server and drain it.
        min_priority: the lowest ``priority`` of its requests, lower being served earlier; None is 0, and for the role
            "admin" no limit.
        created, revoked: UTC, in ISO 8601.
    """

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    tenant: Tenant = "default"
    role: Role = "inference"
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrency: Limit | None = None
    min_priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    created: datetime
    revoked: datetime | None = None

    @property
    def rates(self) -> Rates:
        return Rates(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrency=self.concurrency,
        )


def fingerprint(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Keyring:
    """The keys of a file. Frozen: a file that has changed is another ring."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = tuple(keys)
        self._by_hash = {key.sha256: key for key in self.keys}
        self._rates = {key.tenant: key.rates for key in self.keys if key.revoked is None}

    def find(self, presented: str) -> Key | None:
        """The record of a key, revoked or not."""
        digest = fingerprint(presented)
        found = self._by_hash.get(digest)
        return found if found is not None and hmac.compare_digest(found.sha256, digest) else None

    def rates(self, tenant: str) -> Rates:
        return self._rates.get(tenant, Rates())

    @property
    def tenants(self) -> set[str]:
        return set(self._rates)

    @property
    def administered(self) -> bool:
        """Whether there is a key for administration."""
        return any(key.role == "admin" and key.revoked is None for key in self.keys)


def new_key(
    keys: Iterable[Key], *, tenant: str, role: Role, min_priority: int | None = None, **limits: int | None
) -> tuple[str, Key]:
    """A key and its record, to be added to ``keys``.

    Args:
        limits: requests_per_minute, tokens_per_minute, concurrency: None as the tenant has it already, 0 for no limit.

    Raises:
        ConfigError: (key_invalid) a field is out of range.
    """
    rates = Keyring(keys).rates(tenant)
    values = {name: getattr(rates, name) if value is None else value or None for name, value in limits.items()}
    values["min_priority"] = min_priority
    secret = PREFIX + secrets.token_urlsafe(32)
    now = datetime.now(UTC).replace(microsecond=0)
    record = {"id": f"key-{secrets.token_hex(4)}", "sha256": fingerprint(secret), "tenant": tenant, "role": role}
    try:
        return secret, msgspec.convert(record | values | {"created": now}, Key)
    except msgspec.ValidationError as error:
        raise ConfigError("key_invalid", "No such key can be made", why=_plain(error), fix="see --help") from None


def process_key() -> tuple[str, Key]:
    """A key for administration that is in no file. Its tenant has a name that no file can give."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, Key(id="local", sha256=fingerprint(secret), tenant="@local", role="admin", created=datetime.now(UTC))


def without(keys: Iterable[Key], id: str) -> list[Key]:
    """The records with one more of them revoked.

    Raises:
        NotFound: (key_not_found).
    """
    now, found = datetime.now(UTC).replace(microsecond=0), list(keys)
    for i, key in enumerate(found):
        if key.id == id:
            found[i] = msgspec.structs.replace(key, revoked=key.revoked or now)
            return found
    raise NotFound("key_not_found", f"There is no key {id!r}", fix="see `penstock keys list`")


# -- the file ----------------------------------------------------------------------------------------------------------


def read_keys(path: Path) -> list[Key]:
    """All records of a file, oldest first.

    Raises:
        ConfigError: (keys_unreadable) there is no such file, or it cannot be read; (keys_exposed) others than its
            owner may read or write it; (keys_invalid) a line is no record, or two have the same id or key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            data = file.read(MAX_FILE_BYTES + 1) if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError("keys_unreadable", f"{path} cannot be read", why=why, fix=_MAKE_ONE) from error
    if data is None or len(data) > MAX_FILE_BYTES:
        why = "it is not a file" if data is None else f"it has more than {MAX_FILE_BYTES} bytes"
        raise ConfigError("keys_unreadable", f"{path} cannot be read", why=why, fix=_MAKE_ONE)
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            "keys_exposed",
            f"{path} can be read or written by others",
            why=f"its mode is {stat.S_IMODE(status.st_mode):04o}",
            fix=f"chmod 600 {path}",
        )
    keys: list[Key] = []
    known: dict[str, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                key = msgspec.json.decode(line, type=Key)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise _invalid(path, number, _plain(error)) from None
            for name in (f"id {key.id}", f"key {key.sha256}"):
                if (before := known.setdefault(name, number)) != number:
                    raise _invalid(path, number, f"its {name.split()[0]} is that of line {before}")
            keys.append(key)
    return keys


_MAKE_ONE = "name a file made with `penstock keys add`"


def _invalid(path: Path, line: int, why: str) -> ConfigError:
    return ConfigError("keys_invalid", f"Line {line} of {path} is not a key", why=why, fix="mend or remove the line")


def _plain(error: Exception) -> str:
    text = str(error).replace("`", "")
    return text[:200] if text[1:2].isupper() else text[:1].lower() + text[1:200]


def change_keys(path: Path, change: Callable[[list[Key]], list[Key]]) -> None:
    """Replaces the file's records by what ``change`` makes of them; a new file if there is none.

    The file is replaced as a whole, by one of mode 0600, so that a reader never sees half of it; of two changes at a
    time the second waits.

    Raises:
        ConfigError: what ``read_keys`` and ``change`` raise; (keys_not_written).
    """
    folder = path.absolute().parent
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = change(read_keys(path) if path.exists() else [])
        _replace(path, b"".join(msgspec.json.encode(key) + b"\n" for key in keys))
        os.fsync(lock)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        os.close(lock)


def _replace(path: Path, data: bytes) -> None:
    target = path.resolve()  # a link stays one
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(draft, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


def _not_written(path: Path, error: OSError) -> ConfigError:
    why = (error.strerror or str(error)).lower()
    return ConfigError("keys_not_written", f"{path} cannot be written", why=why, fix="choose another place")
