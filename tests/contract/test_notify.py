"""On PostgreSQL a statement that schedules tells sleeping workers, if its timer comes before all that nobody holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aion_timers import AsyncTimerRepository, TimerEntry, TimerRepository
from aion_timers.wakeup import AsyncWakeup, Wakeup
from tests.store import Store

pytestmark = pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
LEASE = timedelta(minutes=5)
SOON = 30.0  # seconds that nobody waits for, unless something is broken
NEVER = 0.3  # seconds in which something that must not happen would have


class Ear:
    """Counts what is heard on the channel of a table."""

    def __init__(self, url: URL, table: str) -> None:
        plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.connection = psycopg.connect(plain, autocommit=True)
        row = self.connection.execute("SELECT CAST(%s::regclass AS oid)", [table]).fetchone()
        assert row is not None
        self.connection.execute(f"LISTEN aion_timers_{row[0]}")  # type: ignore[call-overload] # a number

    def heard(self) -> int:
        """How often since it was asked before."""
        # what was committed before this statement has been sent before its answer
        self.connection.execute("SELECT 1")
        return len(list(self.connection.notifies(timeout=0.05)))


@contextmanager
def listening(url: URL, table: str = "timers") -> Iterator[Ear]:
    ear = Ear(url, table)
    try:
        yield ear
    finally:
        ear.connection.close()


@pytest.fixture
def ear(url: URL) -> Iterator[Ear]:
    with listening(url) as made:
        yield made


def test_the_first_timer_of_all_is_told_when_it_is_committed(store: Store, ear: Ear) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, 1, NOW)
        assert ear.heard() == 0
    assert ear.heard() == 1


def test_what_is_rolled_back_is_not_told(store: Store, ear: Ear) -> None:
    with store.session() as session:
        store.repository(session).schedule(ALPHA, 1, NOW)
        session.rollback()
    assert ear.heard() == 0


@pytest.mark.parametrize(
    ("offset", "told"), [(timedelta(microseconds=-1), 1), (timedelta(0), 0), (HOUR, 0), (timedelta(days=9999), 0)]
)
def test_only_what_comes_before_all_others_is_told(store: Store, ear: Ear, offset: timedelta, told: int) -> None:
    with store.timers(notify=False) as timers:
        timers.schedule(ALPHA, 1, NOW)
    with store.timers() as timers:
        timers.schedule(ALPHA, 2, NOW + offset)
    assert ear.heard() == told
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(ALPHA, 3, NOW + 2 * offset), TimerEntry(ALPHA, 4, NOW + HOUR)])
    assert ear.heard() == told


def test_a_timer_that_is_moved_is_told_only_if_it_moves_to_the_front(store: Store, ear: Ear) -> None:
    with store.timers(notify=False) as timers:
        timers.schedule(ALPHA, 1, NOW)
        timers.schedule(ALPHA, 2, NOW + HOUR)
    for number, fire_at, if_exists, told in [
        (1, NOW + HOUR / 2, "replace", 0),
        (1, NOW, "keep", 0),
        (1, NOW + HOUR, "earliest", 0),
        (1, NOW + HOUR / 4, "earliest", 1),
        (2, NOW + HOUR / 8, "replace", 1),
    ]:
        with store.timers() as timers:
            timers.schedule(ALPHA, number, fire_at, if_exists=if_exists)
        assert ear.heard() == told, (number, fire_at, if_exists)


def test_many_in_one_transaction_are_told_once(store: Store, ear: Ear) -> None:
    with store.timers() as timers:
        assert timers.schedule_many(TimerEntry(ALPHA, number, NOW - number * HOUR) for number in range(3000)) == 3000
        timers.schedule(ALPHA, "earlier", NOW - 4000 * HOUR)
        timers.schedule(ALPHA, "earliest", NOW - 5000 * HOUR)
    assert ear.heard() == 1


def test_what_others_hold_is_passed_over(store: Store, ear: Ear) -> None:
    with store.timers(notify=False) as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW - HOUR) for number in range(10))
        timers.schedule(ALPHA, "free", NOW + HOUR)
        assert len(timers.claim(limit=10, lease=LEASE)) == 10
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
    assert ear.heard() == 1
    with store.timers() as timers:
        timers.schedule(ALPHA, "b", NOW + timedelta(seconds=1))
    assert ear.heard() == 0


def test_a_lease_that_ran_out_holds_nothing(store: Store, ear: Ear) -> None:
    with store.timers(notify=False) as timers:
        timers.schedule(ALPHA, 1, NOW - 3 * LEASE)
    with store.timers(clock=lambda: NOW - 2 * LEASE) as timers:
        assert timers.claim(limit=1, lease=LEASE)
    with store.timers() as timers:
        timers.schedule(ALPHA, 2, NOW)
    assert ear.heard() == 0


def test_behind_very_many_that_are_held_nothing_is_told(store: Store, ear: Ear) -> None:
    with store.timers(notify=False) as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW - HOUR) for number in range(200))
        assert len(timers.claim(limit=200, lease=LEASE)) == 200
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
    assert ear.heard() == 0
    with store.timers() as timers:
        timers.schedule(ALPHA, "b", NOW - 2 * HOUR)
    assert ear.heard() == 1


def test_the_repositorys_clock_decides_what_is_held(store: Store, ear: Ear) -> None:
    with store.timers(clock=lambda: NOW, notify=False) as timers:
        timers.schedule(ALPHA, 1, NOW - HOUR)
        timers.claim(limit=1, lease=LEASE)
    with store.timers(clock=lambda: NOW + 2 * LEASE) as timers:
        timers.schedule(ALPHA, 2, NOW)
    assert ear.heard() == 0
    with store.timers(clock=lambda: NOW) as timers:
        timers.schedule(ALPHA, 3, NOW - timedelta(seconds=1))
    assert ear.heard() == 1


def test_it_can_be_turned_off(store: Store, ear: Ear) -> None:
    with store.timers(notify=False) as timers:
        assert timers.schedule(ALPHA, 1, NOW)
        assert timers.schedule_many([TimerEntry(ALPHA, 2, NOW - HOUR)]) == 1
    assert ear.heard() == 0


def test_a_serializable_transaction_tells_nothing_and_meets_no_conflict(store: Store, ear: Ear) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(uuid4(), 1, NOW + HOUR) for _ in range(100))
    assert ear.heard() == 1
    with (
        store.connection(isolation_level="SERIALIZABLE") as one,
        store.connection(isolation_level="SERIALIZABLE") as other,
    ):
        for number, connection in enumerate((one, other)):
            store.repository(connection).schedule(UUID(int=number), 1, NOW - number * HOUR)
            store.repository(connection).schedule_many([TimerEntry(UUID(int=number), 2, NOW - 2 * number * HOUR)])
            # what was read, not looked up by its key
            read = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_locks WHERE mode = 'SIReadLock' AND relation = 'idx_timers_fire_at'::regclass"
            ).scalar_one()
            assert read == 0
        one.commit()
    assert ear.heard() == 0


def test_a_repeatable_read_tells_as_any_other(store: Store, ear: Ear) -> None:
    with store.connection(isolation_level="REPEATABLE READ") as connection:
        store.repository(connection).schedule(ALPHA, 1, NOW)
    assert ear.heard() == 1


def test_a_connection_at_autocommit_tells_at_once(store: Store, ear: Ear) -> None:
    with store.connection(isolation_level="AUTOCOMMIT") as connection:
        store.repository(connection).schedule(ALPHA, 1, NOW)
        assert ear.heard() == 1
        assert store.repository(connection).schedule_many([TimerEntry(ALPHA, 2, NOW - HOUR)]) == 1
        assert ear.heard() == 1


def test_a_transaction_that_will_be_prepared_tells_nothing(store: Store) -> None:
    if store.is_async:
        return  # SQLAlchemy's async connections have no two phases
    seen: list[str] = []
    event.listen(store.engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    engine: Any = store.engine
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        timers = TimerRepository(connection)
        with connection.begin_nested():
            timers.schedule(ALPHA, 1, NOW)
        timers.schedule_many([TimerEntry(ALPHA, 2, NOW)])
        transaction.rollback()
    with Session(engine, twophase=True) as session:
        TimerRepository(session).schedule(ALPHA, 1, NOW)
        session.rollback()
    assert len([statement for statement in seen if "INSERT INTO" in statement]) == 3
    assert not [statement for statement in seen if "pg_notify" in statement]


def test_the_tables_of_two_schemas_have_channels_of_their_own(store: Store, url: URL, ear: Ear) -> None:
    store.sql("CREATE SCHEMA other")
    store.sql("CREATE TABLE other.timers (LIKE public.timers INCLUDING ALL)")
    with listening(url, "other.timers") as other:
        with store.connection(schema_translate_map={None: "other"}) as connection:
            timers = store.repository(connection)
            timers.schedule(ALPHA, 1, NOW)
            timers.schedule_many([TimerEntry(ALPHA, 2, NOW - HOUR)])
        assert (ear.heard(), other.heard()) == (0, 1)
        with store.timers() as timers:
            timers.schedule(ALPHA, 1, NOW)
        assert (ear.heard(), other.heard()) == (1, 0)


def test_a_waiter_hears_the_first_timer_and_no_later_one(store: Store) -> None:
    if store.is_async:
        store.runner.run(_async_scenario(store))
        return
    with Wakeup(store.engine) as waiter:  # type: ignore[arg-type] # sync here
        assert waiter.wait(SOON)
        for offset, told in [(HOUR, True), (2 * HOUR, False), (-HOUR, True)]:
            with store.timers() as timers:
                timers.schedule(uuid4(), 1, NOW + offset)
            assert waiter.wait(SOON if told else NEVER) is told


async def _async_scenario(store: Store) -> None:
    async with AsyncWakeup(store.engine) as waiter:  # type: ignore[arg-type] # async here
        assert await waiter.wait(SOON)
        for offset, told in [(HOUR, True), (2 * HOUR, False), (-HOUR, True)]:
            async with AsyncSession(store.engine) as session, session.begin():  # type: ignore[arg-type] # async here
                await AsyncTimerRepository(session).schedule(uuid4(), 1, NOW + offset)
            assert await waiter.wait(SOON if told else NEVER) is told
