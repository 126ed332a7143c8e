"""The dispatcher and its deliveries, on every backend: what happens when a handler and others meet, and the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import URL, Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from aion_timers import (
    AsyncDispatcher,
    Backoff,
    Dispatcher,
    InvalidInputError,
    LeaseLost,
    NotMigratedError,
    TimerEntry,
    UnsupportedBindError,
)
from tests.conftest import open_engine
from tests.contract.test_concurrency import in_threads
from tests.dispatching import LIMIT, Counted, Dispatchers, Fired, Running, Standing, wait_until
from tests.store import HEARING, SERVERS, Store

ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
PAST = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
FUTURE = datetime(9000, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
POSTGRES = ["psycopg", "psycopg_async", "asyncpg"]
POLICIES = ["replace", "keep", "earliest", "latest"]


def longest(store: Store) -> timedelta:
    """How long a worker may sleep who is to be in time: on a libSQL server he hears of nothing."""
    return timedelta(milliseconds=50) if store.backend in SERVERS else DAY


@pytest.fixture
def dispatchers(backend: str, url: URL) -> Dispatchers:
    """Makes dispatchers on the database of the store."""
    return Dispatchers(backend, url)


def schedule(store: Store, *names: str | int, at: datetime = PAST, workflow_id: UUID = ALPHA) -> None:
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(workflow_id, name, at) for name in names])


def left(store: Store) -> dict[str | int, datetime]:
    with store.timers() as timers:
        return {timer.timer_id.value: timer.fire_at for timer in timers.list_workflow(ALPHA)}


@contextmanager
def elsewhere(backend: str, url: URL) -> Iterator[Callable[..., Future[Any]]]:
    """Runs functions of a repository in other threads, each in a transaction of its own."""

    def run(work: Callable[[Any], Any], **options: Any) -> Any:
        found: list[Any] = []

        def in_store(store: Store, _: int) -> None:
            with store.timers(**options) as timers:
                found.append(work(timers))

        in_threads(backend, url, in_store, threads=1)
        return found[0]

    with ThreadPoolExecutor(4) as pool:
        yield partial(pool.submit, run)


@contextmanager
def in_handler(dispatchers: Dispatchers, *, inside: bool, **options: Any) -> Iterator[tuple[Running, threading.Event]]:
    """A dispatcher whose handler has begun, in its delivery's transaction or without one, and waits to be let go."""
    begun, go = threading.Event(), threading.Event()

    def handle(delivery: Fired) -> None:
        if inside:
            with delivery.transaction():
                begun.set()
                delivery.wait_for(go.is_set)
        else:
            begun.set()
            delivery.wait_for(go.is_set)

    with dispatchers.running(handle, lease=MINUTE, **options) as running:
        try:
            assert begun.wait(LIMIT)
            yield running, go
        finally:
            go.set()


# -- when two things meet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("if_exists", POLICIES)
def test_who_schedules_while_a_transaction_holds_the_timer_waits_and_has_his_way(
    backend: str, url: URL, store: Store, dispatchers: Dispatchers, if_exists: Any
) -> None:
    schedule(store, "a")
    with elsewhere(backend, url) as other, in_handler(dispatchers, inside=True) as (running, go):
        done = other(lambda timers: timers.schedule(ALPHA, "a", FUTURE, if_exists=if_exists))
        time.sleep(0.1)
        assert not done.done()
        go.set()
        assert done.result(LIMIT) is True
        running.stop()
        assert left(store) == {"a": FUTURE}


