"""Several sessions at once: no deadlock, no timer given twice, nothing of another's transaction seen or lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, event, text

from aion_timers import Settlement, TimerEntry
from tests.conftest import open_engine
from tests.meeting import FUTURE, POSTGRES, Elsewhere, assert_waits, elsewhere
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
WORKFLOWS = [UUID(int=number) for number in range(4)]


def in_threads(backend: str, url: URL, work: Callable[[Store, int], None], threads: int = 4) -> None:
    """Run the work in threads, each with an engine, and for async backends a loop, of its own."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        with asyncio.Runner() as runner:
            store = Store(backend, open_engine(url), runner)
            try:
                work(store, number)
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
                errors.append(error)
            finally:
                store.close()

    started = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_statements_over_the_same_rows_in_other_orders_never_deadlock(backend: str, url: URL, seconds: int) -> None:
    until = time.monotonic() + seconds

    def work(store: Store, number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - a load, no secret
        entries = [TimerEntry(workflow, name, NOW) for workflow in WORKFLOWS for name in range(25)]
        while time.monotonic() < until:
            chance.shuffle(entries)
            with store.timers() as timers:
                match chance.randrange(4):
                    case 0 | 1:
                        timers.schedule_many(entries)
                    case 2:
                        timers.cancel_workflow(chance.choice(WORKFLOWS))
                    case _:
                        timers.take(NOW, limit=chance.randint(1, 60))

    in_threads(backend, url, work)


def test_each_timer_is_taken_by_one_worker(backend: str, url: URL, store: Store) -> None:
    entries = [TimerEntry(UUID(int=number), number, NOW + timedelta(seconds=number)) for number in range(600)]
    with store.timers() as timers:
        timers.schedule_many(entries)
    taken: Counter[UUID] = Counter()

    def work(store: Store, number: int) -> None:
        empty = 0
        while empty < 3:
            with store.timers() as timers:
                batch = timers.take(NOW + timedelta(days=1), limit=7 + number)
            assert batch == sorted(batch)
            taken.update(entry.workflow_id for entry in batch)
            empty = 0 if batch else empty + 1

    in_threads(backend, url, work)
    assert taken == Counter(entry.workflow_id for entry in entries)


def test_of_many_who_schedule_the_same_timer_each_is_heard(backend: str, url: URL, store: Store) -> None:
    def work(store: Store, number: int) -> None:
        for step in range(40):
            with store.timers() as timers:
                instant = NOW + timedelta(seconds=number * 40 + step)
                timers.schedule(ALPHA, "latest", instant, if_exists="latest")
                timers.schedule(ALPHA, "earliest", instant, if_exists="earliest")

    in_threads(backend, url, work)
    with store.timers() as timers:
        assert timers.get(ALPHA, "latest").fire_at == NOW + timedelta(seconds=159)
        assert timers.get(ALPHA, "earliest").fire_at == NOW


def test_what_is_not_committed_is_not_seen(backend: str, url: URL, store: Store) -> None:
    session = store.new_session()
    store.repository(session).schedule(ALPHA, "a", NOW)
    seen: list[Any] = []

    def look(other: Store, _: int) -> None:
        with other.timers() as timers:
            seen.append(timers.expired(NOW))

    in_threads(backend, url, look, threads=1)
    session.commit()
    in_threads(backend, url, look, threads=1)
    session.close()
    assert [len(found) for found in seen] == [0, 1]


@pytest.mark.parametrize("if_exists", ["replace", "keep", "earliest", "latest"])
def test_a_timer_that_is_cancelled_meanwhile_is_scheduled_anew(
    backend: str, url: URL, store: Store, if_exists: Any
) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
    session = store.new_session()
    assert store.repository(session).cancel(ALPHA, "a") is True
    started = threading.Event()
    changed: list[bool] = []

    def schedule(other: Store, _: int) -> None:
        started.set()
        with other.timers() as timers:
            changed.append(timers.schedule(ALPHA, "a", NOW, if_exists=if_exists))

    waiting = threading.Thread(target=in_threads, args=(backend, url, schedule, 1))
    waiting.start()
    started.wait()
    time.sleep(0.2)  # long enough for the statement to wait for the row, or for the lock of the file
    session.commit()
    session.close()
    waiting.join()
    assert changed == [True]
    with store.timers() as timers:
        assert timers.get(ALPHA, "a") is not None


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_take_passes_over_rows_that_another_transaction_has_locked(backend: str, url: URL, store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW + timedelta(seconds=number)) for number in range(4))
    session = store.new_session()
    assert [entry.timer_id.value for entry in store.repository(session).take(NOW + timedelta(days=1), limit=2)] == [
        0,
        1,
    ]
    found: list[Any] = []

    def take(other: Store, _: int) -> None:
        with other.timers() as timers:
            found.extend(entry.timer_id.value for entry in timers.take(NOW + timedelta(days=1), limit=10))

    in_threads(backend, url, take, threads=1)
    session.rollback()
    session.close()
    assert found == [2, 3]


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_timer_that_is_moved_while_take_looks_is_not_taken_early(backend: str, url: URL, store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(50))
    until = time.monotonic() + 1.5
    early: list[TimerEntry] = []

    def work(other: Store, number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - a load, no secret
        while time.monotonic() < until:
            with other.timers() as timers:
                if number % 2:
                    for entry in timers.take(NOW, limit=10):
                        early.extend([entry] if entry.fire_at > NOW else [])
                        timers.schedule(ALPHA, entry.timer_id, NOW)
                else:
                    timers.schedule(ALPHA, chance.randrange(50), NOW + timedelta(days=chance.randrange(2)))

    in_threads(backend, url, work)
    assert early == []


@contextmanager
def looking(backend: str, url: URL, store: Store) -> Iterator[Elsewhere]:
    """Where statements of others stop until this is over, when they have chosen what they see and locked no row."""
    store.sql("CREATE SCHEMA slow")
    for function, returned in (("statement_timestamp()", "timestamptz"), ("string_to_array(text, text)", "text[]")):
        value = f"pg_catalog.{function}".replace("text, text", "$1, $2")
        body = f"BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN {value}; END"
        store.sql(f"CREATE FUNCTION slow.{function} RETURNS {returned} LANGUAGE plpgsql AS '{body}'")
    path = "slow,public,pg_catalog"
    named = {"server_settings": {"search_path": path}} if backend == "asyncpg" else {"options": f"-csearch_path={path}"}
    with elsewhere(backend, url, connect_args=named) as other, store.connection() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(1)"))
        yield other


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("how", ["claim", "take"])
def test_a_timer_that_is_moved_meanwhile_is_had_if_it_is_still_due(
    backend: str, url: URL, store: Store, how: str
) -> None:
    later = NOW + timedelta(seconds=1)
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("stays", "moves", "goes", "is held"))
    options = {"lease": timedelta(minutes=1)} if how == "claim" else {}
    with looking(backend, url, store) as other:
        found = other(lambda timers: getattr(timers, how)(limit=10, **options))
        assert_waits(store, found)
        with store.timers() as timers:
            timers.claim(limit=1, names=["is held"], lease=timedelta(minutes=1))
            timers.schedule(ALPHA, "moves", later)
            timers.schedule(ALPHA, "goes", FUTURE)
    had = [one.timer if how == "claim" else one for one in found.result(10)]
    assert [(timer.timer_id.value, timer.fire_at) for timer in had] == [("stays", NOW), ("moves", later)]


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("how", ["complete", "release", "extend"])
def test_a_claim_whose_timer_changes_meanwhile_is_busy_and_then_settled_or_lost(
    backend: str, url: URL, store: Store, how: str
) -> None:
    lease = timedelta(minutes=1)
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("a", "b", "c"))
        claims = timers.claim(limit=3, lease=lease)
    options = {"lease": lease} if how == "extend" else {}
    with looking(backend, url, store) as other:
        settled = other(lambda timers: getattr(timers, how)(*claims, **options))
        assert_waits(store, settled)
        with store.timers() as timers:
            timers.extend(claims[1], lease=lease)
            timers.cancel(ALPHA, "c")
    assert settled.result(10) == Settlement((claims[0],), tuple(claims[1:]), ())
    with store.timers() as timers:
        assert getattr(timers, how)(*claims[1:], **options) == Settlement((claims[1],), (), (claims[2],))


