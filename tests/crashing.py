"""Workers that are to be killed, and what their handlers write: run in processes of their own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Column, Integer, MetaData, Table, Text, Uuid, func, insert, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import AsyncDispatcher, Backoff, Dispatcher, TimerRepository
from tests.conftest import open_engine

LEASE = timedelta(seconds=1)
ROUNDS = 3
STEP = timedelta(milliseconds=10)
HANDLERS, TRANSACTIONS, COMMITS = STAGES = range(3)

metadata = MetaData()
EFFECTS = Table(
    "effects",
    metadata,
    Column("workflow_id", Uuid, nullable=False),
    Column("name", Text, nullable=False),
    Column("fire_at", Text, nullable=False),
    Column("seen_at", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("round", Integer, nullable=False),
)
"""What handlers have done. Nothing in it is unique: an effect that happened twice is there twice."""

ORDERS = Table("orders", metadata, Column("workflow_id", Uuid, nullable=False))
"""What the application commits together with the timers of a workflow."""

Work = Callable[[Session, Any, int], None]


def as_text(instant: datetime) -> str:
    """An instant in UTC, so that texts are in the order of instants."""
    return instant.isoformat(timespec="microseconds")


def rounds(session: Session, delivery: Any) -> int:
    """How many effects the timer has had so far."""
    timer = delivery.timer
    same = (EFFECTS.c.workflow_id == timer.workflow_id) & (EFFECTS.c.name == timer.timer_id.value)
    return session.scalars(select(func.count()).where(same)).one()


def record(session: Session, delivery: Any, before: int) -> None:
    """Write the effect, with what time it is by the database's clock.

    What was there before has been counted outside the transaction: two that fire the same round count the same.
    """
    effect = {
        "workflow_id": delivery.timer.workflow_id,
        "name": delivery.timer.timer_id.value,
        "fire_at": as_text(delivery.timer.fire_at),
        "seen_at": as_text(TimerRepository(session).now()),
        "attempt": delivery.attempt,
        "round": before,
    }
    session.execute(insert(EFFECTS), effect)


def record_and_go_on(session: Session, delivery: Any, before: int) -> None:
    """Write the effect, and schedule the same timer again, a few times."""
    record(session, delivery, before)
    timer = delivery.timer
    if before < ROUNDS - 1:
        TimerRepository(session).schedule(timer.workflow_id, timer.timer_id, timer.fire_at + STEP)


def fail_at_first(session: Session, delivery: Any, before: int) -> None:
    """Write the effect, and at the first attempt have it rolled back."""
    record(session, delivery, before)
    if delivery.attempt == 1:
        raise ConnectionError("at the first attempt")


IN_TRANSACTION: dict[str, Work] = {
    "once": record,
    "again": record_and_go_on,
    "flaky": fail_at_first,
    "moved": record,
    "gone": record,
}
PLAIN = "plain"
"""The name of timers whose handler has no transaction of the delivery's, and may run twice."""


class Stages:
    """Counts in shared memory how many handlers of this process are before, in, and at the end of a transaction."""

    def __init__(self, counts: MutableSequence[int]) -> None:
        self._counts = counts
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[Callable[[int], None]]:
        """A handler, which says what stage it has come to."""
        now = HANDLERS

        def come_to(stage: int) -> None:
            nonlocal now
            with self._lock:
                self._counts[now] -= 1
                self._counts[stage] += 1
            now = stage

        with self._lock:
            self._counts[HANDLERS] += 1
        try:
            yield come_to
        finally:
            with self._lock:
                self._counts[now] -= 1


def fire_until_killed(url: str, counts: MutableSequence[int]) -> None:
    """What a worker does."""
    logging.disable(logging.ERROR)  # failures are meant
    engine: Any = open_engine(make_url(url))
    stages = Stages(counts)
    options: dict[str, Any] = {
        "concurrency": 4,
        "lease": LEASE,
        "retry": Backoff(first=timedelta(seconds=0.05), longest=timedelta(seconds=0.2)),
    }
    if not hasattr(engine, "sync_engine"):
        Dispatcher(sessionmaker(engine), _threads(engine, stages), **options).run()
        return
    asyncio.run(AsyncDispatcher(async_sessionmaker(engine), _tasks(engine, stages), **options).run())


def _threads(engine: Any, stages: Stages) -> dict[str, Any]:
    def adapted(work: Work) -> Callable[[Any], None]:
        def handle(delivery: Any) -> None:
            with stages() as come_to:
                with Session(engine) as session:
                    before = rounds(session, delivery)
                with delivery.transaction() as session:
                    come_to(TRANSACTIONS)
                    work(session, delivery, before)
                    come_to(COMMITS)

        return handle

    def plain(delivery: Any) -> None:
        with stages(), Session(engine) as session, session.begin():
            record(session, delivery, 0)

    return {name: adapted(work) for name, work in IN_TRANSACTION.items()} | {PLAIN: plain}


def _tasks(engine: Any, stages: Stages) -> dict[str, Any]:
    def adapted(work: Work) -> Any:
        async def handle(delivery: Any) -> None:
            with stages() as come_to:
                async with AsyncSession(engine) as session:
                    before = await session.run_sync(rounds, delivery)
                async with delivery.transaction() as session:
                    come_to(TRANSACTIONS)
                    await session.run_sync(work, delivery, before)
                    come_to(COMMITS)

        return handle

    async def plain(delivery: Any) -> None:
        with stages():
            async with async_sessionmaker(engine).begin() as session:
                await session.run_sync(record, delivery, 0)

    return {name: adapted(work) for name, work in IN_TRANSACTION.items()} | {PLAIN: plain}
