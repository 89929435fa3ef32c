"""Responses and conversations in a store, in this process: against plain lists, at their limits, and on a bad disk."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base import Unavailable
from penstock.fleet import Admission
from penstock.serving.conversation_table import Conversation, ConversationTable
from penstock.serving.database import Database, Part, StoredFile
from penstock.serving.errors import HTTPError
from penstock.serving.gate import Caller, Gate, current
from penstock.serving.kept import Kept
from penstock.serving.limits import MAX_BODY_BYTES, MAX_MESSAGES, RESPONSE_DAYS
from penstock.serving.response_table import ResponseTable, Stored
from penstock.serving.room import Room, used
from penstock.serving.store import Store

TENANTS = st.sampled_from(["a", "b", "c"])
USER = {"role": "user", "content": "Weather?"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def response(id: str, size: int = 0) -> Stored:
    made: Any = {"id": f"resp_{id}", "output": [{"id": f"msg_{id}0", "role": "assistant", "content": "x" * size}]}
    return Stored(made, [USER], [{"role": "user", "content": "And?"}])


def shares(database: Database, kind: Any) -> dict[str, tuple[int, int]]:
    with database.transaction() as db:
        return {tenant: share for tenant in "abc" if (share := used(db, kind, tenant)) != (0, 0)}


# -- responses ---------------------------------------------------------------------------------------------------------


@given(steps=st.lists(st.tuples(st.sampled_from(["keep", "delete"]), TENANTS, st.integers(0, 12)), max_size=60))
def test_responses_are_as_in_a_list_whose_oldest_go(steps: list[tuple[str, str, int]]) -> None:
    least = sum(len(msgspec.json.encode(part)) for part in response("00"))
    room = Room(count=4, bytes=6 * least, count_in_all=7, bytes_in_all=10 * least)
    database = Database(None)
    table, kept = ResponseTable(database, room), list[tuple[str, str, int]]()  # tenant, id, bytes

    def total(tenant: str | None) -> tuple[int, int]:
        sizes = [size for of, _, size in kept if tenant in (None, of)]
        return len(sizes), sum(sizes)

    def forget_oldest(tenant: str) -> None:
        kept.remove(next(each for each in kept if each[0] == tenant))

    for number, (step, tenant, size) in enumerate(steps):
        if step == "keep":
            id = f"{number:02}"
            bytes = least + size * least // 2
            assert table.keep(tenant, response(id, size * least // 2)) == (bytes <= room.bytes)
            if bytes > room.bytes:
                continue
            kept.append((tenant, f"resp_{id}", bytes))
            while total(tenant)[0] > room.count or total(tenant)[1] > room.bytes:
                forget_oldest(tenant)
            while total(None)[0] > room.count_in_all:
                forget_oldest(max("abc", key=lambda each: total(each)[0]))
            while total(None)[1] > room.bytes_in_all:
                forget_oldest(max("abc", key=lambda each: total(each)[1]))
        elif own := [each for each in kept if each[0] == tenant]:
            table.delete(tenant, own[size % len(own)][1])
            kept.remove(own[size % len(own)])
        for of in "abc":
            assert shares(database, "response").get(of, (0, 0)) == total(of)
    for tenant, id, _ in kept:
        assert table.get(tenant, id).response["id"] == id
        for other in set("abc") - {tenant}:
            with pytest.raises(HTTPError, match="response_not_found"):
                table.get(other, id)
    database.close()


def test_a_response_is_as_it_was(store: Store, tmp_path: Path) -> None:
    stored = response("1")
    assert store.responses.keep("a", stored)
    store.close()
    again = Store(tmp_path)
    assert again.responses.get("a", "resp_1") == stored
    assert stored.items == [USER, *stored.given, *stored.response["output"]]
    (shown,) = again.responses.given("a", "resp_1")
    assert shown == {
        "id": "msg_1i0", "type": "message", "role": "user", "status": "completed",
        "content": [{"type": "input_text", "text": "And?"}],
    }  # fmt: skip
    assert stored.turn == [shown, *stored.response["output"]]
    assert again.responses.item("a", "resp_1", 0, "", given=True) == shown
    assert again.responses.item("a", "resp_1", 0, "", given=False) == stored.response["output"][0]
    assert again.responses.item("a", "resp_1", 1, "", given=False) is None
    again.close()


def test_a_response_lives_for_thirty_days(store: Store) -> None:
    for id in "12":
        store.responses.keep("a", response(id))
    with store.database.transaction() as db:
        db.execute(
            "update response set created_at = ? where id = 'resp_1'", (int(time.time()) - RESPONSE_DAYS * 86_400 - 9,)
        )
    store.responses.get("a", "resp_2")
    for ask in (store.responses.get, store.responses.delete):
        with pytest.raises(HTTPError, match="response_not_found"):
            ask("a", "resp_1")
    store.responses.keep("b", response("3"))
    assert shares(store.database, "response")["a"][0] == 1
    assert len(store.database.all("select id from response", ())) == 2


# -- conversations -----------------------------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("create"), TENANTS, st.integers(0, 3)),
    st.tuples(st.sampled_from(["add", "turn", "update", "delete", "drop", "page"]), TENANTS, st.integers(0, 9)),
)


@given(steps=st.lists(STEPS, max_size=40))
def test_conversations_are_as_in_a_dictionary(steps: list[tuple[str, str, int]]) -> None:
    database = Database(None)
    table = ConversationTable(database)
    model: dict[str, tuple[str, dict[str, str], list[Any]]] = {}
    for number, (step, tenant, size) in enumerate(steps):
        items = [{"role": "user", "content": f"{number}.{i}"} for i in range(size)]
        own = [id for id, (of, _, _) in model.items() if of == tenant]
        id = own[size % len(own)] if own else "conv_none"
        if step == "create":
            made = table.create(tenant, items, {"n": str(number)})
            found = table.page(tenant, made.id, Part(100, None, True)).data
            assert [item["content"][0]["text"] for item in found] == [item["content"] for item in items]
            model[made.id] = tenant, {"n": str(number)}, found
        elif not own:
            for ask in (table.get, table.delete):
                with pytest.raises(HTTPError, match="conversation_not_found"):
                    ask(tenant, id)
            assert not table.end_turn(tenant, id, items)
        elif step == "add":
            model[id][2].extend(table.add(tenant, id, items))
        elif step == "turn":
            assert table.begin_turn(tenant, id, items) == model[id][2]
            assert table.end_turn(tenant, id, items)
            model[id][2].extend(table.page(tenant, id, Part(size or 1)).data[:size][::-1])
        elif step == "update":
            assert table.update(tenant, id, {"m": str(number)}).metadata == {"m": str(number)}
            model[id] = tenant, {"m": str(number)}, model[id][2]
        elif step == "delete":
            table.delete(tenant, id)
            del model[id]
        elif step == "drop" and model[id][2]:
            gone = model[id][2].pop(size % len(model[id][2]))
            assert isinstance(table.delete_item(tenant, id, gone["id"]), Conversation)
            with pytest.raises(HTTPError, match="item_not_found"):
                table.item(tenant, id, gone["id"])
            assert table.referred(tenant, gone["id"]) is None
        check(table, model, Part(size % 4 + 1, None, number % 2 == 0))
    sizes = {tenant: [sum_of(items) for of, _, items in model.values() if of == tenant] for tenant in "abc"}
    told = shares(database, "conversation")
    assert {tenant: told.get(tenant, (0, 0)) for tenant in "abc"} == {k: (len(v), sum(v)) for k, v in sizes.items()}
    database.close()


def sum_of(items: list[Any]) -> int:
    return sum(len(msgspec.json.encode(item)) for item in items)


def check(table: ConversationTable, model: dict[str, tuple[str, dict[str, str], list[Any]]], part: Part) -> None:
    """Page after page, one way or the other; and nothing of it to others."""
    for id, (tenant, metadata, items) in model.items():
        assert table.get(tenant, id).metadata == metadata
        seen, more, page = [], True, part
        while more:
            told = table.page(tenant, id, page)
            seen += told.data
            more, page = told.has_more, Part(part.limit, told.last_id, part.ascending)
        assert seen == (items if part.ascending else items[::-1])
        for item in items[-2:]:
            assert table.item(tenant, id, item["id"]) == table.referred(tenant, item["id"]) == item
        other = "b" if tenant == "a" else "a"
        for ask in (table.get, table.delete):
            with pytest.raises(HTTPError, match="conversation_not_found"):
                ask(other, id)
        assert all(table.referred(other, item["id"]) is None for item in items[:1])


def test_an_item_keeps_its_id_unless_another_has_it(store: Store) -> None:
    table, item = store.conversations, {"role": "user", "content": "a", "id": "msg_mine"}
    id = table.create("a", [item, item, item | {"id": "no id at all"}, item | {"id": 7}], {}).id
    (second,) = table.add("a", id, [item])
    ids = [each["id"] for each in table.page("a", id, Part(9, None, True)).data]
    assert ids[0] == "msg_mine" and len(set(ids)) == 5 and all(each.startswith("msg_") for each in ids)
    assert second["id"] == ids[-1]
    assert table.create("a", [item], {}).id != id
    with pytest.raises(HTTPError, match="after"):
        table.page("a", id, Part(9, "msg_other"))


def test_a_conversation_is_bounded_as_a_request_is(store: Store) -> None:
    table = store.conversations
    id = table.create("a", [], {}).id
    for _ in range(MAX_MESSAGES // 16):
        table.add("a", id, [USER] * 16)
    for ask in (table.add, table.begin_turn):
        with pytest.raises(HTTPError, match=rf"{MAX_MESSAGES + 1} items .*conversation_full"):
            ask("a", id, [USER])
    assert len(table.begin_turn("a", id, [])) == MAX_MESSAGES
    assert table.end_turn("a", id, [USER])  # it has been computed
    large = {"role": "user", "content": "x" * (MAX_BODY_BYTES - 300)}
    id = table.create("a", [large], {}).id
    with pytest.raises(HTTPError, match="conversation_full"):
        table.add("a", id, [USER, {"role": "user", "content": "x" * 300}])
    assert len(table.page("a", id, Part(9)).data) == 1, "all of them or none"


def test_what_is_new_is_refused_where_there_is_no_room() -> None:
    database = Database(None)
    table = ConversationTable(database, Room(count=2, bytes=1000, count_in_all=3, bytes_in_all=1200))
    item = {"role": "user", "content": "x" * 700}
    first, second = (table.create("a", [], {}).id for _ in range(2))
    with pytest.raises(HTTPError, match=r"a client may have 2 .*storage_full"):
        table.create("a", [], {})
    table.add("a", first, [item])
    for ask in (table.add, table.begin_turn):
        with pytest.raises(HTTPError, match=r"a client may have 2 of 1000.*storage_full"):
            ask("a", second, [item])
    other = table.create("b", [], {}).id
    with pytest.raises(HTTPError, match=r"all clients may have 3 of 1200.*storage_full"):
        table.add("b", other, [item])
    with pytest.raises(HTTPError, match=r"all clients may have 3 .*storage_full"):
        table.create("b", [], {})
    assert table.end_turn("a", first, [item]) and len(table.page("a", first, Part(9)).data) == 2
    table.delete("a", first)
    assert shares(database, "conversation") == {"a": (1, 0), "b": (1, 0)}
    table.add("b", other, [item])


# -- the disk ----------------------------------------------------------------------------------------------------------

VERSION_1 = """
create table file (
    id text primary key, tenant text not null, filename text not null, purpose text not null, bytes integer not null,
    created_at integer not null, sha256 text not null
) strict;
create table batch (
    id text primary key, tenant text not null, model text not null, created_at integer not null, status text not null,
    body text not null
) strict;
create table line (
    batch text not null, number integer not null, custom_id text not null, start integer not null,
    length integer not null, failed integer, result blob, tokens_in integer, tokens_out integer,
    primary key (batch, number)
) strict, without rowid;
pragma user_version=1;
"""
"""As the first build made it."""


def test_a_store_of_the_first_build_opens_and_gets_the_new_tables(tmp_path: Path) -> None:
    file = StoredFile(id=f"file-{'0' * 32}", tenant="", filename="a", purpose="batch", bytes=0, created_at=1, sha256="")
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        db.executescript(VERSION_1)
        db.execute("insert into file values (?, ?, ?, ?, ?, ?, ?)", (file.id, "", "a", "batch", 0, 1, ""))
    db.close()
    for _ in range(2):
        store = Store(tmp_path)
        assert store.file("", file.id) == file
        store.responses.keep("", response("1" * 32))
        kept = store.conversations.create("", [USER], {})
        store.responses.delete("", f"resp_{'1' * 32}")
        store.close()
    assert kept.id.startswith("conv_")
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        assert db.execute("pragma user_version").fetchone() == (1,), "the first build opens it, too"
    db.close()


def test_what_a_full_disk_refuses_is_told_and_leaves_the_rest_as_it_was(store: Store) -> None:
    kept = kept_in(store)
    id = store.conversations.create("", [USER], {}).id
    before = [shares_of(store, kind) for kind in ("response", "conversation")]
    store.database._db.execute("pragma max_page_count=1")  # as small as it can be, which is what it has
    large = response("1", 1 << 20)

    async def told() -> None:
        turn = kept.turn(id)
        assert not await turn.add(large) and not await kept.keep(large)
        assert kept.turns == {}

    asyncio.run(told())
    with pytest.raises(Unavailable, match="store_unwritable"):
        store.conversations.add("", id, [{"role": "user", "content": "x" * (1 << 20)}])
    store.database._db.execute("pragma max_page_count=1000000")
    assert [shares_of(store, kind) for kind in ("response", "conversation")] == before
    assert len(store.conversations.page("", id, Part(9)).data) == 1


def shares_of(store: Store, kind: Any) -> tuple[int, int]:
    with store.database.transaction() as db:
        return used(db, kind)


def kept_in(store: Store) -> Kept:
    """As a request without a key has it."""
    current.set(Caller(Gate(Admission(1)), ""))

    async def open() -> Store:
        return store

    return Kept(open)


def test_without_a_store_responses_are_in_memory_and_conversations_refused() -> None:
    current.set(Caller(Gate(Admission(1)), ""))
    tried = 0

    async def open() -> NoReturn:
        nonlocal tried
        tried += 1
        await asyncio.sleep(0)
        raise Unavailable("store_in_use", "Files, batches and conversations are not to be had here")

    async def check() -> None:
        kept = Kept(open)
        tables = await asyncio.gather(kept.responses(), kept.responses())
        assert tables[0] is tables[1]
        assert await kept.keep(response("1"))
        assert (await kept.responses()).get("", "resp_1") == response("1")
        assert tried == 2
        with pytest.raises(Unavailable, match="store_in_use"):
            await kept.conversations()

    asyncio.run(check())


# -- turns -------------------------------------------------------------------------------------------------------------


def test_one_response_at_a_time_has_its_turn(store: Store) -> None:
    kept = kept_in(store)
    turn = kept.turn("conv_1")
    with pytest.raises(HTTPError, match="conversation_locked"):
        kept.turn("conv_1")
    kept.turn("conv_2").end()
    first = current.get()
    current.set(Caller(first.gate, "", tenant="other"))
    kept.turn("conv_1")  # of which that one knows nothing
    with pytest.raises(HTTPError, match="conversation_locked"):
        kept.check_free("conv_1")
    current.get().leave()
    kept.check_free("conv_1")
    current.set(first)
    turn.end()
    other = kept.turn("conv_1")
    turn.end()  # is over already, and ends nobody else's
    with pytest.raises(HTTPError, match="conversation_locked"):
        kept.check_free("conv_1")
    first.leave()
    kept.check_free("conv_1")
    assert other._adding is None and kept.turns == {}


def test_a_turn_lasts_until_what_it_adds_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its client is gone by then."""
    kept, writing, go = kept_in(store), threading.Event(), threading.Event()
    id = store.conversations.create("", [], {}).id
    end_turn = ConversationTable.end_turn

    def slow(*arguments: Any) -> bool:
        writing.set()
        go.wait(20)
        return end_turn(*arguments)

    monkeypatch.setattr(ConversationTable, "end_turn", slow)

    async def check() -> None:
        task = asyncio.create_task(kept.turn(id).add(response("1")))
        await asyncio.to_thread(writing.wait, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        current.get().leave()
        with pytest.raises(HTTPError, match="conversation_locked"):
            kept.turn(id)
        go.set()
        while kept.turns:
            await asyncio.sleep(0.01)
        assert len(store.conversations.begin_turn("", id, [])) == 2
        await kept.turn(id).add(response("2"))

    asyncio.run(check())
    ids = [item["id"] for item in store.conversations.begin_turn("", id, [])]
    assert ids == ["msg_1i0", "msg_10", "msg_2i0", "msg_20"]
