"""Workers that fire a storm of timers, or have a wrong clock: run in processes of their own."""

from __future__ import annotations

import asyncio
import resource
import sys
import threading
import time
from collections.abc import MutableSequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import make_url, text

from aion_timers import AsyncDispatcher, Dispatcher
from tests.conftest import open_engine
from tests.dispatching import Dispatchers, Fired

WARMED_UP, FIRED, PEAK_KIB = COUNTS = range(3)
CLOCKS = {
    "sqlite": "strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')",
    "postgresql": """to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US+00:00')""",
}
"""The database's own clock, in SQL, as a text."""


def fire(url: str, counts: MutableSequence[int], fired: MutableSequence[int]) -> None:
    """Fire until it is killed; count how often each of the storm's timers came, and note the peak of the memory."""
    engine: Any = open_engine(make_url(url))

    def note(what: int) -> None:
        counts[PEAK_KIB] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts[what] += 1

    def warm_up(_: Any) -> None:
        note(WARMED_UP)

    def handle(delivery: Any) -> None:
        fired[int(delivery.timer.timer_id.value.removeprefix("storm-"))] += 1
        note(FIRED)

    async def warm_up_async(delivery: Any) -> None:
        warm_up(delivery)

    async def handle_async(delivery: Any) -> None:
        handle(delivery)

    if hasattr(engine, "sync_engine"):
        asyncio.run(AsyncDispatcher(engine, {"warm-*": warm_up_async, "storm-*": handle_async}).run())
    else:
        Dispatcher(engine, {"warm-*": warm_up, "storm-*": handle}).run()


def _falsify_clock(off_by: timedelta) -> None:
    """Make the clock of this process wrong, as far as Python looks at it."""

    class SameKind(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, datetime)

    class WrongDatetime(datetime, metaclass=SameKind):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + off_by

    real = time.time
    time.time = lambda: real() + off_by.total_seconds()
    for name, module in list(sys.modules.items()):
        if name.startswith("aion_timers") and getattr(module, "datetime", None) is datetime:
            module.datetime = WrongDatetime  # type: ignore[attr-defined] # it was found there


def fire_by_clock(backend: str, url: str, who: str, off_by: timedelta) -> None:
    """Fire one's own timers, and shared ones, until it is killed; write who fired what, and when by the database.

    The clock of a file is the machine's. A machine whose clock is wrong is a dispatcher that is told that time.
    """
    parsed = make_url(url)
    clock = CLOCKS[parsed.get_backend_name()]
    options: dict[str, Any] = {"retry": lambda _, __: timedelta(milliseconds=50)}
    if parsed.get_backend_name() == "sqlite":
        options["clock"] = lambda: datetime.now(UTC) + off_by
    elif off_by:
        _falsify_clock(off_by)

    def handle(delivery: Fired) -> None:
        delivery.sleep(0.02)
        with delivery.transaction() as session:
            insert = text(f"INSERT INTO fired SELECT CAST(:name AS text), CAST(:due AS text), {clock}, :attempt, :who")
            row = {"name": delivery.name, "due": delivery.timer.fire_at.isoformat()}
            session.execute(insert, {**row, "attempt": delivery.attempt, "who": who})
            if delivery.name.endswith("flaky") and delivery.attempt == 1:
                raise ConnectionError("at the first attempt")

    with Dispatchers(backend, parsed).running({"shared-*": handle, f"{who}-*": handle}, concurrency=2, **options):
        threading.Event().wait()