@pytest.mark.parametrize("backend", ["psycopg"], indirect=True)
@pytest.mark.parametrize("how", ["take", "complete"])
def test_rows_of_a_table_that_inherits_are_not_mistaken_for_others(store: Store, how: str) -> None:
    """The rows of each table lie at the same places in their own."""
    with store.timers() as timers:
        timers.schedule(ALPHA, "due", NOW)
    store.sql("CREATE TABLE more () INHERITS (timers)")
    for name, instant in (("later", "9000-01-01"), ("due, too", "2026-06-03 02:30:01Z")):
        row = f"workflow_id, replace(timer_id, 'due', '{name}'), '{instant}'"
        store.sql(f"INSERT INTO more SELECT {row} FROM ONLY timers")
    with store.timers() as timers:
        if how == "take":
            had = timers.take(limit=10)
        else:
            claims = timers.claim(limit=10, lease=timedelta(minutes=1))
            had = [claim.timer for claim in claims]
            first = timers.complete(*claims)
            assert (len(first.done), len(first.busy)) == (1, 1)
            assert timers.complete(*first.busy).done == first.busy
        assert [timer.timer_id.value for timer in had] == ["due", "due, too"]
        assert [timer.timer_id.value for timer in timers.list_workflow(ALPHA)] == ["later"]


def test_a_timer_that_becomes_due_in_a_long_transaction_is_seen_in_it(store: Store) -> None:
    with store.timers() as timers:
        assert timers.take(limit=1) == []  # the transaction has begun
        timers.schedule(ALPHA, "soon", datetime.now(UTC) + timedelta(milliseconds=300))
        assert timers.take(limit=1) == []
        time.sleep(0.4)
        assert [entry.timer_id.value for entry in timers.take(limit=1)] == ["soon"]


@pytest.mark.parametrize("backend", ["libsql", "sqlite"], indirect=True)
def test_a_timer_that_moves_between_being_read_and_being_taken_is_left(backend: str, url: URL, store: Store) -> None:
    other = Store(backend, open_engine(url), store.runner)
    with store.timers() as timers:
        timers.schedule(ALPHA, "moved", NOW)
        timers.schedule(ALPHA, "stays", NOW)

    moved: list[bool] = []

    def move(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("DELETE") and not moved:
            moved.append(True)
            with other.timers() as timers:
                timers.schedule(ALPHA, "moved", NOW + timedelta(days=1))

    event.listen(store.engine, "before_cursor_execute", move)
    with store.connection(isolation_level="AUTOCOMMIT") as connection:
        taken = store.repository(connection).take(NOW, limit=10)
    other.close()
    assert [entry.timer_id.value for entry in taken] == ["stays"]
    with store.timers() as timers:
        assert timers.get(ALPHA, "moved").fire_at == NOW + timedelta(days=1)
