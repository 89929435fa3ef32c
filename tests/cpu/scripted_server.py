"""A server of OpenAI's API that answers as a script says, in the event loop of the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Script:
    """One answer.

    Attributes:
        first, gap: seconds before the first event and between events.
        tokens: events with text; None for as many as are asked for.
        usage: completion tokens it claims; None to claim nothing, -1 for the truth.
        status: of a refusal.
        cut: break the connection after so many events.
        last: what stands in place of ``[DONE]``.
    """

    first: float = 0.0
    gap: float = 0.0
    tokens: int | None = None
    usage: int | None = -1
    status: int = 200
    cut: int | None = None
    last: str = "[DONE]"
    cached: int = 0


@dataclass
class Scripted:
    """``seen``: bodies, in order. ``alone``: one request at a time, the others wait. ``models``: id -> context."""

    script: Callable[[int, dict[str, Any]], Script]
    alone: bool = False
    models: dict[str, int] = field(default_factory=lambda: {"scripted": 500})
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head.split("\r\n"))}
                body = await reader.readexactly(int(headers["content-length"]))
                self.keys.append(headers.get("authorization", ""))
                if head.startswith("GET"):
                    listed = [{"id": name, "max_model_len": longest} for name, longest in self.models.items()]
                    await _plain(writer, 200, {"data": listed})
                    continue
                asked = json.loads(body)
                self.seen.append(asked)
                async with self._gate if self.alone else asyncio.Semaphore():
                    await self._answer(writer, asked, self.script(len(self.seen) - 1, asked))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, asked: dict[str, Any], script: Script) -> None:
        if script.status != 200:
            fault = {"error": {"message": "no room", "type": "x", "code": "queue full"}}
            return await _plain(writer, script.status, fault)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(script.first)
        count = asked["max_tokens"] if script.tokens is None else script.tokens
        for i in range(count):
            if i == script.cut:
                writer.transport.abort()
                raise ConnectionError
            text = {"delta": {"content": "w "}} if "messages" in asked else {"text": "w "}
            _chunk(writer, json.dumps({"choices": [text | {"finish_reason": "length" if i == count - 1 else None}]}))
            await asyncio.sleep(script.gap)
        if script.usage is not None:
            prompt = asked.get("prompt") or " ".join(m["content"] for m in asked["messages"])
            tokens = len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split()) + 3  # two a word, three more
            usage = {
                "prompt_tokens": tokens,
                "completion_tokens": count if script.usage < 0 else script.usage,
                "prompt_tokens_details": {"cached_tokens": script.cached},
            }
            _chunk(writer, json.dumps({"choices": [], "usage": usage}))
        _chunk(writer, script.last)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Scripted]:
        self._gate = asyncio.Semaphore()
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            if hasattr(server, "close_clients"):
                server.close_clients()
            await asyncio.sleep(0)


def _chunk(writer: asyncio.StreamWriter, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%b\r\n" % (len(event), event))


async def _plain(writer: asyncio.StreamWriter, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
    await writer.drain()
