"""A handler and another transaction meet at one timer: who waits, who has his way, who is told, on every backend."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, Engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from aion_timers import LeaseLost, TimerEntry
from tests.conftest import open_engine
from tests.contract.test_concurrency import in_threads
from tests.dispatching import Dispatchers, Fired, Standing, wait_until
from tests.meeting import (
    ALPHA,
    FILES,
    FUTURE,
    MINUTE,
    PAST,
    POLICIES,
    POSTGRES,
    Elsewhere,
    assert_waits,
    elsewhere,
    fire_until_killed,
    in_handler,
    left,
    schedule,
)
from tests.store import Store

LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]
DAY = timedelta(days=1)
SHORT = timedelta(milliseconds=300)


@pytest.fixture
def dispatchers(backend: str, url: URL) -> Dispatchers:
    """Makes dispatchers on the database of the store."""
    return Dispatchers(backend, url)


@pytest.fixture
def other(backend: str, url: URL) -> Iterator[Elsewhere]:
    """Where others do their work on the database of the store."""
    with elsewhere(backend, url) as made:
        yield made


def lost(caplog: pytest.LogCaptureFixture) -> list[int]:
    """How many timers the log says were lost, each time that it says so."""
    return [record.__dict__["aion_lost"] for record in caplog.records if hasattr(record, "aion_lost")]


# -- another schedules, cancels or claims -----------------------------------------------------------------------------


@pytest.mark.parametrize("if_exists", POLICIES)
def test_a_batch_that_names_a_timer_in_a_transaction_waits_and_has_its_way(
    store: Store, other: Elsewhere, dispatchers: Dispatchers, if_exists: Any
) -> None:
    schedule(store, "a")
    entries = [TimerEntry(ALPHA, name, FUTURE) for name in ("b", "a")]
    with in_handler(dispatchers, inside=True) as (running, go):
        done = other(lambda timers: timers.schedule_many(entries, if_exists=if_exists))
        assert_waits(store, done)
        go.set()
        assert done.result(10) == 2
        running.stop()
    assert left(store) == {"a": FUTURE, "b": FUTURE}


@pytest.mark.parametrize("if_exists", POLICIES)
def test_a_batch_that_names_a_timer_without_a_transaction_has_its_way_at_once(
    store: Store, dispatchers: Dispatchers, if_exists: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    with in_handler(dispatchers, inside=False) as (running, go):
        with store.timers() as timers:
            entries = [TimerEntry(ALPHA, name, FUTURE) for name in ("b", "a")]
            assert timers.schedule_many(entries, if_exists=if_exists) == 2
        go.set()
        running.stop()
    assert left(store) == {"a": FUTURE, "b": FUTURE}
    assert lost(caplog) == [1]


@pytest.mark.parametrize("inside", [True, False])
def test_who_cancels_the_workflow_waits_for_a_transaction_or_cancels_at_once(
    store: Store,
    other: Elsewhere,
    dispatchers: Dispatchers,
    inside: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    schedule(store, "b", "c", at=FUTURE)
    with in_handler(dispatchers, inside=inside) as (running, go):
        done = other(lambda timers: timers.cancel_workflow(ALPHA))
        if inside:
            assert_waits(store, done)
            go.set()
        assert done.result(10) == (2 if inside else 3)
        go.set()
        running.stop()
    assert left(store) == {}
    assert lost(caplog) == ([] if inside else [1])


@pytest.mark.parametrize("inside", [True, False])
def test_who_cancels_a_timer_that_its_handler_has_scheduled_again_cancels_it(
    store: Store, other: Elsewhere, dispatchers: Dispatchers, inside: bool
) -> None:
    def again(delivery: Fired, session: Any) -> None:
        if inside:
            assert delivery.timers(session).schedule(ALPHA, "a", FUTURE)
            return
        with delivery.session() as own:
            assert delivery.timers(own).schedule(ALPHA, "a", FUTURE)

    schedule(store, "a")
    with in_handler(dispatchers, inside=inside, first=again) as (running, go):
        done = other(lambda timers: timers.cancel(ALPHA, "a"))
        if inside:
            assert_waits(store, done)
            go.set()
        assert done.result(10) is True
        go.set()
        running.stop()
    assert left(store) == {}


@pytest.mark.parametrize(("if_exists", "moves"), [("replace", True), ("keep", False), ("earliest", True)])
def test_who_schedules_a_timer_that_its_handler_has_scheduled_again_meets_a_timer_that_nobody_holds(
    store: Store, other: Elsewhere, dispatchers: Dispatchers, if_exists: Any, moves: bool
) -> None:
    def again(delivery: Fired, session: Any) -> None:
        assert delivery.timers(session).schedule(ALPHA, "a", FUTURE)

    schedule(store, "a")
    with in_handler(dispatchers, inside=True, first=again) as (running, go):
        done = other(lambda timers: timers.schedule(ALPHA, "a", FUTURE - DAY, if_exists=if_exists))
        assert_waits(store, done)
        go.set()
        assert done.result(10) is moves
        running.stop()
    assert left(store) == {"a": FUTURE - DAY if moves else FUTURE}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_a_handler_that_waits_for_who_moves_or_cancels_its_timer_does_no_work(
    store: Store, dispatchers: Dispatchers, inside: bool, moved: bool
) -> None:
    reached: list[str] = []
    session = store.new_session()
    timers = store.repository(session)
    changed, committed = threading.Event(), threading.Event()

    def handle(delivery: Fired) -> None:
        ready.set()
        delivery.wait_for(changed.is_set)
        if inside:
            with delivery.transaction():
                reached.append("the work")
        else:
            delivery.wait_for(committed.is_set)

    ready = threading.Event()
    schedule(store, "a")
    with dispatchers.running(handle) as running:
        assert ready.wait(10)
        assert timers.schedule(ALPHA, "a", FUTURE) if moved else timers.cancel(ALPHA, "a")
        changed.set()
        time.sleep(0.1)  # long enough to come to wait
        session.commit()
        committed.set()
        running.stop()
    session.close()
    assert reached == []
    assert left(store) == ({"a": FUTURE} if moved else {})


@pytest.mark.parametrize("moved", [True, False])
def test_a_handler_that_asks_learns_at_once_that_others_moved_or_cancelled_its_timer(
    store: Store, dispatchers: Dispatchers, moved: bool
) -> None:
    schedule(store, "a")
    learnt: list[Any] = []
    begun, changed = threading.Event(), threading.Event()

    def handle(delivery: Fired) -> None:
        learnt.append(delivery.lost)
        begun.set()
        delivery.wait_for(changed.is_set)
        # its lease would go on for a minute
        learnt.append(delivery.lost)
        for ask in (delivery.extend, delivery.transaction().__enter__):
            try:
                ask()
            except LeaseLost as error:
                learnt.append(error.claim == delivery.claim)
        learnt.append(delivery.lost)

    with dispatchers.running(handle, lease=MINUTE) as running:
        assert begun.wait(10)
        with store.timers() as timers:
            assert timers.schedule(ALPHA, "a", FUTURE) if moved else timers.cancel(ALPHA, "a")
        changed.set()
        running.stop()
    assert learnt == [False, False, True, True, True]
    assert left(store) == ({"a": FUTURE} if moved else {})


@pytest.mark.parametrize("inside", [True, False])
def test_a_timer_whose_lease_ran_out_is_fired_twice_and_settled_by_the_second(
    store: Store, dispatchers: Dispatchers, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    attempts: list[int] = []
    effects: list[int] = []
    go = {1: threading.Event(), 2: threading.Event()}

    def handle(delivery: Fired) -> None:
        attempts.append(delivery.attempt)
        delivery.wait_for(go[delivery.attempt].is_set, 30)
        if inside:
            with delivery.transaction():
                effects.append(delivery.attempt)

    now = Standing(PAST + MINUTE)
    try:
        with dispatchers.running(handle, clock=now) as first:
            wait_until(lambda: attempts == [1])
            with dispatchers.running(handle, clock=lambda: now() + timedelta(hours=1)) as second:
                wait_until(lambda: attempts == [1, 2])
                go[1].set()
                first.stop()
                assert left(store) == {"a": PAST}
                go[2].set()
                second.stop()
    finally:
        for event_ in go.values():
            event_.set()
    assert effects == ([2] if inside else [])
    assert lost(caplog) == ([] if inside else [1])
    assert left(store) == {}


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("if_exists", ["keep", "earliest", "latest"])
def test_whether_a_timer_is_held_is_asked_after_the_wait(store: Store, other: Elsewhere, if_exists: Any) -> None:
    """A lease that runs out while somebody waits for the row holds nothing any more."""
    schedule(store, "a")
    with store.timers() as timers:
        (claim,) = timers.claim(limit=1, lease=SHORT)
    claimed = time.monotonic()
    session = store.new_session()
    store.repository(session).confirm(claim)
    done = other(lambda timers: timers.schedule(ALPHA, "a", PAST, if_exists=if_exists))
    assert_waits(store, done)
    time.sleep(max(0.0, claimed + SHORT.total_seconds() + 0.05 - time.monotonic()))
    session.rollback()
    session.close()
    assert done.result(10) is False
    with store.timers() as timers:
        assert [found.attempt for found in timers.claim(limit=1, lease=MINUTE)] == [2]


# -- a handler does what it likes to its own timer --------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("if_exists", POLICIES)
def test_a_handler_that_schedules_its_timer_earlier_than_it_was_has_its_way(
    store: Store, dispatchers: Dispatchers, inside: bool, if_exists: Any
) -> None:
    schedule(store, "a")
    seen: list[Any] = []

    def again(delivery: Fired) -> None:
        seen.append(delivery.timer.fire_at)
        if len(seen) > 1:
            return
        with delivery.transaction() if inside else delivery.session() as session:
            batch = [TimerEntry(ALPHA, "a", PAST - DAY)]
            assert delivery.timers(session).schedule_many(batch, if_exists=if_exists) == 1

    assert dispatchers.run_due(again) == 2  # with one handler at a time the second is another claim
    assert seen == [PAST, PAST - DAY]
    assert left(store) == {}


def test_a_handler_may_cancel_its_timer_and_schedule_it_anew(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "a")

    def anew(delivery: Fired) -> None:
        with delivery.transaction() as session:
            timers = delivery.timers(session)
            assert timers.cancel(ALPHA, "a") is True
            assert timers.schedule(ALPHA, "a", FUTURE, if_exists="keep") is True

    assert dispatchers.run_due(anew) == 1
    assert left(store) == {"a": FUTURE}
    with store.timers() as timers:
        assert [claim.attempt for claim in timers.claim(FUTURE, limit=9, lease=MINUTE)] == [1]


def test_an_error_that_a_handler_gets_over_rolls_back_its_transaction_alone(
    store: Store, dispatchers: Dispatchers
) -> None:
    schedule(store, "a")

    def handle(delivery: Fired) -> None:
        for number in range(2):
            try:
                with delivery.transaction() as session:
                    delivery.timers(session).schedule(ALPHA, f"effect {number}", FUTURE)
                    assert number == 1, "no"
            except AssertionError:
                assert set(left_of(delivery)) == {"a"}

    def left_of(delivery: Fired) -> list[Any]:
        with delivery.session() as session:
            return [timer.timer_id.value for timer in delivery.timers(session).list_workflow(ALPHA)]

    assert dispatchers.run_due(handle) == 1
    assert left(store) == {"effect 1": FUTURE}


def make_orders(store: Store) -> None:
    """Make a table that refuses, but only at the commit, the order of an unknown customer."""
    store.sql("CREATE TABLE customers (id INTEGER PRIMARY KEY)")
    store.sql(
        "CREATE TABLE orders (id INTEGER PRIMARY KEY,"
        " customer INTEGER REFERENCES customers (id) DEFERRABLE INITIALLY DEFERRED)"
    )


def check_references(engine: Engine) -> None:
    """Let SQLite check foreign keys, which it does only if it is told to."""
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def turn_on(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


def test_a_commit_that_fails_holds_no_lock(store: Store, other: Elsewhere) -> None:
    make_orders(store)
    check_references(store.sync_engine)
    store.blocking(store.engine).dispose()
    session = store.new_session()
    store.repository(session).schedule(ALPHA, "a", PAST)
    session.execute(text("INSERT INTO orders VALUES (1, 1)"))
    with pytest.raises(IntegrityError):
        session.commit()
    assert other(lambda timers: timers.schedule(ALPHA, "b", PAST)).result(10) is True
    session.rollback()
    store.repository(session).schedule(ALPHA, "c", PAST)
    session.commit()
    session.close()
    assert set(left(store)) == {"b", "c"}


def test_a_commit_that_fails_leaves_the_timer_to_be_tried_again(
    store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture
) -> None:
    make_orders(store)
    dispatchers.on_engine = check_references
    schedule(store, "a")
    errors: list[type[BaseException]] = []

    def handle(delivery: Fired) -> None:
        try:
            with delivery.transaction() as session:
                session.execute(text("INSERT INTO orders VALUES (1, 1)"))
                delivery.timers(session).schedule(ALPHA, "effect", FUTURE)
        except IntegrityError as error:
            errors.append(type(error))
            raise

    clock = Standing(PAST)
    options = {"clock": clock, "retry": lambda *_: MINUTE}
    assert dispatchers.run_due(handle, **options) == 1
    assert left(store) == {"a": PAST + MINUTE}
    assert errors == [IntegrityError]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    store.sql("INSERT INTO customers VALUES (1)")
    clock.now += MINUTE
    assert dispatchers.run_due(handle, **options) == 1
    assert left(store) == {"effect": FUTURE}
    assert store.sql("SELECT customer FROM orders") == [(1,)]


@pytest.mark.parametrize("backend", ["libsql", "sqlite"], indirect=True)
def test_a_timer_that_moves_between_being_read_and_being_leased_is_left(backend: str, url: URL, store: Store) -> None:
    schedule(store, "moved", "stays")
    another = Store(backend, open_engine(url), store.runner)
    moved: list[bool] = []

    def move(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("UPDATE timers SET lease_token") and not moved:
            with another.timers() as timers:
                moved.append(timers.schedule(ALPHA, "moved", FUTURE))

    event.listen(store.sync_engine, "before_cursor_execute", move)
    with store.connection(isolation_level="AUTOCOMMIT") as connection:
        claims = store.repository(connection).claim(limit=10, lease=MINUTE)
    another.close()
    assert moved == [True]
    assert [claim.timer.timer_id.value for claim in claims] == ["stays"]
    assert left(store) == {"moved": FUTURE, "stays": PAST}
    with store.timers() as timers:
        assert [claim.attempt for claim in timers.claim(FUTURE, limit=1, lease=MINUTE, names=["moved"])] == [1]


# -- a process dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_killed_process_had_is_rolled_back_and_fired_again_after_its_lease(
    backend: str, url: URL, store: Store, dispatchers: Dispatchers, inside: bool
) -> None:
    schedule(store, "a")
    lease = timedelta(seconds=1)
    # forked from a server that has imported everything and opened nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.meeting"])
    receiver, sender = context.Pipe(duplex=False)
    plain = url.render_as_string(hide_password=False)
    victim = context.Process(target=fire_until_killed, args=(backend, plain, inside, lease, sender))
    victim.start()
    sender.close()
    try:
        assert receiver.poll(30)
        attempt = receiver.recv()
    finally:
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        receiver.close()
    assert victim.exitcode == -signal.SIGKILL
    assert left(store) == {"a": PAST}

    seen: list[tuple[int, bool]] = []

    def handle(delivery: Fired) -> None:
        with delivery.transaction() as session:
            is_first = delivery.timers(session).schedule(ALPHA, "effect", FUTURE, if_exists="keep")
            seen.append((delivery.attempt, is_first))

    # asleep for a minute, unless the end of the lease is awaited
    with dispatchers.running(handle, max_sleep=MINUTE):
        wait_until(lambda: left(store) == {"effect": FUTURE}, 20)
    assert seen == [(attempt + 1, True)]


# -- the other program ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FILES, indirect=True)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_timer_that_the_other_program_moves_is_a_new_one_that_nobody_has_attempted(
    store: Store, dispatchers: Dispatchers, inside: bool, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    instant = PAST if same else FUTURE
    stored = f"{instant:%Y-%m-%dT%H:%M:%S}.000000000Z"

    def move() -> None:
        engine = open_engine(dispatchers.url.set(drivername="sqlite+libsql" if "libsql" in store.backend else "sqlite"))
        with engine.begin() as connection:
            # as the other program writes it
            connection.exec_driver_sql(
                "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (?, ?, ?)"
                " ON CONFLICT(workflow_id, timer_id) DO UPDATE SET fire_at = excluded.fire_at",
                (f'"{ALPHA}"', '{"Named":"a"}', stored),
            )
        engine.dispose()

    with in_handler(dispatchers, inside=inside) as (running, go), ThreadPoolExecutor(1) as pool:
        moved = pool.submit(move)
        if inside:
            assert_waits(store, moved)
        else:
            moved.result(10)
        running.dispatcher.stop()  # so that it is not fired again
        go.set()
        moved.result(10)
    assert left(store) == {"a": instant}
    assert lost(caplog) == ([] if inside else [1])
    with store.timers() as timers:
        assert [claim.attempt for claim in timers.claim(FUTURE, limit=9, lease=MINUTE)] == [1]


# -- levels of isolation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("what", [*POLICIES, "cancel", "cancel_workflow"])
def test_what_waits_at_a_higher_level_is_refused_and_has_its_way_when_it_tries_again(
    store: Store, dispatchers: Dispatchers, level: str, what: Any
) -> None:
    schedule(store, "a")

    def work(timers: Any) -> Any:
        if what in POLICIES:
            return timers.schedule(ALPHA, "a", FUTURE, if_exists=what)
        return timers.cancel(ALPHA, "a") if what == "cancel" else timers.cancel_workflow(ALPHA)

    with (
        elsewhere(store.backend, dispatchers.url, isolation_level=level) as other,
        in_handler(dispatchers, inside=True) as (running, go),
    ):
        done = other(work)
        assert_waits(store, done)
        go.set()
        with pytest.raises(DBAPIError) as caught:
            done.result(10)
        assert getattr(caught.value.orig, "sqlstate", None) == "40001"
        running.stop()
        assert other(work).result(10) == (what in POLICIES)
    assert left(store) == ({"a": FUTURE} if what in POLICIES else {})


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_who_claims_at_a_higher_level_passes_over_what_a_transaction_holds(
    store: Store, dispatchers: Dispatchers, level: str
) -> None:
    schedule(store, "a", "b")
    clock = Standing(PAST)
    with (
        elsewhere(store.backend, dispatchers.url, isolation_level=level) as other,
        in_handler(dispatchers, inside=True, clock=clock),
    ):
        claims = other(lambda timers: timers.claim(limit=9, lease=MINUTE), clock=lambda: PAST + DAY).result(10)
        assert [claim.timer.timer_id.value for claim in claims] == ["b"]


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_at_a_higher_level_a_handler_that_waits_for_who_moves_its_timer_finds_it_lost(
    backend: str, url: URL, store: Store, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    schedule(store, "a")
    session = store.new_session()
    reached: list[str] = []
    ready, changed = threading.Event(), threading.Event()

    def handle(delivery: Fired) -> None:
        ready.set()
        delivery.wait_for(changed.is_set)
        with delivery.transaction():
            reached.append("the work")

    with Dispatchers(backend, url, isolation_level=level).running(handle) as running:
        assert ready.wait(10)
        assert store.repository(session).schedule(ALPHA, "a", FUTURE)
        changed.set()
        wait_until(
            lambda: store.sql(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )
        session.commit()
        running.stop()
    session.close()
    assert reached == []
    assert left(store) == {"a": FUTURE}
    assert "lease is lost" in caplog.text
    assert "failed" not in caplog.text


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_a_conflict_in_a_handlers_own_work_is_tried_again(backend: str, url: URL, store: Store, level: str) -> None:
    store.sql("CREATE TABLE orders (id integer PRIMARY KEY, reminded integer)")
    store.sql("INSERT INTO orders VALUES (1, 0)")
    schedule(store, "a")
    attempts: list[int] = []

    def handle(delivery: Fired) -> None:
        attempts.append(delivery.attempt)
        with delivery.transaction() as session:
            if delivery.attempt == 1:
                with delivery.session() as other:
                    other.execute(text("UPDATE orders SET reminded = reminded + 1"))
            session.execute(text("UPDATE orders SET reminded = reminded + 10"))

    with Dispatchers(backend, url, isolation_level=level).running(handle, retry=lambda *_: timedelta(0)):
        wait_until(lambda: left(store) == {})
    assert attempts == [1, 2]
    assert store.sql("SELECT reminded FROM orders") == [(11,)]


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_a_dispatchers_own_transactions_run_at_read_committed(backend: str, url: URL, store: Store, level: str) -> None:
    store.sql("CREATE TABLE seen (timer_id text, what text, level text)")
    store.sql(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN"
        " INSERT INTO seen VALUES (OLD.timer_id, TG_OP, current_setting(''transaction_isolation'')); RETURN OLD; END'"
    )
    store.sql("CREATE TRIGGER note AFTER UPDATE OR DELETE ON timers FOR EACH ROW EXECUTE FUNCTION note()")
    schedule(store, "inside", "outside", "fails")

    def handle(delivery: Fired) -> None:
        match delivery.name:
            case "inside":
                with delivery.transaction():
                    pass
            case "outside":
                delivery.extend()
            case _:
                raise ValueError("no")

    assert Dispatchers(backend, url, isolation_level=level).run_due(handle) == 3
    levels = {(timer_id.split('"')[3], what): found for timer_id, what, found in store.sql("SELECT * FROM seen")}
    assert levels.pop(("inside", "DELETE")) == level.lower()
    assert set(levels) == {("inside", "UPDATE"), ("outside", "UPDATE"), ("outside", "DELETE"), ("fails", "UPDATE")}
    assert set(levels.values()) == {"read committed"}


def test_where_the_engine_begins_no_transaction_a_delivery_has_one(
    store: Store, dispatchers: Dispatchers, other: Elsewhere
) -> None:
    schedule(store, "a")
    clock = Standing(PAST)
    waited: list[bool] = []

    def handle(delivery: Fired) -> None:
        with delivery.transaction() as session:
            delivery.timers(session).schedule(ALPHA, "effect", FUTURE)
            if delivery.attempt == 1:
                raise ValueError("no")
            cancelled.append(other(lambda timers: timers.cancel(ALPHA, "a")))
            delivery.sleep(0.1)
            waited.append(not cancelled[0].done())

    cancelled: list[Any] = []
    dispatchers.engine_options["isolation_level"] = "AUTOCOMMIT"
    options = {"clock": clock, "retry": lambda *_: MINUTE}
    assert dispatchers.run_due(handle, **options) == 1
    assert left(store) == {"a": PAST + MINUTE}
    clock.now += MINUTE
    assert dispatchers.run_due(handle, **options) == 1
    assert left(store) == {"effect": FUTURE}
    assert cancelled[0].result(10) is False
    assert waited == [True]


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_batches_over_the_same_rows_never_deadlock_and_claim_no_more_than_asked(backend: str, url: URL) -> None:
    workflows = [UUID(int=number) for number in range(3)]
    until = time.monotonic() + 2

    def work(store: Store, number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - a load, no secret
        entries = [TimerEntry(workflow, name, PAST) for workflow in workflows for name in range(20)]
        while time.monotonic() < until:
            chance.shuffle(entries)
            with store.timers() as timers:
                timers.schedule_many(entries[:40])
            with store.timers() as timers:
                claims = timers.claim(limit=25, lease=MINUTE)
            assert len(claims) <= 25
            assert [claim.timer for claim in claims] == sorted(claim.timer for claim in claims)
            chance.shuffle(claims)
            with store.timers() as timers:
                match chance.randrange(4):
                    case 0:
                        timers.complete(*claims)
                    case 1:
                        timers.release(*claims, retry_at=PAST)
                    case 2:
                        timers.extend(*claims, lease=MINUTE)
                    case _:
                        timers.cancel_workflow(chance.choice(workflows))

    in_threads(backend, url, work)


@pytest.mark.parametrize("backend", FILES, indirect=True)
def test_the_end_of_a_transaction_extends_other_leases_before_anybody_else_can_claim(
    store: Store, other: Elsewhere, dispatchers: Dispatchers
) -> None:
    """On a file nobody can extend a lease while a handler's transaction has the only write lock."""
    clock = Standing(PAST)
    schedule(store, "long", "other")
    started: list[str] = []
    claimed = threading.Event()
    rivals: list[Any] = []

    def handle(delivery: Fired) -> None:
        started.append(delivery.name)
        delivery.wait_for(lambda: len(started) == 2)
        if delivery.name == "other":
            delivery.wait_for(claimed.is_set, 30)
            return
        with delivery.transaction():
            clock.now += timedelta(hours=1)  # all leases have run out
            rivals.extend(other(lambda timers: timers.claim(limit=9, lease=MINUTE), clock=clock) for _ in range(3))
            # a lease that has just begun is not extended
            delivery.sleep(0.7)

    with dispatchers.running(handle, concurrency=2, lease=timedelta(seconds=3), clock=clock):
        wait_until(lambda: len(rivals) == 3)
        found = [claim for rival in rivals for claim in rival.result(30)]
        claimed.set()
    assert found == []
    assert left(store) == {}
