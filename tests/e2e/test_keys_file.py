"""The file of keys and the commands that change it."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from commands import penstock
from penstock.base import ConfigError, NotFound
from penstock.fleet import Rates
from penstock.serving.keys import PREFIX, Key, Keyring, change_keys, fingerprint, new_key, read_keys, without


def test_a_key_is_shown_once_and_never_stored(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    done = penstock("keys", "add", file, "--tenant", "acme", "--tokens-per-minute", "500")
    secret = done.stdout.decode().strip()
    assert secret.startswith(PREFIX) and len(secret) == len(PREFIX) + 43 and b"only time" in done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret.removeprefix(PREFIX) not in file.read_text()
    (key,) = read_keys(file)
    found = Keyring([key]).find(secret)
    assert found is key and Keyring([key]).find(secret[:-1]) is None and key.sha256 == fingerprint(secret)
    for output in (penstock("keys", "list", file), penstock("keys", "list", "--json", file)):
        assert key.id.encode() in output.stdout and b"acme" in output.stdout and b"500" in output.stdout
        assert key.sha256.encode() not in output.stdout
    assert penstock("keys", "revoke", file, key.id).returncode == 0
    (closed,) = read_keys(file)
    assert closed.revoked is not None and not Keyring([closed]).tenants
    again = penstock("keys", "revoke", file, "nobody")
    assert again.returncode == 3 and b"key_not_found" in again.stderr
    assert os.listdir(tmp_path) == ["keys.jsonl"]


def test_limits_are_of_the_tenant_and_the_latest_key_has_them() -> None:
    keys: list[Key] = []
    for limits in ((10, None, 2), (None, 500, None), (0, None, 3)):
        names = ("requests_per_minute", "tokens_per_minute", "concurrency")
        keys.append(new_key(keys, tenant="a", role="inference", **dict(zip(names, limits, strict=True)))[1])
    assert keys[1].rates == Rates(requests_per_minute=10, tokens_per_minute=500, concurrency=2)
    assert Keyring(keys).rates("a") == Rates(tokens_per_minute=500, concurrency=3)
    assert Keyring(without(keys, keys[2].id)).rates("a") == keys[1].rates
    assert Keyring(keys).rates("b") == Rates() and not Keyring(keys).administered
    with pytest.raises(NotFound):
        without(keys, "nobody")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "truncated"), ("[]", "expected object"), ("{}", "missing required field id"), ("\xff", "malformed"),
        ('{"id":"a","sha256":"ab","created":"2026-01-01T00:00:00Z"}', "sha256"),
        ('{"id":"a/b","sha256":"' + "0" * 64 + '","created":"2026-01-01T00:00:00Z"}', "id"),
        ('{"id":"a","sha256":"' + "0" * 64 + '","created":"then"}', "created"),
        ('{"id":"a","sha256":"' + "0" * 64 + '","created":"2026-01-01T00:00:00Z","role":"root"}', "role"),
        ('{"id":"a","sha256":"' + "0" * 64 + '","created":"2026-01-01T00:00:00Z","concurrency":0}', ">= 1"),
        ('{"id":"a","sha256":"' + "0" * 64 + '","created":"2026-01-01T00:00:00Z","tenant":"a b"}', "tenant"),
        ('{"id":"a","sha256":"' + "0" * 64 + '","created":"2026-01-01T00:00:00Z","admin":true}', "unknown field"),
        ("[" * 100_000, ""),
    ],
)  # fmt: skip
def test_a_line_that_is_no_key_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "keys"
    change_keys(file, lambda keys: [*keys, new_key(keys, tenant="a", role="admin")[1]])
    with file.open("ab") as end:
        end.write(b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(file)
    assert caught.value.code == "keys_invalid" and caught.value.what.startswith("Line 3 of") and why in caught.value.why


def test_two_records_of_one_key_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key([], tenant="a", role="admin")[1]
    change_keys(file, lambda _: [key, key])
    with pytest.raises(ConfigError, match="its id is that of line 1"):
        read_keys(file)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    change_keys(file, lambda _: [])
    for mode in (0o640, 0o604, 0o622, 0o644):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode is {mode:04o}"):
            read_keys(file)
        with pytest.raises(ConfigError):
            change_keys(file, lambda keys: keys)
    file.chmod(0o400)
    assert read_keys(file) == []


def test_changes_at_a_time_lose_nothing_and_a_reader_sees_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    change_keys(file, lambda _: [])

    def add(number: int) -> int:
        change_keys(file, lambda keys: [*keys, new_key(keys, tenant=f"t{number}", role="inference")[1]])
        return len(read_keys(file))

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(add, range(24)))
    assert {key.tenant for key in read_keys(file)} == {f"t{number}" for number in range(24)}
    assert min(seen) >= 1 and os.listdir(tmp_path) == ["keys"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    for place in (tmp_path / "no" / "keys", Path("/proc/no-keys")):
        done = penstock("keys", "add", place)
        assert done.returncode == 3 and b"keys_not_written" in done.stderr and done.stdout == b""
    for options in (["--tenant", "a b"], ["--tenant", ""], ["--tokens-per-minute", "1" + "0" * 15]):
        done = penstock("keys", "add", tmp_path / "keys", *options)
        assert done.returncode == 3 and b"key_invalid" in done.stderr and not (tmp_path / "keys").exists()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "keys"
    link.symlink_to(tmp_path / "real" / "keys")
    change_keys(link, lambda _: [])
    change_keys(link, lambda keys: [*keys, new_key(keys, tenant="a", role="admin")[1]])
    assert link.is_symlink() and len(read_keys(tmp_path / "real" / "keys")) == 1


def test_times_are_utc(tmp_path: Path) -> None:
    record = json.loads(penstock("keys", "add", "--json", tmp_path / "keys").stdout)
    made = datetime.fromisoformat(record["created"])
    assert record["created"].endswith("Z") and abs((datetime.now(UTC) - made).total_seconds()) < 60
