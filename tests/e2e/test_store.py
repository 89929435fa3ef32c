"""A store of files and batches, in this process: what is in its folder, and what its disk does."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.base import Unavailable
from penstock.serving.batch_table import Batch
from penstock.serving.files import keep
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


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Any file of this process may have a mebibyte. (Python ignores SIGXFSZ.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_not_filled_by_what_did_not_fit(store: Store, small_disk: None) -> None:
    folder = store.database.folder / "files"
    with pytest.raises(Unavailable, match="store_unwritable"):
        keep(store, "", "large", "batch", [bytes(700_000)] * 2)
    assert list(folder.iterdir()) == []
    with pytest.raises(Unavailable, match="store_unwritable"):
        while True:
            store.batches.begin(batch(store, "x" * 100_000))
    store.database._db.execute("pragma wal_checkpoint(truncate)")
    assert keep(store, "", "small", "batch", [b"{}"]).bytes == 2
    assert len(list(folder.iterdir())) == 1
