"""Many requests that are ready together share the event loop with everybody else."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from penstock.serving.turns import Turnstile


def test_so_many_in_a_turn_in_order_and_none_lost() -> None:
    async def run() -> tuple[list[int], list[int]]:
        turnstile, passed, by_turn = Turnstile(3), list[int](), list[int]()

        async def task(number: int) -> None:
            await turnstile.enter()
            passed.append(number)

        tasks = [asyncio.create_task(task(i)) for i in range(20)]
        await asyncio.sleep(0)
        tasks[7].cancel()
        for _ in range(40):
            by_turn.append(len(passed))
            await asyncio.sleep(0)
        await turnstile.enter()  # idle again: nobody waits
        return passed, by_turn

    passed, by_turn = asyncio.run(run())
    assert passed == [i for i in range(20) if i != 7]
    assert max(b - a for a, b in zip([0, *by_turn], by_turn, strict=False)) <= 3


def test_who_was_waited_for_goes_on_so_many_in_a_turn_too() -> None:
    async def run() -> list[int]:
        turnstile, by_turn = Turnstile(3), list[int]()
        futures = [asyncio.get_running_loop().create_future() for _ in range(20)]
        turnstile.let_in(futures)
        futures[7].cancel()
        for _ in range(40):
            by_turn.append(sum(future.done() for future in futures) - 1)
            turnstile.let_in([])  # whoever looks whether anybody can be let in makes no more turns
            turnstile.let_in([])
            await asyncio.sleep(0)
        return by_turn

    by_turn = asyncio.run(run())
    assert by_turn[0] == 0 and by_turn[-1] == 19
    assert max(b - a for a, b in pairwise(by_turn)) == 3


def test_an_idle_one_schedules_nothing() -> None:
    async def run() -> None:
        turnstile = Turnstile(2)
        for _ in range(5):
            await turnstile.enter()
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert turnstile._left == 2

    asyncio.run(run())
