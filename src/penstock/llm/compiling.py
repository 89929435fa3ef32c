"""Grammars of requests, compiled beside the event loop; on threads of their own, so that nobody else waits for one."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from penstock.spec import StructuredOutputs

if TYPE_CHECKING:
    from penstock.grammar import Grammar, Grammars

_THREADS = ThreadPoolExecutor(2, "penstock-grammar")
_turns: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


async def compiled(grammars: Grammars, wanted: StructuredOutputs, tenant: str) -> Grammar:
    """One that is known at once; of others one of a tenant at a time, so that none takes both threads for itself.

    Raises as ``Grammars.compile``.
    """
    if (known := grammars.known(wanted)) is not None:
        return known
    loop = asyncio.get_running_loop()
    async with _turns.setdefault((id(loop), tenant), asyncio.Lock()):
        work = loop.run_in_executor(_THREADS, grammars.compile, wanted)
        try:
            return await asyncio.shield(work)
        finally:
            await asyncio.wait({work})  # whoever gave up, the thread is at it
