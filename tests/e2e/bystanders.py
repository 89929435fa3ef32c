"""Clients who behave, while others do not: ``python bystanders.py URL STREAMS`` asks until its input ends.

A process of its own, so that the attacker's work is not taken for the server's. Prints JSON: the answers that each of
the streams was given, how often it was answered, what failed, and the seconds between tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import pairwise
from typing import Any

from penstock.bench.load.http import client_of
from penstock.bench.load.openai import ask

TOKENS = 100


async def stand_by(url: str, streams: int) -> dict[str, Any]:
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    texts: list[list[str]] = [[] for _ in range(streams)]
    gaps: list[float] = []
    errors: list[str] = []
    answers = 0

    async def one(number: int) -> None:
        nonlocal answers
        body = {"prompt": f"Chapter {number}. Once", "max_tokens": TOKENS, "temperature": 1.0, "seed": number}
        client = client_of(url)
        while not ended.done():
            encoded = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
            answer = await ask(client, "/completions", encoded, 120)
            answers += 1
            gaps.extend(after - before for before, after in pairwise(answer.times))
            if answer.text not in texts[number]:
                texts[number].append(answer.text)
            if answer.error:
                errors.append(f"{answer.error} {answer.message}")
        await client.close()

    await asyncio.gather(*(one(number) for number in range(streams)))
    return {"texts": texts, "answers": answers, "errors": errors, "gaps": sorted(gaps)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(stand_by(sys.argv[1], int(sys.argv[2])))))