@pytest.mark.parametrize("if_exists", POLICIES)
def test_who_schedules_while_a_handler_runs_without_a_transaction_has_his_way_at_once(
    store: Store, dispatchers: Dispatchers, if_exists: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    with in_handler(dispatchers, inside=False) as (running, go):
        with store.timers() as timers:
            assert timers.schedule(ALPHA, "a", FUTURE, if_exists=if_exists) is True
        go.set()
        running.stop()
    assert left(store) == {"a": FUTURE}
    assert [record.__dict__["aion_lost"] for record in caplog.records if hasattr(record, "aion_lost")] == [1]


@pytest.mark.parametrize("inside", [True, False])
def test_who_cancels_waits_for_a_transaction_and_finds_nothing_or_cancels_at_once(
    backend: str, url: URL, store: Store, dispatchers: Dispatchers, inside: bool
) -> None:
    schedule(store, "a")
    with elsewhere(backend, url) as other, in_handler(dispatchers, inside=inside) as (running, go):
        done = other(lambda timers: timers.cancel(ALPHA, "a"))
        if inside:
            time.sleep(0.1)
            assert not done.done()
            go.set()
        assert done.result(LIMIT) is not inside
        go.set()
        running.stop()
    assert left(store) == {}


def test_a_transaction_keeps_its_timer_after_the_lease_ran_out(
    backend: str, url: URL, store: Store, dispatchers: Dispatchers
) -> None:
    clock = Standing(PAST + MINUTE)
    schedule(store, "a")
    with elsewhere(backend, url) as other, in_handler(dispatchers, inside=True, clock=clock) as (running, go):
        clock.now += 2 * MINUTE
        claims = other(lambda timers: timers.claim(limit=1, lease=MINUTE), clock=clock)
        if not store.is_sqlite:  # there the other waits for the file
            assert claims.result(LIMIT) == []
        go.set()
        assert claims.result(LIMIT) == []
        running.stop()
    assert left(store) == {}


def test_who_claims_after_the_lease_ran_out_gets_what_a_handler_has_and_only_he_settles(
    backend: str, url: URL, store: Store, dispatchers: Dispatchers
) -> None:
    clock = Standing(PAST + MINUTE)
    schedule(store, "a")

    def steal(store: Store, _: int) -> None:
        with store.timers(clock=lambda: PAST + timedelta(hours=1)) as timers:
            claims.extend(timers.claim(limit=1, lease=MINUTE))

    claims: list[Any] = []
    with in_handler(dispatchers, inside=False, clock=clock) as (running, go):
        in_threads(backend, url, steal, threads=1)
        assert [claim.attempt for claim in claims] == [2]
        go.set()
        running.stop()
    assert left(store) == {"a": PAST}
    with store.timers() as timers:
        assert timers.complete(*claims).done == tuple(claims)


@pytest.mark.parametrize("inside", [True, False])
def test_a_handler_that_schedules_its_own_timer_again_has_its_way(
    store: Store, dispatchers: Dispatchers, inside: bool
) -> None:
    schedule(store, *POLICIES)

    def again(delivery: Fired) -> None:
        with delivery.transaction() if inside else delivery.session() as session:
            assert delivery.timers(session).schedule(ALPHA, delivery.name, FUTURE, if_exists=delivery.name)

    assert dispatchers.run_due(again) == 4
    assert left(store) == dict.fromkeys(POLICIES, FUTURE)
    with store.timers() as timers:
        assert {claim.attempt for claim in timers.claim(FUTURE, limit=9, lease=MINUTE)} == {1}


@pytest.mark.parametrize("inside", [True, False])
def test_a_handler_may_cancel_its_whole_workflow(store: Store, dispatchers: Dispatchers, inside: bool) -> None:
    schedule(store, "a")
    schedule(store, "later", "latest", at=FUTURE)

    def cancel(delivery: Fired) -> None:
        with delivery.transaction() if inside else delivery.session() as session:
            assert delivery.timers(session).cancel_workflow(ALPHA) == 3

    assert dispatchers.run_due(cancel) == 1
    assert left(store) == {}


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_handler_did_before_it_raised_is_rolled_back_and_the_timer_comes_again(
    store: Store, dispatchers: Dispatchers, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Standing(PAST)
    schedule(store, "a")
    seen: list[tuple[int, timedelta]] = []

    def fail(delivery: Fired) -> None:
        seen.append((delivery.attempt, delivery.late_by))
        if inside:
            with delivery.transaction() as session:
                delivery.timers(session).schedule(ALPHA, "b", PAST)
                raise ValueError("no")
        raise ValueError("no")

    options = {"clock": clock, "retry": lambda delivery, _: delivery.attempt * MINUTE}
    assert dispatchers.run_due(fail, **options) == 1
    assert left(store) == {"a": PAST + MINUTE}
    assert dispatchers.run_due(fail, **options) == 0
    clock.now += 3 * MINUTE
    assert dispatchers.run_due(fail, **options) == 1
    assert left(store) == {"a": PAST + 5 * MINUTE}
    assert seen == [(1, timedelta(0)), (2, 2 * MINUTE)]
    assert [record.__dict__["aion_retry_in"] for record in caplog.records] == [60, 120]


def test_a_handler_that_raises_after_its_transaction_is_not_tried_again(
    store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture
) -> None:
    schedule(store, "a")

    def fail(delivery: Fired) -> None:
        with delivery.transaction() as session:
            delivery.timers(session).schedule(ALPHA, "b", FUTURE)
        raise ValueError("too late")

    assert dispatchers.run_due(fail) == 1
    assert left(store) == {"b": FUTURE}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_what_a_dead_process_held_is_fired_again_after_its_lease(store: Store, dispatchers: Dispatchers) -> None:
    clock = Standing(PAST)
    schedule(store, "a")
    with store.timers(clock=clock) as timers:
        timers.claim(limit=1, lease=MINUTE)
    seen: list[int] = []
    clock.now += MINUTE - timedelta(milliseconds=1)
    assert dispatchers.run_due(lambda delivery: seen.append(delivery.attempt), clock=clock) == 0
    clock.now += timedelta(milliseconds=1)
    assert dispatchers.run_due(lambda delivery: seen.append(delivery.attempt), clock=clock) == 1
    assert seen == [2]
    assert left(store) == {}


def test_a_dispatcher_wakes_when_a_lease_of_a_dead_process_runs_out(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "a")
    lease = timedelta(milliseconds=500)
    before = time.monotonic()
    with store.timers() as timers:
        timers.claim(limit=1, lease=lease)
    seen: list[int] = []
    # by no sleep that came to its end, and by nobody who rings
    with dispatchers.running(lambda delivery: seen.append(delivery.attempt), max_sleep=DAY):
        wait_until(lambda: seen)
    assert time.monotonic() - before >= lease.total_seconds() - 0.01
    assert seen == [2]
    assert left(store) == {}


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
@pytest.mark.parametrize("inside", [True, False])
def test_what_the_other_program_moves_stands(url: URL, store: Store, dispatchers: Dispatchers, inside: bool) -> None:
    schedule(store, "a")

    def move() -> None:
        engine = open_engine(url.set(drivername="sqlite+libsql" if "libsql" in url.drivername else "sqlite"))
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (?, ?, ?)"
                " ON CONFLICT(workflow_id, timer_id) DO UPDATE SET fire_at = excluded.fire_at",
                (f'"{ALPHA}"', '{"Named":"a"}', "9000-01-01T00:00:00.000000000Z"),
            )
        engine.dispose()

    with in_handler(dispatchers, inside=inside) as (running, go), ThreadPoolExecutor(1) as pool:
        moved = pool.submit(move)
        if inside:
            time.sleep(0.1)
            assert not moved.done()
        else:
            moved.result(LIMIT)
        go.set()
        moved.result(LIMIT)
        running.stop()
    assert left(store) == {"a": FUTURE}


def test_a_handler_that_lost_its_timer_does_no_work(
    backend: str, url: URL, store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    reached: list[str] = []

    def handle(delivery: Fired) -> None:
        other(lambda timers: timers.schedule(ALPHA, "a", FUTURE)).result(LIMIT)
        with delivery.transaction():
            reached.append("the work")

    with elsewhere(backend, url) as other:
        assert dispatchers.run_due(handle) == 1
    assert reached == []
    assert left(store) == {"a": FUTURE}
    assert "lease is lost" in caplog.text


def test_a_transaction_is_opened_once(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "a")
    errors: list[type[BaseException]] = []

    def handle(delivery: Fired) -> None:
        with delivery.transaction():
            delivery.extend()
            assert not delivery.lost
            with pytest.raises(InvalidInputError, match="open already"), delivery.transaction():
                pass
        for again in (delivery.transaction().__enter__, delivery.extend):
            try:
                again()
            except LeaseLost as error:
                errors.append(type(error))

    assert dispatchers.run_due(handle) == 1
    assert errors == [LeaseLost] * 2


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_confirm_that_fails_at_a_higher_isolation_level_is_tried_again(
    backend: str, url: URL, store: Store, level: str
) -> None:
    schedule(store, "a")
    held, tries = threading.Event(), []

    def hold(other: Store, claim: Any) -> None:
        with other.session() as session:
            other.repository(session).extend(claim, lease=MINUTE)
            held.set()
            # until somebody waits for this transaction
            waiting = text(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            )
            wait_until(lambda: session.execute(waiting).scalar_one())

    def handle(delivery: Fired) -> None:
        holder = threading.Thread(
            target=in_threads, args=(backend, url, lambda other, _: hold(other, delivery.raw.claim), 1)
        )
        holder.start()
        delivery.wait_for(held.is_set)
        tries.append(delivery.attempt)
        with delivery.transaction() as session:
            delivery.timers(session).schedule(ALPHA, "b", FUTURE)
        holder.join()

    assert Dispatchers(backend, url, isolation_level=level).run_due(handle) == 1
    assert tries == [1]
    assert left(store) == {"b": FUTURE}


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_an_acknowledgement_waits_for_a_host_that_has_the_row_and_holds_up_no_other(
    store: Store, dispatchers: Dispatchers
) -> None:
    schedule(store, "a", "b")
    seen: list[str] = []
    locked = store.new_session()

    def handle(delivery: Fired) -> None:
        if delivery.name == "a":
            started.set()
            delivery.wait_for(go.is_set)
        seen.append(delivery.name)

    started, go = threading.Event(), threading.Event()
    try:
        with dispatchers.running(handle, concurrency=2):
            assert started.wait(LIMIT)
            first = text("SELECT * FROM timers WHERE timer_id = CAST(:id AS text) FOR UPDATE")
            locked.execute(first, {"id": '{"Named":"a"}'})
            go.set()
            wait_until(lambda: "b" not in left(store))
            time.sleep(0.1)
            assert sorted(seen) == ["a", "b"]
            assert left(store) == {"a": PAST}
            locked.rollback()
            wait_until(lambda: left(store) == {})
    finally:
        go.set()
        locked.close()


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_stop_waits_until_a_host_lets_go_of_what_was_fired_or_has_failed(
    store: Store, dispatchers: Dispatchers
) -> None:
    schedule(store, "fired", "failed")
    running: set[str] = set()
    go = threading.Event()
    locked = store.new_session()

    def handle(delivery: Fired) -> None:
        running.add(delivery.name)
        delivery.wait_for(go.is_set)
        assert delivery.name == "fired"

    try:
        with dispatchers.running(handle, concurrency=2, retry=lambda *_: timedelta(hours=24)) as round_:
            wait_until(lambda: len(running) == 2)
            locked.execute(text("SELECT * FROM timers FOR UPDATE"))
            go.set()
            round_.dispatcher.stop()
            round_.thread.join(0.3)
            assert round_.thread.is_alive()
            locked.rollback()
        with store.timers() as timers:
            (timer,) = timers.list_workflow(ALPHA)
            assert (timer.timer_id.value, timer.fire_at > timers.now() + timedelta(hours=23)) == ("failed", True)
            assert timers.next_wake() > timedelta(hours=23)
    finally:
        go.set()
        locked.close()


# -- which timers, in which order, how many ---------------------------------------------------------------------------


def test_run_due_fires_what_is_due_in_order_and_leaves_the_rest(store: Store, dispatchers: Dispatchers) -> None:
    entries = [TimerEntry(ALPHA, number, PAST + number * MINUTE) for number in range(5)]
    with store.timers() as timers:
        timers.schedule_many(reversed(entries))
    schedule(store, "later", at=FUTURE)
    seen: list[Any] = []
    assert dispatchers.run_due(lambda delivery: seen.append(delivery.timer)) == 5
    assert seen == entries
    assert left(store) == {"later": FUTURE}
    assert dispatchers.run_due(seen.append) == 0


def test_a_name_decides_who_fires_and_what_nobody_knows_is_left_alone(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "pay", "pay-1", "pay-late-1", "pay-late", "other", 7)
    seen: list[tuple[str, Any]] = []

    def by(name: str) -> Callable[[Fired], None]:
        return lambda delivery: seen.append((name, delivery.name))

    names = ("pay", "pay-*", "pay-late*", "none-*")
    assert dispatchers.run_due({name: by(name) for name in names}) == 4
    assert sorted(seen) == [
        ("pay", "pay"),
        ("pay-*", "pay-1"),
        ("pay-late*", "pay-late"),
        ("pay-late*", "pay-late-1"),
    ]
    assert set(left(store)) == {"other", 7}


def test_run_due_ends_though_a_handler_makes_its_timer_due_again(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "a", "b")

    def again(delivery: Fired) -> None:
        if delivery.name == "b":
            raise ValueError("at once")
        with delivery.transaction() as session:
            delivery.timers(session).schedule(ALPHA, "a", datetime.now(UTC))

    assert dispatchers.run_due(again, retry=lambda *_: timedelta(0)) == 2
    assert set(left(store)) == {"a", "b"}


def test_a_timer_is_given_up_only_if_retry_says_so(
    store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Standing(PAST)
    schedule(store, "a")

    def fail(_: Fired) -> None:
        raise ValueError("no")

    for expected in ({"a"}, set()):
        assert dispatchers.run_due(fail, clock=clock, retry=Backoff(attempts=2)) == 1
        assert set(left(store)) == expected
        clock.now += timedelta(days=1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert caplog.records[1].__dict__["aion_attempt"] == 2


@pytest.mark.parametrize("bad", ["raises", "negative", "number"])
@pytest.mark.parametrize("backend", ["libsql", "asyncpg"], indirect=True)
def test_a_retry_that_fails_loses_nothing(store: Store, dispatchers: Dispatchers, bad: str) -> None:
    clock = Standing(PAST)
    schedule(store, "a")

    def fail(_: Fired) -> None:
        raise ValueError("no")

    def retry(*_: object) -> Any:
        if bad == "raises":
            raise KeyError(bad)
        return -MINUTE if bad == "negative" else 60

    assert dispatchers.run_due(fail, clock=clock, retry=retry) == 1
    assert PAST < left(store)["a"] <= PAST + timedelta(seconds=1)


def test_a_storm_is_drained_in_order_with_each_timer_fired_once(store: Store, dispatchers: Dispatchers) -> None:
    entries = [TimerEntry(uuid4(), "a", PAST) for _ in range(2000)]
    with store.timers() as timers:
        timers.schedule_many(entries)
    fired: Counter[UUID] = Counter()
    lock = threading.Lock()

    def handle(delivery: Fired) -> None:
        with lock:
            fired[delivery.timer.workflow_id] += 1

    with dispatchers.running(handle, concurrency=4):
        wait_until(lambda: fired.total() >= 2000)
    assert fired == Counter(entry.workflow_id for entry in entries)
    with store.timers() as timers:
        assert timers.next_fire_at() is None


def test_two_dispatchers_share_and_their_effects_are_exactly_once(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, *(f"t{number}" for number in range(60)))

    def handle(delivery: Fired) -> None:
        with delivery.transaction() as session:
            # a second effect of one timer would not be a change
            assert delivery.timers(session).schedule(UUID(int=1), delivery.name, FUTURE, if_exists="keep")

    with dispatchers.running(handle, concurrency=2), dispatchers.running(handle, concurrency=2):
        wait_until(lambda: left(store) == {})
    with store.timers() as timers:
        assert len(timers.list_workflow(UUID(int=1))) == 60


def test_a_slow_handler_leaves_timers_to_others(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, *range(10))
    with in_handler(dispatchers, inside=False, concurrency=1), store.timers() as timers:
        assert len(timers.claim(limit=20, lease=MINUTE)) == 9


def test_timers_behind_a_handler_that_hangs_are_given_back(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, *range(60))
    go = threading.Event()
    seen: list[Any] = []

    def handle(delivery: Fired) -> None:
        seen.append(delivery.name)
        if len(seen) == 10:
            delivery.wait_for(go.is_set)

    with dispatchers.running(handle):
        wait_until(lambda: len(seen) == 10)
        others: list[Any] = []

        def claim() -> bool:
            with store.timers() as timers:
                others.extend(timers.claim(limit=60, lease=MINUTE))
            return len(others) == 50

        wait_until(claim)
        go.set()


# -- time -------------------------------------------------------------------------------------------------------------


def test_no_handler_starts_early_and_none_late(store: Store, dispatchers: Dispatchers) -> None:
    offsets = [200_000, 200_001, 300_999, 420_500, 421_000, 600_000]
    lateness: dict[int, timedelta] = {}
    fired = 0

    def handle(delivery: Fired) -> None:
        nonlocal fired
        with delivery.session() as session:
            since = delivery.timers(session).now() - delivery.timer.fire_at
        lateness[delivery.name] = min(since, lateness.get(delivery.name, since))
        fired += 1

    def one_round() -> bool:
        with store.timers() as timers:
            start, before = timers.now(), fired
            timers.schedule_many(
                TimerEntry(ALPHA, number, start + timedelta(microseconds=offset))
                for number, offset in enumerate(offsets)
            )
        wait_until(lambda: fired == before + len(offsets))
        assert min(lateness.values()) >= timedelta(0)
        # a machine that is busy makes some of them late, some of the time
        return max(lateness.values()) < timedelta(milliseconds=100)

    with dispatchers.running(handle, max_sleep=longest(store)):
        wait_until(one_round)


@pytest.mark.parametrize("backend", HEARING, indirect=True)
def test_a_timer_that_comes_before_all_others_wakes_a_dispatcher(store: Store, dispatchers: Dispatchers) -> None:
    dispatchers.on_engine = counted = Counted()
    schedule(store, "later", at=FUTURE)
    seen: list[Any] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name), max_sleep=DAY):
        counted.wait_for_sleep()
        schedule(store, "soon")
        wait_until(lambda: seen == ["soon"])


def test_a_timer_that_nobody_tells_of_is_late_by_max_sleep_at_most(store: Store, dispatchers: Dispatchers) -> None:
    counted = Counted()

    def deafen(engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def refuse(*_: Any) -> None:
            task = asyncio.current_task() if store.is_async else threading.current_thread()
            if (task.get_name() if isinstance(task, asyncio.Task) else task.name) == "aion-timers-wakeup":
                raise ConnectionRefusedError

        counted(engine)

    dispatchers.on_engine = deafen
    schedule(store, "later", at=FUTURE)
    seen: list[Any] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name), max_sleep=timedelta(milliseconds=500)):
        counted.wait_for_sleep()
        schedule(store, "soon")
        wait_until(lambda: seen == ["soon"])


@pytest.mark.parametrize("what", ["nothing", "later", "locked"])
def test_an_idle_worker_asks_seldom(store: Store, dispatchers: Dispatchers, what: str) -> None:
    dispatchers.on_engine = counted = Counted()
    if what != "nothing":
        schedule(store, "later", at=FUTURE)
    if what == "locked":
        # a foreign hand on an overdue row, whose lease has run out meanwhile
        schedule(store, "a")
        if store.is_sqlite:
            with store.timers() as timers:
                timers.claim(limit=1, lease=MINUTE)
    locked = store.new_session()
    if what == "locked" and not store.is_sqlite:
        locked.execute(text("SELECT * FROM timers FOR UPDATE"))
    # a question after each sleep of a second; where a row is locked, a few every twenty milliseconds
    most = 170 if what == "locked" else 4
    with dispatchers.running(lambda _: None):
        # it has more to ask when it begins
        wait_until(lambda: counted.statements and counted.rate(0.4) <= most)
    locked.close()


def test_stop_ends_a_sleep_at_once_and_comes_before_a_run(store: Store, dispatchers: Dispatchers) -> None:
    dispatchers.on_engine = counted = Counted()
    schedule(store, "later", at=FUTURE)
    with dispatchers.running(lambda _: None, max_sleep=DAY) as running:
        counted.wait_for_sleep()
        running.stop()


# -- leases -----------------------------------------------------------------------------------------------------------


def test_leases_are_extended_while_handlers_run(store: Store, dispatchers: Dispatchers) -> None:
    # it runs out by this clock, and is extended several times a second of the real one
    clock, lease = Standing(PAST), timedelta(milliseconds=900)
    schedule(store, "a", "b")
    begun: list[Any] = []
    seen: list[Any] = []
    go = threading.Event()

    def slow(delivery: Fired) -> None:
        begun.append(delivery.name)
        delivery.wait_for(go.is_set)
        delivery.wait_for(lambda: not delivery.lost)
        seen.append(delivery.name)

    def free_in() -> timedelta:
        with store.timers(clock=clock) as timers:
            return timers.next_wake()  # type: ignore[no-any-return] # the facade of the tests

    with dispatchers.running(slow, concurrency=2, lease=lease, clock=clock):
        try:
            wait_until(lambda: len(begun) == 2)
            for _ in range(2):
                clock.now += lease * 2 / 3
                wait_until(lambda: free_in() == lease)
            with store.timers(clock=clock) as timers:
                assert timers.claim(limit=2, lease=MINUTE) == []
        finally:
            go.set()
        wait_until(lambda: len(seen) == 2)
    assert sorted(begun) == sorted(seen) == ["a", "b"]
    assert left(store) == {}


@pytest.mark.parametrize("how", ["moved", "cancelled"])
def test_a_handler_learns_that_its_lease_is_lost(store: Store, dispatchers: Dispatchers, how: str) -> None:
    schedule(store, "a")
    begun, go = threading.Event(), threading.Event()
    learnt: list[bool] = []

    def handle(delivery: Fired) -> None:
        delivery.extend()
        begun.set()
        delivery.wait_for(go.is_set)
        learnt.append(delivery.lost)
        with pytest.raises(LeaseLost):
            delivery.extend()
        learnt.append(delivery.lost)

    with dispatchers.running(handle, lease=timedelta(days=1)):
        assert begun.wait(LIMIT)
        with store.timers() as timers:
            if how == "moved":
                timers.schedule(ALPHA, "a", FUTURE)
            else:
                timers.cancel(ALPHA, "a")
        go.set()
        wait_until(lambda: len(learnt) == 2)
    assert learnt == [False, True]
    assert left(store) == ({"a": FUTURE} if how == "moved" else {})


@pytest.mark.parametrize("backend", ["libsql", "asyncpg"], indirect=True)
def test_a_handler_that_does_not_ask_learns_it_before_its_lease_runs_out(
    store: Store, dispatchers: Dispatchers
) -> None:
    lease = 6.0
    schedule(store, "a")
    held: list[float] = []

    def handle(delivery: Fired) -> None:
        delivery.extend()
        extended = time.monotonic()
        with delivery.session() as session:
            delivery.timers(session).cancel(ALPHA, "a")
        delivery.wait_for(lambda: delivery.lost)
        held.append(time.monotonic() - extended)

    assert dispatchers.run_due(handle, lease=timedelta(seconds=lease)) == 1
    # told by the extension after two seconds
    assert held[0] < lease - 0.5


@pytest.mark.parametrize("backend", ["libsql", "aiosqlite"], indirect=True)
def test_the_end_of_a_transaction_that_kept_a_file_from_others_leaves_no_lease_run_out(
    store: Store, dispatchers: Dispatchers
) -> None:
    clock, lease = Standing(PAST), timedelta(seconds=18)
    schedule(store, "a", "b")
    go = threading.Event()
    attempts: list[int] = []

    def handle(delivery: Fired) -> None:
        attempts.append(delivery.attempt)
        delivery.wait_for(lambda: len(attempts) == 2)
        if delivery.name == "a":
            # what was extended a moment ago is let alone
            delivery.sleep(3.1)
            with delivery.transaction():
                clock.now += 2 * lease
        else:
            delivery.wait_for(go.is_set)

    with dispatchers.running(handle, concurrency=2, lease=lease, clock=clock):
        try:
            wait_until(lambda: set(left(store)) == {"b"})
            with store.timers(clock=clock) as timers:
                assert timers.claim(limit=1, lease=MINUTE) == []
        finally:
            go.set()
    assert attempts == [1, 1]
    assert left(store) == {}


def test_an_orderly_stop_gives_back_what_no_handler_has_started_on(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, *range(200))
    seen: list[Any] = []
    begun, go = threading.Event(), threading.Event()

    def handle(delivery: Fired) -> None:
        seen.append(delivery.name)
        if len(seen) == 5:
            begun.set()
            delivery.wait_for(go.is_set)

    with dispatchers.running(handle, batch=50) as running:
        assert begun.wait(LIMIT)
        running.dispatcher.stop()
        # what waits is given back before the handler ends
        claims: list[Any] = []

        def claim() -> bool:
            with store.timers() as timers:
                claims.extend(timers.claim(limit=200, lease=MINUTE))
            return len(claims) == 195

        wait_until(claim)
        assert running.thread.is_alive()
        go.set()
    assert len(seen) == 5
    with store.timers() as timers:
        assert len(timers.complete(*claims).done) == 195
    assert left(store) == {}


def test_a_timer_that_was_lost_while_it_waited_is_not_fired(store: Store, dispatchers: Dispatchers) -> None:
    lease = timedelta(milliseconds=500)
    schedule(store, *range(60))
    seen: list[Any] = []

    def handle(delivery: Fired) -> None:
        seen.append(delivery.name)
        if len(seen) == 10:
            with delivery.session() as session:
                delivery.timers(session).cancel_workflow(ALPHA)
            # no lease can have lasted any longer
            delivery.sleep(lease.total_seconds())

    # run_due keeps what waits, and leaves to the next one what it had to give back after a stall
    while left(store):
        dispatchers.run_due(handle, lease=lease)
    assert len(seen) == 10


@pytest.mark.parametrize("backend", ["aiolibsql", "aiosqlite", "psycopg_async", "asyncpg"], indirect=True)
def test_a_task_that_is_cancelled_gives_back_what_it_holds(store: Store, url: URL) -> None:
    schedule(store, "a", "b")

    async def run() -> None:
        begun = asyncio.Event()

        async def hang(delivery: Any) -> None:
            async with delivery.transaction():
                begun.set()
                await asyncio.sleep(60)

        engine: Any = open_engine(url)
        task = asyncio.create_task(AsyncDispatcher(engine, hang).run())
        await asyncio.wait_for(begun.wait(), LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.dispose()

    store.runner.run(run())
    with store.timers() as timers:
        assert [claim.attempt for claim in timers.claim(limit=9, lease=MINUTE)] == [2, 1]


@pytest.mark.parametrize("backend", ["aiolibsql", "aiosqlite", "psycopg_async", "asyncpg"], indirect=True)
def test_a_task_that_is_cancelled_while_its_bell_rings_ends(store: Store, url: URL) -> None:
    schedule(store, "a")

    async def run() -> None:
        async def handle(_: Any) -> None:
            await asyncio.sleep(0.2)  # meanwhile the dispatcher has gone to sleep
            # when the handler's end rings the bell, the task is just about to be cancelled
            asyncio.get_running_loop().call_soon(task.cancel)

        engine: Any = open_engine(url)
        dispatcher = AsyncDispatcher(engine, handle)
        task = asyncio.create_task(dispatcher.run())
        done, _ = await asyncio.wait([task], timeout=LIMIT)
        dispatcher.stop()
        await asyncio.wait([task])
        await engine.dispose()
        assert done
        assert task.cancelled()

    store.runner.run(run())
    assert left(store) == {}


ENDS = {"swallows": None, "fails": ValueError("cut short")}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("backend", ["aiosqlite", "asyncpg"], indirect=True)
def test_a_handler_that_makes_something_else_of_its_cancellation_does_not_keep_the_task(
    store: Store, url: URL, how: str
) -> None:
    schedule(store, "a", "b")
    begun = asyncio.Event()

    async def handle(_: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(LIMIT)
        except asyncio.CancelledError:
            if error := ENDS[how]:
                raise error from None

    async def run() -> None:
        engine: Any = open_engine(url)
        task = asyncio.create_task(AsyncDispatcher(engine, handle).run())
        await asyncio.wait_for(begun.wait(), LIMIT)
        task.cancel()
        # what does not end must not keep the test, too
        ended, _ = await asyncio.wait([task], timeout=LIMIT / 2)
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()
        await asyncio.wait([task])
        await engine.dispose()
        assert ended
        assert task.cancelled()

    store.runner.run(run())
    # settled as any other, and nothing of the rest was begun
    assert set(left(store)) == ({"b"} if how == "swallows" else {"a", "b"})
    with store.timers() as timers:
        assert timers.claim(PAST, limit=1, lease=MINUTE)[0].attempt == 1


@pytest.mark.parametrize("backend", ["aiolibsql", "aiosqlite", "psycopg_async", "asyncpg"], indirect=True)
def test_a_task_is_cancelled_though_a_driver_makes_an_error_of_it(store: Store, url: URL) -> None:
    schedule(store, "later", at=FUTURE)

    async def run() -> None:
        engine: Any = open_engine(url)
        asks = asyncio.Event()

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def fail(_c: Any, _cur: Any, statement: str, *_rest: Any) -> None:
            if not asks.is_set():
                asks.set()
                try:
                    await_only(asyncio.sleep(LIMIT))
                except asyncio.CancelledError:
                    raise OperationalError(statement, {}, RuntimeError("connection lost")) from None

        dispatcher = AsyncDispatcher(engine, {"a": _async})
        task = asyncio.create_task(dispatcher.run())
        await asyncio.wait_for(asks.wait(), LIMIT)
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=LIMIT / 2)
        dispatcher.stop()
        await asyncio.wait([task])
        await engine.dispose()
        assert ended
        assert task.cancelled()

    store.runner.run(run())


@pytest.mark.parametrize("when", ["now", "at its end"])
@pytest.mark.parametrize("backend", ["aiosqlite", "asyncpg"], indirect=True)
def test_a_host_that_cancels_the_task_of_a_handler_ends_that_handler_only(
    store: Store, dispatchers: Dispatchers, when: str
) -> None:
    schedule(store, "a", "b", "c")
    seen: list[tuple[Any, int]] = []

    def handle(delivery: Fired) -> None:
        task = asyncio.current_task()
        assert task is not None
        seen.append((delivery.name, task.cancelling()))
        if delivery.name == "a":
            task.cancel()
            if when == "now":
                delivery.sleep(0)
                raise AssertionError("not cancelled")

    with dispatchers.running(handle, retry=lambda *_: DAY):
        wait_until(lambda: set(left(store)) <= {"a"})
    # what is left of a cancellation would confuse the task groups of those that come later
    assert seen == [("a", 0), ("b", 0), ("c", 0)]
    assert set(left(store)) == ({"a"} if when == "now" else set())


@pytest.mark.parametrize("backend", ["aiosqlite", "asyncpg"], indirect=True)
def test_a_loop_that_ends_gives_back_what_its_dispatcher_holds(
    store: Store, url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    schedule(store, "a")

    async def run() -> None:
        begun = asyncio.Event()

        async def hang(_: Any) -> None:
            begun.set()
            await asyncio.sleep(LIMIT)

        kept.append(asyncio.create_task(AsyncDispatcher(engine, hang).run()))
        await asyncio.wait_for(begun.wait(), LIMIT)

    async def dispose() -> None:
        await engine.dispose()

    engine: Any = open_engine(url, poolclass=NullPool)
    kept: list[asyncio.Task[None]] = []
    asyncio.run(run())
    asyncio.run(dispose())
    assert kept[0].cancelled()
    assert caplog.records == []
    with store.timers() as timers:
        assert [claim.attempt for claim in timers.claim(limit=1, lease=MINUTE)] == [2]


@pytest.mark.parametrize("backend", ["sqlite", "libsql", "psycopg"], indirect=True)
def test_a_signal_stops_a_dispatcher_of_the_main_thread(store: Store) -> None:
    schedule(store, "later", at=FUTURE)
    counted = Counted()
    counted(store.sync_engine)
    dispatcher = Dispatcher(store.engine, _sync, max_sleep=DAY)  # type: ignore[arg-type] # a sync one

    def kill() -> None:
        counted.wait_for_sleep()
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: dispatcher.stop())
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        dispatcher.run()
    finally:
        killer.join()
        signal.signal(signal.SIGUSR1, before)


# -- outages ----------------------------------------------------------------------------------------------------------


def test_a_dispatcher_goes_on_after_an_outage(store: Store, dispatchers: Dispatchers) -> None:
    down = threading.Event()

    def cut(engine: Engine) -> None:
        @event.listens_for(engine, "before_cursor_execute")
        def fail(_c: Any, _cur: Any, statement: str, *_rest: Any) -> None:
            if down.is_set():
                raise OperationalError(statement, {}, RuntimeError("the server is gone"))

    dispatchers.on_engine = cut
    seen: list[Any] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name)):
        schedule(store, "a")
        wait_until(lambda: seen == ["a"])
        down.set()
        schedule(store, "b")
        time.sleep(0.4)
        assert seen == ["a"]
        down.clear()
        wait_until(lambda: seen == ["a", "b"])
        wait_until(lambda: left(store) == {})


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_dispatcher_goes_on_after_its_connections_were_cut(url: URL, store: Store, dispatchers: Dispatchers) -> None:
    admin = create_engine(url.set(drivername="postgresql+psycopg", database="postgres"), isolation_level="AUTOCOMMIT")
    seen: list[Any] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name)):
        schedule(store, "a")
        wait_until(lambda: seen == ["a"])
        with admin.connect() as connection:
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                {"name": url.database},
            )
        other = Store(store.backend, open_engine(url), store.runner)
        schedule(other, "b")
        other.close()
        wait_until(lambda: "b" in seen)
    admin.dispose()
    store.blocking(store.engine).dispose()


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_dispatcher_that_starts_on_a_slow_server_starts(store: Store, dispatchers: Dispatchers) -> None:
    def slow(engine: Engine) -> None:
        initialize = engine.dialect.initialize

        def wait_and_initialize(connection: Any) -> None:
            if dispatchers.is_async:
                await_only(asyncio.sleep(0.3))
            else:
                time.sleep(0.3)
            initialize(connection)

        engine.dialect.initialize = wait_and_initialize  # type: ignore[method-assign] # to have it last

    dispatchers.on_engine = slow
    schedule(store, "a")
    seen: list[Any] = []
    with dispatchers.running({"a": lambda delivery: seen.append(delivery.name)}):
        wait_until(lambda: seen == ["a"])
        wait_until(lambda: left(store) == {})


