"""A store of files and batches, in this process: what is in its folder, and what its disk does."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.base import OverLimit, Unavailable
from penstock.serving.batch_table import Batch
from penstock.serving.database import Once, Part
from penstock.serving.errors import HTTPError
from penstock.serving.files import keep, write
from penstock.serving.limits import MAX_UNFINISHED_BATCHES
from penstock.serving.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def batch(store: Store, model: str = "") -> Batch:
    return Batch(
        id=store.new_id("batch"),
        tenant="",
        model=model,
        endpoint="/v1/completions",
        input_file_id="",
        completion_window="24h",
        created_at=0,
        expires_at=1,
    )


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    other, left = tmp_path / "files" / "thesis.txt", tmp_path / "files" / f"file-{'0' * 32}"
    other.touch()
    left.touch()
    Store(tmp_path).close()
    assert other.exists() and not left.exists()


def test_a_commit_that_fails_leaves_no_transaction_open(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError), store.database.transaction() as db:
        db.execute("create table parent (id primary key)")
        db.execute("create table child (id references parent deferrable initially deferred)")
        db.execute("insert into child values (1)")  # what is wrong with it is seen at the commit
    with store.database.transaction() as db:
        assert db.execute("select name from sqlite_master where name = 'child'").fetchall() == []


def test_a_tenant_s_unfinished_batches_have_a_bound(store: Store) -> None:
    begun = [store.batches.begin(batch(store)) for _ in range(MAX_UNFINISHED_BATCHES)]
    once = Once("", "key", "batch")
    with pytest.raises(OverLimit, match="too_many_batches"):
        store.batches.begin(batch(store), once)
    store.batches.begin(replace(batch(store), tenant="other"))
    store.batches.change(begun[7], lambda batch: batch.moved("cancelled"))
    made = store.batches.begin(batch(store), once)
    assert store.batches.begin(batch(store), once) == made  # sent again it is no other


def test_a_file_is_on_the_disk_before_it_is_known(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its name: the lines that a batch's output was made of are deleted next."""
    synced, fsync = dict[int, int](), os.fsync

    def noted(opened: int) -> None:
        synced[os.fstat(opened).st_ino] = os.fstat(opened).st_size
        fsync(opened)

    monkeypatch.setattr(os, "fsync", noted)
    file = write(store, "", "x_output.jsonl", "batch_output", [b"a" * 5000, b"b" * 5000])
    assert synced[store.path(file.id).stat().st_ino] == 10_000 and store.path(file.id).parent.stat().st_ino in synced


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Any file of this process may have a mebibyte. (Python ignores SIGXFSZ.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_not_filled_by_what_did_not_fit(store: Store, small_disk: None) -> None:
    folder = store.folder / "files"
    with pytest.raises(Unavailable, match="store_unwritable"):
        keep(store, "", "large", "batch", [bytes(700_000)] * 2)
    assert list(folder.iterdir()) == []
    with pytest.raises(Unavailable, match="store_unwritable"):
        while True:
            store.batches.begin(batch(store, "x" * 100_000))
    store.database._db.execute("pragma wal_checkpoint(truncate)")
    assert keep(store, "", "small", "batch", [b"{}"]).bytes == 2
    assert len(list(folder.iterdir())) == 1


def test_a_page_is_all_that_is_read(store: Store) -> None:
    """Of files that came in the same second, and among those of others."""
    own = [keep(store, "own", str(i), "batch" if i % 2 else "batch_output", [b"{}"]).id for i in range(7)]
    other = [keep(store, "other", "", "batch", []).id for _ in range(3)]

    def ids(*part: Any, purpose: str | None = None) -> tuple[list[str], bool]:
        found, more = store.files("own", Part(*part), purpose)
        return [file.id for file in found], more

    assert ids(3) == (own[:3:-1], True)
    assert ids(3, own[4]) == ([own[3], own[2], own[1]], True)
    assert ids(3, own[1]) == ([own[0]], False)
    assert ids(3, own[2], True) == ([own[3], own[4], own[5]], True)
    assert ids(9, own[2], True, purpose="batch") == ([own[3], own[5]], False)
    assert ids(9, own[0]) == ([], False)
    with pytest.raises(HTTPError, match="after"):
        ids(3, other[0])
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    for i in range(3000):
        store.add(replace(store.file("own", own[0]), id=f"file-{i:032x}"))
    store.database._db.set_progress_handler(count, 100)
    assert len(ids(3)[0]) == 3
    assert steps < 10  # hundreds of SQLite's instructions, however many files there are


def test_what_is_sent_again_is_not_made_again(store: Store) -> None:
    first = keep(store, "a", "in", "batch", [b"{}"], "key")
    assert keep(store, "a", "in", "batch", [b"{}"], "key") == first
    assert len(list((store.folder / "files").iterdir())) == 1
    for tenant, key in (("a", "other"), ("a", None), ("b", "key")):
        assert keep(store, tenant, "in", "batch", [b"{}"], key).id != first.id
    for name, content in (("in", b"[]"), ("out", b"{}")):
        with pytest.raises(HTTPError, match="idempotency_key_reused"):
            keep(store, "a", name, "batch", [content], "key")
    once = Once("", "key", "batch 1")
    assert store.batches.begin(one := batch(store), once) == store.batches.begin(batch(store), once) == one.id
    with pytest.raises(HTTPError, match="idempotency_key_reused"):
        keep(store, "", "in", "batch", [b"{}"], "key")
    store.delete("a", first.id)
    assert keep(store, "a", "in", "batch", [b"{}"], "key").id != first.id
    with store.database.transaction() as db:
        db.execute("update once set created_at = 0")
    assert keep(store, "a", "in", "batch", [b"[]"], "key").id != first.id  # a day is over


def test_what_is_there_already_needs_no_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent again with its key or without: its bytes are stored once, and counted once."""
    monkeypatch.setattr("penstock.serving.store.MAX_STORED_BYTES", 10)
    first = keep(store, "a", "in", "batch", [b"12345678"], "key")
    assert keep(store, "a", "in", "batch", [b"12345678"], "key") == first
    again = keep(store, "a", "other", "batch", [b"12345678"])
    assert again.id != first.id and store.path(first.id).samefile(store.path(again.id))
    with pytest.raises(HTTPError, match=r"has 3 bytes, 8 are stored.*storage_full"):
        keep(store, "a", "in", "batch", [b"abc"])
    keep(store, "a", "in", "batch", [b"ab"])
    assert store.path(keep(store, "b", "in", "batch", [b"12345678"]).id).stat().st_nlink == 1, "of another tenant"
    store.delete("a", first.id)
    assert store.path(again.id).read_bytes() == b"12345678"
    assert len(list((store.folder / "files").iterdir())) == 3, "and nothing that was refused"
