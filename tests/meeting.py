"""Handlers that meet other transactions: what the tests of it share, and the process that one of them kills."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any
from uuid import UUID

from sqlalchemy import URL, make_url

from aion_timers import TimerEntry
from tests.conftest import open_engine
from tests.dispatching import Dispatchers, Fired, Running
from tests.store import Store

ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
PAST = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
FUTURE = datetime(9000, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
POSTGRES = ["psycopg", "psycopg_async", "asyncpg"]
FILES = ["libsql", "aiolibsql", "sqlite", "aiosqlite"]
POLICIES = ["replace", "keep", "earliest", "latest"]


def schedule(store: Store, *names: str | int, at: datetime = PAST, workflow_id: UUID = ALPHA) -> None:
    """Store timers of one workflow."""
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(workflow_id, name, at) for name in names])


def left(store: Store, workflow_id: UUID = ALPHA) -> dict[str | int, datetime]:
    """The timers of a workflow, each with its instant."""
    with store.timers() as timers:
        return {timer.timer_id.value: timer.fire_at for timer in timers.list_workflow(workflow_id)}


class Elsewhere:
    """Runs functions of a repository in other threads, each in a transaction of its own, on an engine of its own."""

    def __init__(self, backend: str, url: URL, pool: ThreadPoolExecutor, **engine_options: Any) -> None:
        self._submit = partial(pool.submit, self._run, backend, url, engine_options)

    def __call__(self, work: Callable[[Any], Any], **options: Any) -> Future[Any]:
        """Begin; the options are the repository's."""
        return self._submit(work, options)

    @staticmethod
    def _run(
        backend: str, url: URL, engine_options: dict[str, Any], work: Callable[[Any], Any], options: dict[str, Any]
    ) -> Any:
        with asyncio.Runner() as runner:
            store = Store(backend, open_engine(url, **engine_options), runner)
            try:
                with store.timers(**options) as timers:
                    return work(timers)
            finally:
                store.close()


@contextmanager
def elsewhere(backend: str, url: URL, **engine_options: Any) -> Iterator[Elsewhere]:
    """Where others do their work; it is over at the end."""
    with ThreadPoolExecutor(4) as pool:
        yield Elsewhere(backend, url, pool, **engine_options)


def assert_waits(store: Store, done: Future[Any]) -> None:
    """Wait until the other's statement waits for a lock, as far as the database tells, and check that it does."""
    if store.is_sqlite:
        time.sleep(0.1)
    else:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        until = time.monotonic() + 10
        while store.sql(waiting) == [(0,)] and not done.done():
            assert time.monotonic() < until, "the other does not wait"
            time.sleep(0.005)
    assert not done.done()


@contextmanager
def in_handler(
    dispatchers: Dispatchers,
    *,
    inside: bool,
    first: Callable[[Fired, Any], object] | None = None,
    lease: timedelta = MINUTE,
    **options: Any,
) -> Iterator[tuple[Running, threading.Event]]:
    """A dispatcher whose handler has begun, in its delivery's transaction or without one, and waits to be let go.

    What is to be done first gets the delivery and the session, or None without a transaction.
    """
    begun, go = threading.Event(), threading.Event()

    def work(delivery: Fired, session: Any) -> None:
        if first is not None:
            first(delivery, session)
        begun.set()
        delivery.wait_for(go.is_set, 30)

    def handle(delivery: Fired) -> None:
        if not inside:
            work(delivery, None)
            return
        with delivery.transaction() as session:
            work(delivery, session)

    with dispatchers.running(handle, lease=lease, **options) as running:
        try:
            assert begun.wait(10)
            yield running, go
        finally:
            go.set()


def fire_until_killed(backend: str, url: str, inside: bool, lease: timedelta, begun: Connection) -> None:
    """Fire what is due with a handler that tells its attempt and then never comes to its end; in a process."""

    def handle(delivery: Fired) -> None:
        if not inside:
            begun.send(delivery.attempt)
            delivery.sleep(600)
        with delivery.transaction() as session:
            delivery.timers(session).schedule(ALPHA, "effect", FUTURE)
            begun.send(delivery.attempt)
            delivery.sleep(600)

    Dispatchers(backend, make_url(url)).run_due(handle, lease=lease)
