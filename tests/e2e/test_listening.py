"""Who listens: a server's processes have the sockets that were asked for, and no other, and each answers for itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from commands import penstock
from penstock.serving import server as serving
from servers import PROMPT, start

LISTENS, ACCEPTS = "0A", 0x10000
"""The state of a TCP socket (proc_net_tcp), and the flag of a Unix socket (__SO_ACCEPTCON)."""


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield from family(child)


def inodes(pid: int) -> set[str]:
    """Of all sockets that a process and those below it have open."""
    found = set()
    for each in family(pid):
        links = [os.readlink(link) for link in Path(f"/proc/{each}/fd").iterdir() if link.is_symlink()]
        found |= {inode[1] for link in links if (inode := re.fullmatch(r"socket:\[(\d+)\]", link))}
    return found


def rows(pid: int, table: str) -> list[list[str]]:
    return [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]


def listening(pid: int) -> set[str]:
    """Where: "address:port", or "unix:" and its path. A UDP socket that has a port takes what anybody sends."""
    own, found = inodes(pid), set[str]()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for row in rows(pid, table):
            if row[9] in own and (row[3] == LISTENS or table.startswith("udp")):
                host, port = row[1].split(":")
                words = struct.pack(f"={len(host) // 8}I", *(int(host[i : i + 8], 16) for i in range(0, len(host), 8)))
                name = socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)
                found.add(f"{name}:{int(port, 16)}")
    for row in rows(pid, "unix"):
        if row[6] in own and int(row[3], 16) & ACCEPTS:
            found.add(f"unix:{' '.join(row[7:])}")
    return found


@pytest.mark.slow
def test_a_server_listens_where_it_was_told_and_nowhere_else(tmp_path: Path) -> None:
    """Its engines are spoken to over sockets that have been taken out of the file system, and take nobody else."""
    made = penstock("keys", "add", tmp_path / "keys.jsonl", "--role", "admin")
    key, options = made.stdout.decode().strip(), ("penstock-nano", "--admin-port", "0", "--tokenizer-workers", "1")
    folders = ("--keys", str(tmp_path / "keys.jsonl"), "--store", str(tmp_path / "store"))
    server = start(Path("penstock-tiny"), *options, *folders)
    try:
        for model in ("penstock-tiny", "penstock-nano"):
            for text, status in ((PROMPT, 200), (PROMPT * 20_000, 400)):  # the latter is tokenized, and does not fit
                body = {"model": model, "prompt": text, "max_tokens": 3}
                answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, headers={"x-api-key": key})
                assert answer.status_code == status, answer.text
        assert len([*family(server.process.pid)]) >= 4, "the server, two engines, and what tokenizes long texts"
        found = listening(server.process.pid)
        assert server.url in {f"http://{where}" for where in found}
        assert len(found) == 2 and all(where.startswith("127.0.0.1:") for where in found), found
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_every_kind_of_socket_is_seen(tmp_path: Path) -> None:
    """Those of this process: what the other test looks for is found where it is."""
    before = listening(os.getpid())
    with (
        socket.create_server(("127.0.0.1", 0)) as four,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        datagrams.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "u"))
        unix.listen()
        found = listening(os.getpid()) - before
        expected = {f"127.0.0.1:{each.getsockname()[1]}" for each in (four, datagrams)}
        assert found == expected | {f"::1:{six.getsockname()[1]}", f"unix:{tmp_path / 'u'}"}


def test_administration_may_have_the_port_number_of_the_other_address() -> None:
    """One socket at all addresses stands for two that differ in nothing but the address."""

    async def ask(config: uvicorn.Config, bound: socket.socket) -> list[str]:
        server = uvicorn.Server(config)
        serves = asyncio.create_task(server.serve(sockets=[bound]))
        async with httpx.AsyncClient(timeout=60) as client:
            port = bound.getsockname()[1]
            said = [(await client.get(f"http://127.0.0.{host}:{port}/")).text for host in (1, 2)]
        server.should_exit = True
        await serves
        return said

    with serving.listen("0.0.0.0", 0) as bound:
        everybody, administrators = PlainTextResponse("everybody"), PlainTextResponse("administrators")
        app = serving._by_address(everybody, ("127.0.0.1", bound.getsockname()[1]), administrators)
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        assert asyncio.run(ask(config, bound)) == ["administrators", "everybody"]