def test_a_dispatcher_that_starts_during_an_outage_goes_on_after_it(store: Store, dispatchers: Dispatchers) -> None:
    refused: list[int] = []

    def cut(engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def fail(*_: Any) -> None:
            if len(refused) < 2:
                refused.append(1)
                raise OperationalError("", {}, RuntimeError("the server is not there yet"))

    dispatchers.on_engine = cut
    schedule(store, "a")
    seen: list[Any] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name)):
        wait_until(lambda: seen == ["a"])
    assert len(refused) == 2


def test_a_stop_during_an_outage_ends_when_nothing_is_held(
    store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture
) -> None:
    schedule(store, "later", at=FUTURE)

    def cut(engine: Engine) -> None:
        @event.listens_for(engine, "before_cursor_execute")
        def fail(_c: Any, _cur: Any, statement: str, *_rest: Any) -> None:
            if down.is_set():
                raise OperationalError(statement, {}, RuntimeError("the server is gone"))

    down = threading.Event()
    dispatchers.on_engine = cut
    with dispatchers.running(lambda _: None, max_sleep=timedelta(milliseconds=50)) as running:
        down.set()
        wait_until(lambda: "does not answer" in caplog.text)
        running.stop()


def test_an_engine_that_nobody_has_used_yet_serves(store: Store, dispatchers: Dispatchers) -> None:
    def slow(engine: Engine) -> None:
        # the first connection of an engine asks the database what it is, and a second one must not come before that
        initialize = engine.dialect.initialize

        def take_time(connection: Any) -> None:
            time.sleep(0.2)
            initialize(connection)

        engine.dialect.initialize = take_time  # type: ignore[method-assign] # of this engine's own dialect

    dispatchers.on_engine = slow
    schedule(store, "a")
    seen: list[Any] = []
    with dispatchers.running({"a": lambda delivery: seen.append(delivery.name)}):
        wait_until(lambda: seen == ["a"])


