"""A worker that fires a storm of timers, and measures itself: run in a process of its own."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import MutableSequence
from typing import Any

from sqlalchemy import make_url

from aion_timers import AsyncDispatcher, Dispatcher
from tests.conftest import open_engine

FIRED, EARLY_KIB, LATE_KIB = 0, 1, 2
WARMED_UP = 1000


def fire(url: str, counts: MutableSequence[int]) -> None:
    """Fire until it is killed; count the handlers, and how much memory was needed at first and then."""
    engine: Any = open_engine(make_url(url))

    def handle(_: Any) -> None:
        counts[FIRED] += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts[EARLY_KIB if counts[FIRED] <= WARMED_UP else LATE_KIB] = peak

    async def handle_async(delivery: Any) -> None:
        handle(delivery)

    if hasattr(engine, "sync_engine"):
        asyncio.run(AsyncDispatcher(engine, {"storm-*": handle_async}).run())
    else:
        Dispatcher(engine, {"storm-*": handle}).run()
