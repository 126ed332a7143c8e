"""When a dispatcher asks the database, how often, and what it keeps alive meanwhile, on every backend."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import URL, Engine, event, select, text
from sqlalchemy.orm import Session

from aion_timers import Claim, Timer, TimerEntry, TimerRepository
from tests.contract.test_plans import executed
from tests.dispatching import Dispatchers, Fired, Standing, wait_until
from tests.meeting import ALPHA, FILES, FUTURE, MINUTE, PAST, POSTGRES, left, schedule
from tests.store import HEARING, Store

BETA = UUID("00000000-0000-4000-8000-00000000000b")
SHORT = timedelta(milliseconds=300)


@pytest.fixture
def dispatchers(backend: str, url: URL) -> Dispatchers:
    """Makes dispatchers on the database of the store."""
    return Dispatchers(backend, url)


class Counter:
    """Counts what a dispatcher's engine does."""

    def __init__(self, dispatchers: Dispatchers) -> None:
        self.statements = 0
        self.commits = 0
        self.committed = 0
        """How many statements the last transaction had that was committed."""
        self._begun = 0
        dispatchers.on_engine = self._listen

    def _listen(self, engine: Engine) -> None:
        event.listen(engine, "before_cursor_execute", self._statement)
        event.listen(engine, "begin", self._begin)
        event.listen(engine, "commit", self._commit)

    def _statement(self, *_: Any) -> None:
        self.statements += 1

    def _begin(self, _: Any) -> None:
        self._begun = self.statements

    def _commit(self, _: Any) -> None:
        self.commits += 1
        self.committed = self.statements - self._begun


# -- how often it asks ------------------------------------------------------------------------------------------------


def test_batches_that_come_back_full_are_followed_by_another_at_once(store: Store, dispatchers: Dispatchers) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(uuid4(), "a", PAST) for _ in range(300))
    seen: list[str] = []
    # a sleep in between would be a minute
    with dispatchers.running(lambda delivery: seen.append(delivery.name), batch=10, max_sleep=MINUTE):
        wait_until(lambda: len(seen) == 300, 30)


def test_acknowledgements_are_collected(store: Store, dispatchers: Dispatchers) -> None:
    many = 600
    schedule(store, *range(many))
    counter = Counter(dispatchers)
    assert dispatchers.run_due(lambda _: None) == many
    assert left(store) == {}
    # claims and acknowledgements together; one at a time there would be more than timers
    assert counter.commits < many / 2


def test_handlers_start_before_the_next_instant_is_asked_for(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "later", at=FUTURE)
    counter = Counter(dispatchers)
    before: list[int] = []
    with dispatchers.running(lambda _: before.append(counter.committed)):
        for number in range(1, 6):
            schedule(store, f"soon {number}", at=datetime.now(UTC) + timedelta(milliseconds=100))
            wait_until(lambda number=number: len(before) == number)  # type: ignore[misc] # bound at once
    # the first one shows how quick the handler is; then a claim, which is one statement, or three on the SQLite family,
    # has room for more than is due; now and then the clock is looked at, too, or a question was quicker than a thread
    assert (3 if store.is_sqlite else 1) in before[1:]


# on a file the dispatcher hears of its own commits, too, and asks once more
@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_question_goes_with_what_is_settled(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "later", at=FUTURE)
    counter = Counter(dispatchers)
    seen: list[str] = []
    commits = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name)):
        for number in range(1, 6):
            before = counter.commits
            schedule(store, f"soon {number}", at=datetime.now(UTC) + timedelta(milliseconds=100))
            wait_until(lambda number=number: len(left(store)) == 1 and len(seen) == number)  # type: ignore[misc] # bound at once
            time.sleep(0.05)  # and it sleeps again
            commits.append(counter.commits - before)
    # when it is heard of, to claim it, and to settle it
    assert 3 in commits


def test_a_timer_that_comes_while_another_is_handled_is_not_slept_over(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "quick")
    seen: list[str] = []
    go = threading.Event()

    def handle(delivery: Fired) -> None:
        seen.append(delivery.name)
        if delivery.name == "slow":
            delivery.wait_for(go.is_set, 30)

    # who hears of no commit looks for itself
    longest = timedelta(minutes=10) if store.backend in HEARING else timedelta(seconds=1)
    with dispatchers.running(handle, concurrency=2, max_sleep=longest):
        try:
            wait_until(lambda: seen == ["quick"])
            now = datetime.now(UTC)
            with store.timers() as timers:
                timers.schedule(ALPHA, "slow", now + timedelta(milliseconds=200))
                timers.schedule(ALPHA, "next", now + timedelta(milliseconds=500))
            wait_until(lambda: seen == ["quick", "slow", "next"])
        finally:
            go.set()