def test_a_table_that_is_gone_ends_the_run_with_the_cure(store: Store, dispatchers: Dispatchers) -> None:
    store.sql("DROP TABLE timers")
    for handlers in (lambda _: None, {"a": lambda _: None}):
        with pytest.raises(NotMigratedError):
            dispatchers.run_due(handlers)
        with pytest.raises(NotMigratedError), dispatchers.running(handlers) as running:
            running.thread.join(LIMIT)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
def test_one_handler_for_everything_is_refused_on_a_table_of_the_other_program(
    store: Store, dispatchers: Dispatchers
) -> None:
    columns = "workflow_id TEXT NOT NULL, timer_id TEXT NOT NULL, fire_at TEXT NOT NULL, lease_token TEXT,"
    store.sql("DROP TABLE timers")
    store.sql(
        f"CREATE TABLE timers ({columns} lease_until TEXT, attempts INTEGER NOT NULL DEFAULT 0,"
        " PRIMARY KEY (workflow_id, timer_id))"
    )
    schedule(store, "a", "theirs")
    seen: list[Any] = []
    with pytest.raises(UnsupportedBindError, match="mapping"):
        dispatchers.run_due(seen.append)
    assert dispatchers.run_due({"a": seen.append}) == 1
    assert set(left(store)) == {"theirs"}


