"""Batches in this process, and what may happen to their files, their clock and their engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import AsyncLLM
from penstock.base import EngineError, Unavailable
from penstock.fleet import Admission
from penstock.runtime.service import LocalService
from penstock.serving import batch_run, batches, build_app
from penstock.serving.batch_run import AT_ONCE
from penstock.serving.context import Context
from penstock.serving.gate import Gate
from penstock.serving.keys import change_keys, new_key
from penstock.serving.limits import INLINE_BYTES
from penstock.serving.models import Models, Served
from penstock.spec import EngineConfig

COMPLETIONS = "/v1/completions"
Body = dict[str, Any]


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(stories), dtype="float32", num_threads=1))
    yield llm
    llm.close()


class Batching:
    """A server's application over a store of its own."""

    def __init__(self, client: httpx.AsyncClient, context: Context) -> None:
        self.client, self.context = client, context

    async def upload(self, lines: list[Body], url: str = COMPLETIONS, **more: str) -> str:
        named = ({"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(lines))
        data = b"".join(json.dumps(line).encode() + b"\n" for line in named)
        answer = await self.client.post("/v1/files", data={"purpose": "batch"} | more, files={"file": ("x", data)})
        return str(answer.json()["id"])

    async def begin(self, file: str, url: str = COMPLETIONS) -> str:
        asked = {"input_file_id": file, "endpoint": url, "completion_window": "24h"}
        return str((await self.client.post("/v1/batches", json=asked)).json()["id"])

    async def until(self, id: str, *states: str) -> Body:
        async with asyncio.timeout(100):
            while (batch := (await self.client.get(f"/v1/batches/{id}")).json())["status"] not in states:
                await asyncio.sleep(0.01)
        return dict(batch)

    async def output(self, batch: Body) -> list[Body]:
        answer = await self.client.get(f"/v1/files/{batch['output_file_id']}/content")
        return [json.loads(line) for line in answer.text.splitlines()]


def over(
    llm: AsyncLLM | Models, folder: Path, work: Callable[[Batching], Awaitable[None]], gate: Gate | None = None
) -> None:
    async def run() -> None:
        app, context = build_app(llm, folder, gate=gate)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            try:
                await work(Batching(client, context))
            finally:
                await context.batches.close()

    asyncio.run(run())


def test_a_file_whose_bytes_are_gone_holds_up_nobody(llm: AsyncLLM, tmp_path: Path) -> None:
    async def work(batching: Batching) -> None:
        lost, kept = [await batching.upload([{"prompt": "A", "max_tokens": 1}]) for _ in range(2)]
        (tmp_path / "files" / lost).unlink()
        ids = [await batching.begin(file) for file in (lost, kept)]
        assert (await batching.client.get(f"/v1/files/{lost}/content")).status_code == 404
        failed = await batching.until(ids[0], "failed")
        assert [error["code"] for error in failed["errors"]["data"]] == ["file_not_found"]
        await batching.until(ids[1], "completed")

    over(llm, tmp_path, work)


def test_a_clock_that_is_set_forward_expires_nothing(
    llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(batching: Batching) -> None:
        line = {"prompt": "A", "max_tokens": 200, "ignore_eos": True}
        id = await batching.begin(await batching.upload([line] * 200))
        await batching.until(id, "in_progress")
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 2 * 86_400)
        batch = await batching.until(id, "completed", "expired")
        assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 200

    over(llm, tmp_path, work)


def test_a_long_answer_is_written_aside(llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread: streams go on meanwhile. And it is the same again."""
    threads, told = [], batch_run.told

    def noted(value: object) -> list[bytes]:
        threads.append(threading.current_thread())
        return told(value)

    monkeypatch.setattr(batch_run, "told", noted)

    async def work(batching: Batching) -> None:
        line = {"prompt": "A", "n": 8, "logprobs": 5, "max_tokens": 60, "ignore_eos": True, "temperature": 1.0}
        outputs = []
        for _ in range(2):
            batch = await batching.until(await batching.begin(await batching.upload([line])), "completed")
            [made] = await batching.output(batch)
            body = made["response"]["body"]
            assert body["created"] == batch["created_at"] and body["id"] == f"cmpl-{made['response']['request_id']}"
            outputs.append(body | {"created": 0})
        assert outputs[0] == outputs[1] and len(json.dumps(body)) > INLINE_BYTES
        assert len(threads) == 2 and threading.current_thread() not in threads

    over(llm, tmp_path, work)


def test_lines_wait_for_an_engine_that_is_dead(llm: AsyncLLM, tmp_path: Path) -> None:
    service = llm.engine.service
    assert isinstance(service, LocalService)

    async def work(batching: Batching) -> None:
        service._fault = EngineError("engine_dead", "The engine stopped")
        id = await batching.begin(await batching.upload([{"prompt": "A", "max_tokens": 1}] * 3))
        await batching.until(id, "in_progress")
        await asyncio.sleep(0.6)
        service._fault = None
        batch = await batching.until(id, "completed")
        assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}

    over(llm, tmp_path, work)


def test_a_batch_whose_first_model_is_gone_goes_on(llm: AsyncLLM, tmp_path: Path) -> None:
    """The server's first when it came: it was made by a server of two models, and the next one has only the other."""
    first = Models.of(llm)
    gone = first._names["gone"] = Served(name="gone", config=llm.engine.config)
    first.all = {"gone": gone, **first.all}
    line: Body = {"prompt": "A", "max_tokens": 1, "model": "stories260k"}
    ids: list[str] = []

    async def begun(batching: Batching) -> None:
        await batching.context.batches.store()
        await batching.context.batches.stop()
        for lines in ([line, line | {"model": "gone"}, {"prompt": "A", "max_tokens": 1}], [line], [line]):
            ids.append(await batching.begin(await batching.upload(lines)))
            assert (await batching.client.get(f"/v1/batches/{ids[-1]}")).json()["model"] == "gone"

    async def ended(batching: Batching) -> None:
        store = await batching.context.batches.store()
        store.batches.change(ids[1], lambda batch: replace(batch, expires_at=1))
        await batching.client.post(f"/v1/batches/{ids[2]}/cancel")
        batch = await batching.until(ids[0], "completed")
        assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
        errors = (await batching.client.get(f"/v1/files/{batch['error_file_id']}/content")).text.splitlines()
        assert [json.loads(error)["response"]["status_code"] for error in errors] == [404, 404]
        await batching.until(ids[1], "expired")
        cancelled = await batching.until(ids[2], "cancelled")
        assert (await batching.client.delete(f"/v1/files/{cancelled['input_file_id']}")).status_code == 200

    over(first, tmp_path, begun)
    over(llm, tmp_path, ended)


def test_what_has_expired_goes_unless_a_batch_reads_it(
    llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SWEEP_SECONDS", 0.05)
    monkeypatch.setattr(batch_run, "LOOK_SECONDS", 0.05)
    line = {"prompt": "A", "max_tokens": 200, "ignore_eos": True}

    async def work(batching: Batching) -> None:
        client, store = batching.client, await batching.context.batches.store()
        stay = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}

        async def gone(id: str) -> None:
            async with asyncio.timeout(60):
                while (await client.get(f"/v1/files/{id}")).status_code == 200:
                    await asyncio.sleep(0.01)
            assert not store.path(id).exists() and (await client.get(f"/v1/files/{kept}")).status_code == 200

        kept = await batching.upload([line], **stay)
        idle, read, other = [await batching.upload([line] * 200 + [{"prompt": str(i)}], **stay) for i in range(3)]

        def expire(*ids: str) -> None:
            with store.database.transaction() as db:
                db.executemany("update expiry set expires_at = 1 where id = ?", [(id,) for id in ids])

        expire(idle)
        await gone(idle)
        id = await batching.begin(read)
        await batching.until(id, "in_progress")
        expire(read, other)
        await gone(other)
        assert (await client.get(f"/v1/batches/{id}")).json()["status"] == "in_progress"
        assert store.path(read).exists()
        await client.post(f"/v1/batches/{id}/cancel")
        await batching.until(id, "cancelled")
        await gone(read)
        assert store.database.all("select id from expiry", ()) == [{"id": kept}]

    over(llm, tmp_path, work)


def test_lines_for_other_models_do_not_wait(llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lines than run at a time name a model that cannot be had; those behind them are answered."""
    use, models, tries = Context.use, Models.of(llm), 0
    models._names["broken"] = Served(name="broken", config=llm.engine.config)

    async def or_fail(context: Context, model: str | None, *rest: Any) -> Context:
        nonlocal tries
        if model == "broken" and tries < 1:
            tries += 1
            raise Unavailable("model_not_loaded", "The model could not be loaded", retry_after=2.0)
        return await use(context, "stories260k", *rest)

    async def work(batching: Batching) -> None:
        line: Body = {"prompt": "A", "max_tokens": 1}
        absent = AT_ONCE * llm.engine.config.max_num_seqs + 10
        id = await batching.begin(await batching.upload([line | {"model": "broken"}] * absent + [line] * 5))
        async with asyncio.timeout(30):
            while (held := (await batching.client.get(f"/v1/batches/{id}")).json())["request_counts"]["completed"] < 5:
                await asyncio.sleep(0.01)
        assert held["status"] == "in_progress"
        assert held["request_counts"] == {"total": absent + 5, "completed": 5, "failed": 0} and tries == 1
        await batching.until(id, "completed")

    monkeypatch.setattr(Context, "use", or_fail)
    over(models, tmp_path, work)


def test_lines_that_wait_for_a_model_hold_no_place(
    llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More lines than run at a time name a model that is being loaded; those behind them are answered meanwhile."""
    use, models, there = Context.use, Models.of(llm), asyncio.Event()
    models._names["slow"] = Served(name="slow", config=llm.engine.config)
    window = AT_ONCE * llm.engine.config.max_num_seqs
    waiting = 0

    async def or_wait(context: Context, model: str | None, *rest: Any) -> Context:
        nonlocal waiting
        if model == "slow":
            waiting += 1
            await there.wait()
        return await use(context, "stories260k", *rest)

    async def work(batching: Batching) -> None:
        line: Body = {"prompt": "A", "max_tokens": 1}
        slow, quick = 2 * window + 10, window + 5
        id = await batching.begin(await batching.upload([line | {"model": "slow"}] * slow + [line] * quick))
        async with asyncio.timeout(60):
            while (await batching.client.get(f"/v1/batches/{id}")).json()["request_counts"]["completed"] < quick:
                await asyncio.sleep(0.01)
        assert waiting == window, "so many wait, and the others come again"
        there.set()
        batch = await batching.until(id, "completed")
        assert batch["request_counts"] == {"total": slow + quick, "completed": slow + quick, "failed": 0}

    monkeypatch.setattr(Context, "use", or_wait)
    over(models, tmp_path, work)


def test_who_waits_goes_before_lines_that_hold_every_slot(stories: Path, tmp_path: Path) -> None:
    """By steps: those between its coming and its end. The lines that it interrupts are what they would have been."""
    llm = AsyncLLM(EngineConfig(model=str(stories), dtype="float32", num_threads=1, max_num_seqs=2))
    line = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "temperature": 0}

    async def work(batching: Batching) -> None:
        id = await batching.begin(await batching.upload([line] * 6))
        while (before := llm.engine.service.status()).running < 2 or before.waiting < 2:
            await asyncio.sleep(0.001)
        asked = {"prompt": "The dog", "max_tokens": 5, "ignore_eos": True}
        assert (await batching.client.post(COMPLETIONS, json=asked)).status_code == 200
        after = llm.engine.service.status()
        assert after.counters.steps - before.counters.steps < 400, "less than the rest of one line takes"
        batch = await batching.until(id, "completed")
        texts = {each["response"]["body"]["choices"][0]["text"] for each in await batching.output(batch)}
        assert batch["request_counts"]["completed"] == 6 and len(texts) == 1

    over(llm, tmp_path, work)
    llm.close()


def test_a_long_batch_gives_way_to_another_tenants(
    llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But to none of its own tenant's; and what it has answered is not computed again."""
    monkeypatch.setattr(batch_run, "TURN_SECONDS", 0.2)
    monkeypatch.setattr(batch_run, "LOOK_SECONDS", 0.05)
    made = [new_key([], tenant=tenant, role="inference") for tenant in ("many", "one")]
    change_keys(tmp_path / "keys", lambda _: [record for _, record in made])
    line = {"prompt": "A", "max_tokens": 200, "ignore_eos": True}

    async def work(batching: Batching) -> None:
        ids = []
        for place, count in ((0, 300), (0, 1), (1, 3)):
            batching.client.headers["x-api-key"] = made[place][0]
            ids.append(await batching.begin(await batching.upload([line] * count)))
        await batching.until(ids[2], "completed")
        batching.client.headers["x-api-key"] = made[0][0]
        long = (await batching.client.get(f"/v1/batches/{ids[0]}")).json()
        assert long["status"] == "in_progress" and 0 < long["request_counts"]["completed"] < 300
        long = await batching.until(ids[0], "completed")
        assert long["request_counts"] == {"total": 300, "completed": 300, "failed": 0}
        assert long["usage"]["output_tokens"] == 300 * 200
        await batching.until(ids[1], "completed")
        assert llm.engine.service.status().counters.generated_tokens - before == 304 * 200

    before = llm.engine.service.status().counters.generated_tokens
    over(llm, tmp_path / "store", work, Gate(Admission(50_000), tmp_path / "keys"))


def test_what_is_over_ends_while_others_have_their_turn(
    llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_run, "LOOK_SECONDS", 0.05)
    line = {"prompt": "A", "max_tokens": 200, "ignore_eos": True}

    async def work(batching: Batching) -> None:
        long = await batching.begin(await batching.upload([line] * 300))
        await batching.until(long, "in_progress")
        cancelled = await batching.begin(file := await batching.upload([line] * 3))
        await batching.client.post(f"/v1/batches/{cancelled}/cancel")
        monkeypatch.setattr(batches, "DAY", 0)
        late = await batching.begin(file)
        ended = [await batching.until(late, "expired"), await batching.until(cancelled, "cancelled")]
        assert [each["request_counts"]["completed"] for each in ended] == [0, 0]
        assert (await batching.client.get(f"/v1/batches/{long}")).json()["status"] == "in_progress"

    over(llm, tmp_path, work)


def test_tenants_take_turns(llm: AsyncLLM, tmp_path: Path) -> None:
    """Whoever has many batches delays those of others by one at most."""
    made = [new_key([], tenant=tenant, role="inference") for tenant in ("many", "one")]
    change_keys(tmp_path / "keys", lambda _: [record for _, record in made])

    async def work(batching: Batching) -> None:
        line, ids = {"prompt": "A", "max_tokens": 100, "ignore_eos": True}, []
        for place in (0, 0, 0, 1):
            batching.client.headers["x-api-key"] = made[place][0]
            ids.append(await batching.begin(await batching.upload([line] * 100)))
        await batching.until(ids[3], "completed")
        batching.client.headers["x-api-key"] = made[0][0]
        states = [(await batching.client.get(f"/v1/batches/{id}")).json()["status"] for id in ids[:3]]
        assert states[0] == "completed" and states[2] == "validating"

    over(llm, tmp_path / "store", work, Gate(Admission(5000), tmp_path / "keys"))