def test_a_clock_that_stands_makes_no_hot_loop(store: Store, dispatchers: Dispatchers) -> None:
    soon = PAST + timedelta(microseconds=1)
    schedule(store, "soon", at=soon)
    counter = Counter(dispatchers)
    with dispatchers.running(lambda _: None, clock=Standing(PAST)):
        started = time.monotonic()
        time.sleep(0.6)
        seconds, asked = time.monotonic() - started, counter.statements
    # without a floor it is some thousand statements a second
    assert asked < 50 + 300 * seconds
    assert left(store) == {"soon": soon}


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_row_that_another_transaction_has_locked_makes_no_hot_loop(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "overdue")
    counter = Counter(dispatchers)
    session = store.new_session()
    session.execute(text("SELECT * FROM timers FOR UPDATE"))
    seen: list[str] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name)):
        started = time.monotonic()
        time.sleep(0.6)
        seconds, asked = time.monotonic() - started, counter.statements
        assert asked < 50 + 300 * seconds
        assert seen == []
        session.rollback()
        wait_until(lambda: seen == ["overdue"])
    session.close()


@pytest.mark.parametrize("backend", FILES, indirect=True)
def test_a_row_in_a_form_of_its_own_is_in_no_dispatchers_way(
    store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aion_timers.repository._reported", set())  # as in a process that has just begun
    with store.connection() as connection:
        connection.exec_driver_sql(
            "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES ('bad', 'bad', '2026-06-01T00:00:00Z')"
        )
    with store.timers() as timers:
        assert timers.next_wake() is None
    schedule(store, "good")
    counter = Counter(dispatchers)
    seen: list[str] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name)):
        wait_until(lambda: seen == ["good"])
        started, before = time.monotonic(), counter.statements
        time.sleep(0.6)
        assert counter.statements - before < 50 + 300 * (time.monotonic() - started)
    assert store.sql("SELECT workflow_id FROM timers") == [("bad",)]
    assert [record.name for record in caplog.records] == ["aion_timers.repository"]


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_wake_up_that_is_missed_makes_a_timer_late_by_the_longest_sleep_at_most(
    store: Store, dispatchers: Dispatchers
) -> None:
    schedule(store, "later", at=FUTURE)
    seen: list[str] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name), max_sleep=SHORT):
        time.sleep(0.2)  # it sleeps by now
        with store.timers(notify=False) as timers:
            timers.schedule(ALPHA, "soon", PAST)
        wait_until(lambda: seen == ["soon"])


@pytest.mark.parametrize("backend", HEARING, indirect=True)
def test_a_timer_that_comes_before_all_others_wakes_a_dispatcher_that_would_sleep_long(
    store: Store, dispatchers: Dispatchers
) -> None:
    schedule(store, "later", at=FUTURE)
    seen: list[str] = []
    with dispatchers.running(lambda delivery: seen.append(delivery.name), max_sleep=timedelta(minutes=10)):
        for number in range(3):
            time.sleep(0.1)  # it sleeps by now, or will look before it does
            schedule(store, f"soon {number}")
            wait_until(lambda number=number: len(seen) == number + 1)  # type: ignore[misc] # bound at once


def test_a_retry_is_not_slept_over(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "a")
    attempts: list[int] = []

    def fail_once(delivery: Fired) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) == 1:
            raise ValueError("no")

    wait = timedelta(milliseconds=250)
    with dispatchers.running(fail_once, retry=lambda *_: wait, max_sleep=timedelta(minutes=10)):
        wait_until(lambda: left(store) == {})
    assert attempts == [1, 2]


# -- what it keeps alive ----------------------------------------------------------------------------------------------


def test_leases_are_extended_after_a_stop_until_the_last_handler_has_ended(
    store: Store, dispatchers: Dispatchers
) -> None:
    schedule(store, "a")
    begun, go = threading.Event(), threading.Event()

    def handle(delivery: Fired) -> None:
        begun.set()
        delivery.wait_for(go.is_set, 30)

    def until() -> datetime:
        with store.session() as session:
            found: datetime = session.scalars(select(Timer.lease_until)).one()
            return found

    with dispatchers.running(handle, lease=SHORT) as running:
        assert begun.wait(10)
        running.dispatcher.stop()
        for _ in range(3):
            before = until()
            wait_until(lambda before=before: until() > before)  # type: ignore[misc] # bound at once
        assert running.thread.is_alive()
        go.set()
    assert left(store) == {}


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_delivery_in_a_transaction_is_not_extended_and_others_are(store: Store, dispatchers: Dispatchers) -> None:
    schedule(store, "inside", "outside")
    go = threading.Event()
    begun: list[str] = []

    def handle(delivery: Fired) -> None:
        if delivery.name == "inside":
            with delivery.transaction():
                begun.append("inside")
                delivery.wait_for(go.is_set, 30)
        else:
            begun.append("outside")
            delivery.wait_for(go.is_set, 30)

    def until() -> dict[Any, datetime]:
        with store.session() as session:
            return {timer.timer_id.value: timer.lease_until for timer in session.scalars(select(Timer))}

    with dispatchers.running(handle, concurrency=2, lease=SHORT):
        try:
            wait_until(lambda: len(begun) == 2)
            before = until()
            wait_until(lambda: until()["outside"] > before["outside"] + 2 * SHORT)
            assert until()["inside"] == before["inside"]
        finally:
            go.set()
        wait_until(lambda: left(store) == {})