async def _async(_: Any) -> None: ...


def _sync(_: Any) -> None: ...


class _AsyncObject:
    async def __call__(self, _: Any) -> None: ...


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no concurrency": ({"concurrency": 0}, "concurrency"),
    "concurrency in halves": ({"concurrency": 1.5}, "concurrency"),
    "concurrency that is a truth": ({"concurrency": True}, "concurrency"),
    "more handlers than connections": ({"concurrency": 14}, "pool_size=16"),
    "empty batch": ({"batch": 0}, "batch"),
    "no lease": ({"lease": timedelta(0)}, "lease"),
    "negative lease": ({"lease": -MINUTE}, "lease"),
    "lease in seconds": ({"lease": 30}, "lease"),
    "lease too short to be extended": ({"lease": timedelta(milliseconds=100)}, "too short"),
    "endless lease": ({"lease": timedelta.max}, "lease"),
    "no sleep": ({"max_sleep": timedelta(0)}, "max_sleep"),
    "sleep in seconds": ({"max_sleep": 1}, "max_sleep"),
    "retry that cannot be called": ({"retry": 3}, "retry"),
    "clock that cannot be called": ({"clock": PAST}, "clock"),
}


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
@pytest.mark.parametrize("backend", ["libsql", "asyncpg"], indirect=True)
def test_settings_that_cannot_work_are_refused_with_the_cure(
    store: Store, dispatchers: Dispatchers, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidInputError, match=match):
        dispatchers.make(store.engine, lambda _: None, **options)


