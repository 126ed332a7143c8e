"""No handler starts before its timer's instant, by the clock that decides, however that clock goes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from aion_timers import Claim, TimerEntry
from tests.conftest import open_engine
from tests.dispatching import Dispatchers, Fired, wait_until
from tests.meeting import ALPHA, PAST, schedule
from tests.store import Store

BETA = UUID("00000000-0000-4000-8000-00000000000b")
MICROSECOND = timedelta(microseconds=1)

# small steps, since it is at the edge that something can be early
near = st.integers(-3, 3).map(lambda number: number * MICROSECOND)
far = st.sampled_from([-7, -1, 1, 7]).map(lambda days: timedelta(days=days))
seconds = st.integers(-4000, 4000).map(lambda number: timedelta(milliseconds=number))
steps = near | seconds | far


class Wild:
    """A clock that a test moves forward and backward, and that remembers all that it has shown."""

    def __init__(self) -> None:
        self.now = PAST
        self.shown = [PAST]

    def __call__(self) -> datetime:
        """What time it is."""
        self.shown.append(self.now)
        return self.now

    def highest(self, since: int = 0) -> datetime:
        """The latest instant that was shown after so many others."""
        return max(self.shown[since:])


class Restless(Wild):
    """A clock that moves each time that somebody looks at it."""

    def __init__(self, moves: list[timedelta]) -> None:
        super().__init__()
        self._moves = moves
        self._lock = threading.Lock()

    def __call__(self) -> datetime:
        """What time it is, and will not be again."""
        with self._lock:
            self.now = PAST + self._moves[len(self.shown) % len(self._moves)]
            return super().__call__()


@pytest.fixture
def dispatchers(backend: str, url: URL) -> Dispatchers:
    """Makes dispatchers on the database of the store."""
    return Dispatchers(backend, url)


@pytest.fixture
def run_due(url: URL, store: Store, dispatchers: Dispatchers) -> Iterator[Callable[..., int]]:
    """Fires what is due; one engine serves all examples, in the event loop of the store if it is an async one."""
    engine: Any = open_engine(url)

    def run(handler: Callable[[Fired], object], **options: Any) -> int:
        found = dispatchers.make(engine, handler, **options).run_due()
        return int(store.runner.run(found) if isinstance(engine, AsyncEngine) else found)

    yield run
    store.blocking(engine).dispose()


def examples(most: int) -> settings:
    return settings(
        max_examples=most,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def emptied(timers: Any) -> Any:
    for workflow_id in (ALPHA, BETA):
        timers.cancel_workflow(workflow_id)
    return timers


# -- a clock that jumps -----------------------------------------------------------------------------------------------


@given(st.lists(steps, max_size=8), st.lists(steps, min_size=1, max_size=8), st.integers(1, 4))
@examples(25)
def test_a_claim_takes_nothing_before_its_instant_and_leaves_nothing_after_it(
    store: Store, offsets: list[timedelta], moves: list[timedelta], limit: int
) -> None:
    clock = Wild()
    lease = timedelta(seconds=1)
    with store.session() as session:
        timers = emptied(store.repository(session, clock=clock))
        entries = [TimerEntry(ALPHA, number, PAST + offset) for number, offset in enumerate(offsets)]
        timers.schedule_many(entries)
        held: dict[TimerEntry, datetime] = {}
        for move in moves:
            clock.now += move
            free = sorted(
                entry for entry in entries if entry.fire_at <= clock.now and held.get(entry, clock.now) <= clock.now
            )
            claims: list[Claim] = timers.claim(limit=limit, lease=lease)
            assert [claim.timer for claim in claims] == free[:limit]
            held.update((claim.timer, clock.now + lease) for claim in claims)


@pytest.mark.parametrize("backend", ["libsql", "aiosqlite", "psycopg", "asyncpg"], indirect=True)
@given(st.lists(steps, max_size=6), st.lists(steps, min_size=1, max_size=4), st.integers(1, 3))
@examples(12)
def test_run_due_fires_what_is_due_by_its_clock_and_nothing_else(
    store: Store,
    run_due: Callable[..., int],
    offsets: list[timedelta],
    moves: list[timedelta],
    concurrency: int,
) -> None:
    clock = Wild()
    with store.timers() as timers:
        emptied(timers)
        entries = [TimerEntry(ALPHA, number, PAST + offset) for number, offset in enumerate(offsets)]
        timers.schedule_many(entries)
    fired: list[TimerEntry] = []

    def handle(delivery: Fired) -> None:
        assert delivery.late_by == clock.now - delivery.timer.fire_at
        fired.append(delivery.timer)

    for move in moves:
        clock.now += move
        due = sorted(entry for entry in entries if entry.fire_at <= clock.now and entry not in fired)
        before = len(fired)
        assert run_due(handle, concurrency=concurrency, clock=clock) == len(due)
        assert sorted(fired[before:]) == due
        if concurrency == 1:
            assert fired[before:] == due


@pytest.mark.parametrize("backend", ["libsql", "aiosqlite", "psycopg", "asyncpg"], indirect=True)
@given(st.lists(steps, min_size=1, max_size=6), st.lists(steps, min_size=2, max_size=8), st.booleans())
@examples(12)
def test_run_due_fires_nothing_that_no_clock_has_shown_even_if_each_look_shows_another_time(
    store: Store,
    run_due: Callable[..., int],
    offsets: list[timedelta],
    moves: list[timedelta],
    inside: bool,
) -> None:
    clock = Restless(moves)
    with store.timers() as timers:
        emptied(timers)
        timers.schedule_many(TimerEntry(ALPHA, number, PAST + offset) for number, offset in enumerate(offsets))
    early: list[Any] = []

    def handle(delivery: Fired) -> None:
        if delivery.timer.fire_at > clock.highest():
            early.append(delivery.timer)
        if inside:
            with delivery.transaction():
                pass

    run_due(handle, concurrency=2, clock=clock)
    assert early == []
    with store.timers() as timers:
        assert all(entry.fire_at > min(clock.shown[1:]) for entry in timers.list_workflow(ALPHA))


def test_a_dispatcher_beside_a_clock_that_jumps_fires_nothing_early_and_all_in_the_end(
    store: Store, dispatchers: Dispatchers
) -> None:
    chance = random.Random(1)  # noqa: S311 - when what happens, no secret
    clock = Wild()
    since: dict[Any, int] = {}
    early: list[Any] = []
    fired: list[Any] = []

    def put(name: int, fire_at: datetime) -> None:
        # from here on the clock has to show it; a claim that has just looked may be under way, and others looked since
        since[name] = max(0, len(clock.shown) - 5)
        schedule(store, name, at=fire_at)

    def handle(delivery: Fired) -> None:
        if delivery.timer.fire_at > clock.highest(since[delivery.name]):
            early.append(delivery.timer)
        fired.append(delivery.name)

    many = 30
    with dispatchers.running(handle, concurrency=2, clock=clock, max_sleep=timedelta(milliseconds=20)):
        for name in range(many):
            put(name, clock.now + chance.choice([1, 400, 86_400_000]) * timedelta(milliseconds=1))
            clock.now += chance.choice([-86_400_000, -300, -1, 1, 300, 500]) * timedelta(milliseconds=1)
            time.sleep(0.01)
        assert early == []
        clock.now = PAST + timedelta(days=1000)
        wait_until(lambda: set(fired) == set(range(many)))
    assert early == []
    with store.timers() as timers:
        assert timers.next_fire_at() is None


# -- the database's own clock -----------------------------------------------------------------------------------------


def test_no_handler_starts_before_the_databases_clock_shows_its_instant(backend: str, url: URL, store: Store) -> None:
    chance = random.Random(1)  # noqa: S311 - which instants, no secret
    seen: dict[int, timedelta] = {}
    slept: list[timedelta] = []

    def handle(delivery: Fired) -> None:
        # nothing before this; the file's clock is the host's, cut to milliseconds
        now = datetime.now(UTC) if store.is_sqlite else None
        with delivery.session() as session:
            shown = delivery.timers(session).now()
        seen[delivery.name] = min(now or shown, shown) - delivery.timer.fire_at
        slept.append(delivery.late_by)
        if delivery.name % 2:
            with delivery.transaction():
                pass

    with store.timers() as timers:
        start: datetime = timers.now()
        offsets = [150_000, 150_001, 150_999, 151_000, *(chance.randrange(160_000, 900_000) for _ in range(40))]
        timers.schedule_many(
            TimerEntry(ALPHA, number, start + offset * MICROSECOND) for number, offset in enumerate(offsets)
        )
    one, other = Dispatchers(backend, url), Dispatchers(backend, url)
    with one.running(handle, concurrency=3), other.running(handle, concurrency=3):
        time.sleep(0.3)
        # some that come before all others, and wake sleepers
        for number in range(len(offsets), len(offsets) + 10):
            with store.timers() as timers:
                now = timers.now()
            schedule(store, number, at=now + chance.randrange(1, 30_000) * MICROSECOND)
            time.sleep(0.02)
        wait_until(lambda: len(seen) == len(offsets) + 10)
    assert min(seen.values()) >= timedelta(0)
    assert min(slept) >= timedelta(0)
