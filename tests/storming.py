"""A worker that fires a storm of timers, and measures itself: run in a process of its own."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import MutableSequence
from typing import Any

from sqlalchemy import make_url

from aion_timers import AsyncDispatcher, Dispatcher
from tests.conftest import open_engine

FIRED, PEAK_KIB = 0, 1


def fire(url: str, counts: MutableSequence[int]) -> None:
    """Fire until it is killed; count the handlers, and how much memory was needed so far."""
    engine: Any = open_engine(make_url(url))

    def handle(_: Any) -> None:
        counts[FIRED] += 1
        counts[PEAK_KIB] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def handle_async(delivery: Any) -> None:
        handle(delivery)

    if hasattr(engine, "sync_engine"):
        asyncio.run(AsyncDispatcher(engine, {"storm-*": handle_async}).run())
    else:
        Dispatcher(engine, {"storm-*": handle}).run()