@pytest.mark.parametrize("handlers", [None, {}, {"a": None}, {"": _sync}, {"a": _async}, _async, _AsyncObject(), 7])
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_handlers_that_cannot_be_called_are_refused(store: Store, handlers: Any) -> None:
    with pytest.raises(InvalidInputError):
        Dispatcher(store.engine, handlers)


@pytest.mark.parametrize("handlers", [None, {}, {"a": _sync}, _sync, partial(_sync), object()])
@pytest.mark.parametrize("backend", ["aiosqlite"], indirect=True)
def test_handlers_that_cannot_be_awaited_are_refused(store: Store, handlers: Any) -> None:
    with pytest.raises(InvalidInputError):
        AsyncDispatcher(store.engine, handlers)  # type: ignore[arg-type] # the facade of the tests types it as sync


@pytest.mark.parametrize("backend", ["aiosqlite"], indirect=True)
def test_handlers_that_can_be_awaited_are_taken(store: Store) -> None:
    for handler in (_async, partial(_async), _AsyncObject()):
        AsyncDispatcher(store.engine, handler)  # type: ignore[arg-type] # the facade of the tests types it as sync


def test_sessions_that_lead_to_no_engine_are_refused() -> None:
    engine, async_engine = create_engine("sqlite:///x.db"), create_async_engine("sqlite+aiosqlite:///x.db")
    for sessions in (sessionmaker(), engine.connect, async_engine, async_sessionmaker(async_engine), None):
        with pytest.raises(InvalidInputError, match="sessions"):
            Dispatcher(sessions, _sync)  # type: ignore[arg-type] # what is refused
    for wrong in (async_sessionmaker(), engine, sessionmaker(engine), None):
        with pytest.raises(InvalidInputError, match="sessions"):
            AsyncDispatcher(wrong, _async)  # type: ignore[arg-type] # what is refused
    with pytest.raises(InvalidInputError, match="memory"):
        Dispatcher(create_engine("sqlite://"), _sync)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_plain_function_that_gives_a_coroutine_is_a_failure(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    schedule(store, "a")
    Dispatcher(store.engine, lambda delivery: _async(delivery) if delivery else None).run_due()
    assert "AsyncDispatcher" in caplog.text
    assert set(left(store)) == {"a"}


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_dispatcher_runs_once_at_a_time_and_again_later(store: Store) -> None:
    schedule(store, "a")
    errors: list[BaseException] = []

    def handle(_: Any) -> None:
        try:
            dispatcher.run_due()
        except UnsupportedBindError as error:
            errors.append(error)

    dispatcher = Dispatcher(store.engine, handle)
    assert dispatcher.run_due() == 1
    assert len(errors) == 1
    dispatcher.stop()
    dispatcher.run()  # which was to stop
    assert dispatcher.run_due() == 0