# -- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["libsql", "aiosqlite", "psycopg", "asyncpg"], indirect=True)
def test_any_number_of_claims_is_settled_in_one_call(store: Store) -> None:
    """More than the parameters that a statement may have."""
    many = 33_000
    strangers = [Claim(TimerEntry(BETA, number, PAST), UUID(int=number), 1) for number in range(many)]
    schedule(store, *range(200))
    with store.timers() as timers:
        claims = timers.claim(limit=200, lease=MINUTE)
        settlement = timers.complete(*strangers, *claims)
    assert settlement.done == tuple(claims)
    assert settlement.lost == tuple(strangers)
    assert left(store) == {}


def test_timers_that_wait_for_a_retry_stand_where_they_are_due(store: Store) -> None:
    schedule(store, *range(50))
    with store.timers() as timers:
        claims = timers.claim(limit=50, lease=MINUTE)
        timers.release(*claims, retry_at=FUTURE)
    schedule(store, "due")
    assert set(left(store).values()) == {FUTURE, PAST}
    with store.timers() as timers:
        assert [timer.timer_id.value for timer in timers.expired()] == ["due"]
        assert timers.next_fire_at() == PAST
        assert [claim.timer.timer_id.value for claim in timers.claim(limit=99, lease=MINUTE)] == ["due"]


@pytest.mark.parametrize("backend", ["psycopg"], indirect=True)
def test_a_claim_does_not_walk_past_timers_that_wait_for_a_retry(store: Store) -> None:
    schedule(store, *range(3000))
    with store.timers() as timers:
        timers.release(*timers.claim(limit=3000, lease=MINUTE), retry_at=FUTURE)
    schedule(store, *range(3000, 3020), workflow_id=BETA)
    store.sql("ANALYZE timers")
    with executed(store) as seen, store.timers() as timers:
        assert len(timers.claim(limit=5, lease=MINUTE)) == 5
    (statement, parameters) = seen[-1]
    with store.connection() as connection:
        (found,) = connection.exec_driver_sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters).one()
    walked: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        walked.append(node)
        for child in node.get("Plans", ()):
            walk(child)

    walk(found[0]["Plan"])
    # five that are held, and five that are free
    assert sum(node.get("Rows Removed by Filter", 0) for node in walked) <= 5, json.dumps(found)
    assert max(node["Actual Rows"] for node in walked) <= 10


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.parametrize("what", ["claim", "take"])
def test_no_plan_of_the_server_lets_it_have_more_than_was_asked_for(store: Store, what: str) -> None:
    """A limit in a subquery holds once, however the rows are then found again."""
    schedule(store, *range(50))
    with store.session() as session:
        for way in ("hashjoin", "mergejoin", "hashagg", "sort", "material", "memoize", "bitmapscan", "tidscan"):
            session.execute(text(f"SET LOCAL enable_{way} = off"))
        timers = store.repository(session)
        found = timers.claim(limit=5, lease=MINUTE) if what == "claim" else timers.take(limit=5)
    assert len(found) == 5
    with store.timers() as timers:
        assert len(timers.take(limit=99)) == 45


# -- two phases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["psycopg"], indirect=True)
@pytest.mark.parametrize("by", ["connection", "session"])
def test_a_transaction_that_schedules_is_prepared_and_committed(store: Store, by: str) -> None:
    """The server has to allow some transactions to be prepared."""
    engine: Any = store.engine
    if by == "connection":
        with engine.connect() as connection:
            transaction = connection.begin_twophase()
            timers = TimerRepository(connection)
            timers.schedule(ALPHA, "a", PAST)
            timers.schedule_many([TimerEntry(ALPHA, "b", PAST)])
            transaction.prepare()
            transaction.commit()
    else:
        with Session(engine, twophase=True) as session:
            timers = TimerRepository(session)
            timers.schedule(ALPHA, "a", PAST)
            timers.schedule_many([TimerEntry(ALPHA, "b", PAST)])
            session.prepare()
            session.commit()
    assert left(store) == {"a": PAST, "b": PAST}
    with Session(engine, twophase=True) as session:
        timers = TimerRepository(session)
        (claim, _) = timers.claim(limit=2, lease=MINUTE)
        timers.confirm(claim)
        timers.complete(claim)
        timers.schedule(ALPHA, "c", PAST)
        session.prepare()
        session.commit()
    assert set(left(store)) == {"b", "c"}
