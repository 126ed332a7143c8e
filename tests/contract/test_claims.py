"""Claims: who holds a timer, who may settle it, and what others do to it meanwhile, on every backend."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import URL, event, select

from aion_timers import Claim, InvalidInputError, LeaseLost, Settlement, Timer, TimerEntry
from tests.conftest import open_engine
from tests.contract.test_concurrency import in_threads
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LEASE = timedelta(seconds=30)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
BETA = UUID("00000000-0000-4000-8000-00000000000b")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        """What time it is."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands at NOW."""
    return Clock()


def ids(claims: list[Claim]) -> list[str | int]:
    return [claim.timer.timer_id.value for claim in claims]


def test_a_claim_holds_the_first_due_timers_in_order(store: Store) -> None:
    entries = [TimerEntry(ALPHA, number, NOW + number * SECOND) for number in range(5)]
    with store.timers() as timers:
        timers.schedule_many(entries)
        claims = timers.claim(NOW + 3 * SECOND, limit=3, lease=LEASE)
        assert [claim.timer for claim in claims] == entries[:3]
        assert {claim.attempt for claim in claims} == {1}
        assert ids(timers.claim(NOW + 3 * SECOND, limit=3, lease=LEASE)) == [3]
        assert timers.claim(NOW + 3 * SECOND, limit=3, lease=LEASE) == []


def test_what_is_held_is_neither_claimed_nor_taken_but_read(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        timers.claim(NOW, limit=1, lease=LEASE)
        assert timers.claim(NOW, limit=1, lease=LEASE) == []
        assert timers.take(NOW, limit=1) == []
        assert timers.expired(NOW) == [TimerEntry(ALPHA, "a", NOW)]
        assert timers.next_fire_at() == NOW


def test_names_choose_what_is_claimed(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("pay", "retry-1", "other", 7))
        assert ids(timers.claim(NOW, limit=9, lease=LEASE, names=["pay", "retry-*"])) == ["pay", "retry-1"]
        assert sorted(ids(timers.claim(NOW, limit=9, lease=LEASE)), key=str) == [7, "other"]


def test_a_lease_runs_out_by_the_clock_whatever_is_due(store: Store, clock: Clock) -> None:
    with store.timers(clock=clock) as timers:
        timers.schedule(ALPHA, "a", NOW)
        (first,) = timers.claim(limit=1, lease=LEASE)
        # a worker whose idea of what is due is fast does not steal
        assert timers.claim(NOW + timedelta(days=1), limit=1, lease=LEASE) == []
        clock.now = NOW + LEASE - timedelta(microseconds=1)
        assert timers.claim(limit=1, lease=LEASE) == []
        clock.now = NOW + LEASE
        (second,) = timers.claim(limit=1, lease=LEASE)
        assert (second.timer, second.attempt) == (first.timer, 2)
        assert second.token != first.token
        assert timers.complete(first) == Settlement((), (), (first,))
        assert timers.complete(second) == Settlement((second,), (), ())


def test_a_lease_runs_out_by_the_databases_clock(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        timers.claim(limit=1, lease=timedelta(milliseconds=150))
        assert timers.claim(limit=1, lease=LEASE) == []
    time.sleep(0.2)
    with store.timers() as timers:
        assert ids(timers.claim(limit=1, lease=LEASE)) == ["a"]


@pytest.mark.parametrize("backend", ["libsql", "psycopg", "asyncpg"], indirect=True)
def test_a_lease_counts_from_its_own_moment_not_from_the_transactions_beginning(store: Store) -> None:
    lease = timedelta(seconds=3)
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("claimed", "extended"))
        (first,) = timers.claim(limit=1, lease=lease, names=["extended"])
        time.sleep(1.8)
        timers.claim(limit=1, lease=lease, names=["claimed"])
        assert timers.extend(first, lease=lease).done == (first,)
    time.sleep(1.5)  # longer since the beginning than a lease, and shorter since it was given
    with store.timers() as timers:
        assert timers.claim(limit=2, lease=lease) == []


def test_complete_deletes_and_a_second_time_is_lost(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(3))
        claims = timers.claim(NOW, limit=2, lease=LEASE)
        assert timers.complete(*claims) == Settlement(tuple(claims), (), ())
        assert timers.complete(*claims) == Settlement((), (), tuple(claims))
        assert timers.complete() == Settlement((), (), ())
        assert [entry.timer_id.value for entry in timers.list_workflow(ALPHA)] == [2]


def test_release_gives_back_now_or_later_and_keeps_the_attempts(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        for attempt in (1, 2):
            (claim,) = timers.claim(NOW, limit=1, lease=LEASE)
            assert claim.attempt == attempt
            assert timers.release(claim) == Settlement((claim,), (), ())
        (claim,) = timers.claim(NOW, limit=1, lease=LEASE)
        timers.release(claim, retry_at=NOW + SECOND)
        assert timers.claim(NOW, limit=1, lease=LEASE) == []
        (claim,) = timers.claim(NOW + SECOND, limit=1, lease=LEASE)
        assert (claim.attempt, claim.timer.fire_at) == (4, NOW + SECOND)


def test_extend_lets_a_lease_last_longer(store: Store, clock: Clock) -> None:
    with store.timers(clock=clock) as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(2))
        kept, left = timers.claim(limit=2, lease=LEASE)
        clock.now = NOW + LEASE / 2
        assert timers.extend(kept, lease=LEASE) == Settlement((kept,), (), ())
        clock.now = NOW + LEASE
        assert ids(timers.claim(limit=2, lease=LEASE)) == [left.timer.timer_id.value]
        assert timers.extend(left, lease=LEASE) == Settlement((), (), (left,))


def test_two_claims_on_one_timer_are_told_apart_in_one_call(store: Store, clock: Clock) -> None:
    with store.timers(clock=clock) as timers:
        timers.schedule(ALPHA, "a", NOW)
        (old,) = timers.claim(limit=1, lease=LEASE)
        clock.now = NOW + LEASE
        (new,) = timers.claim(limit=1, lease=LEASE)
        assert timers.release(old, new, new) == Settlement((new, new), (), (old,))


def test_claims_of_several_workflows_are_told_apart_though_some_are_there_twice(store: Store, clock: Clock) -> None:
    with store.timers(clock=clock) as timers:
        timers.schedule_many(TimerEntry(workflow, "a", NOW) for workflow in (ALPHA, BETA))
        lost, other = timers.claim(limit=2, lease=LEASE)
        assert timers.cancel(lost.timer.workflow_id, "a")
        assert timers.release(other, lost, other, lost) == Settlement((other, other), (), (lost, lost))
        clock.now = NOW + LEASE
        (new,) = timers.claim(limit=1, lease=LEASE)
        assert timers.release(lost, other, new) == Settlement((new,), (), (lost, other))


def test_confirm_raises_once_the_lease_is_lost(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        (claim,) = timers.claim(NOW, limit=1, lease=LEASE)
        timers.confirm(claim)
        timers.schedule(ALPHA, "a", NOW)
        with pytest.raises(LeaseLost) as caught:
            timers.confirm(claim)
        assert caught.value.claim == claim
        assert timers.complete(claim).lost == (claim,)
        assert timers.get(ALPHA, "a") is not None


@pytest.mark.parametrize("end", ["cancel", "cancel_workflow", "move"])
def test_who_cancels_or_moves_a_held_timer_has_his_way(store: Store, end: str) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        (claim,) = timers.claim(NOW, limit=1, lease=LEASE)
        match end:
            case "cancel":
                assert timers.cancel(ALPHA, "a") is True
            case "cancel_workflow":
                assert timers.cancel_workflow(ALPHA) == 1
            case _:
                assert timers.schedule(ALPHA, "a", NOW + SECOND) is True
        for settlement in (timers.complete(claim), timers.release(claim), timers.extend(claim, lease=LEASE)):
            assert settlement == Settlement((), (), (claim,))
        found = timers.get(ALPHA, "a")
        assert found == (TimerEntry(ALPHA, "a", NOW + SECOND) if end == "move" else None)


@pytest.mark.parametrize("if_exists", ["replace", "keep", "earliest", "latest"])
@pytest.mark.parametrize("moved", [-1, 0, 1])
def test_a_held_timer_counts_as_absent_for_who_schedules(store: Store, if_exists: Any, moved: int) -> None:
    instant = NOW + moved * SECOND
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(workflow, "a", NOW) for workflow in (ALPHA, BETA))
        claims = timers.claim(NOW, limit=2, lease=LEASE)
        assert timers.schedule(ALPHA, "a", instant, if_exists=if_exists) is True
        assert timers.schedule_many([TimerEntry(BETA, "a", instant)], if_exists=if_exists) == 1
        assert timers.complete(*claims).lost == tuple(claims)
        assert [entry.fire_at for entry in timers.expired(NOW + SECOND)] == [instant] * 2
        # it is a new timer
        assert {claim.attempt for claim in timers.claim(NOW + SECOND, limit=2, lease=LEASE)} == {1}


@pytest.mark.parametrize("if_exists", ["keep", "earliest", "latest"])
def test_a_lease_that_ran_out_holds_nothing(store: Store, clock: Clock, if_exists: Any) -> None:
    with store.timers(clock=clock) as timers:
        timers.schedule(ALPHA, "a", NOW)
        timers.claim(limit=1, lease=LEASE)
        clock.now = NOW + LEASE
        assert timers.schedule(ALPHA, "a", NOW, if_exists=if_exists) is False
        assert ids(timers.claim(limit=1, lease=LEASE)) == ["a"]


def test_the_model_shows_who_holds_what(store: Store, clock: Clock) -> None:
    with store.session() as session:
        timers = store.repository(session, clock=clock)
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(2))
        (claim,) = timers.claim(limit=1, lease=LEASE)
        held, free = session.scalars(select(Timer).order_by(Timer.timer_id)).all()
        assert (held.lease_token, held.lease_until, held.attempts) == (claim.token, NOW + LEASE, 1)
        assert (free.lease_token, free.lease_until, free.attempts) == (None, None, 0)


def test_next_wake_counts_what_is_overdue_held_and_to_come(store: Store, clock: Clock) -> None:
    with store.timers(clock=clock) as timers:
        assert timers.next_wake() is None
        timers.schedule(ALPHA, "later", NOW + 60 * SECOND)
        assert timers.next_wake() == 60 * SECOND
        timers.schedule(ALPHA, "due", NOW - SECOND)
        assert timers.next_wake() == -SECOND
        timers.claim(limit=1, lease=LEASE)
        assert timers.next_wake() == LEASE
        assert timers.next_wake(["later"]) == 60 * SECOND
        assert timers.next_wake(["none*"]) is None
        clock.now = NOW + 45 * SECOND
        assert timers.next_wake() == -15 * SECOND


def test_next_wake_looks_past_what_is_in_flight(store: Store, clock: Clock) -> None:
    with store.timers(clock=clock) as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW - SECOND) for number in range(100))
        timers.claim(limit=100, lease=LEASE)
        timers.schedule(BETA, "soon", NOW + SECOND)
        assert timers.next_wake() == SECOND


def test_the_clock_that_decides_tells_the_time(store: Store, clock: Clock) -> None:
    with store.timers() as timers:
        assert abs(timers.now() - datetime.now(UTC)) < 5 * SECOND
        assert timers.now().tzinfo is UTC
        assert timers.adopted() is False
    with store.timers(clock=clock) as timers:
        assert timers.now() == NOW


def test_a_timer_is_due_as_soon_as_the_clock_shows_its_instant(store: Store) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, 1, timers.now())
    with store.timers() as timers:
        assert len(timers.take(limit=1)) == 1


def test_who_asks_for_the_time_can_write_after_a_wait_for_others(backend: str, url: URL) -> None:
    asked, written = threading.Event(), threading.Event()

    def work(store: Store, number: int) -> None:
        with store.timers() as timers:
            if number == 0:
                now = timers.now()
                asked.set()
                assert written.wait(10)
                # on a file this waits for the other's commit
                assert timers.schedule(ALPHA, 1, now) is True
            else:
                assert asked.wait(10)
                timers.schedule(BETA, 1, NOW)
                written.set()
                time.sleep(0.1)

    in_threads(backend, url, work, threads=2)


# -- several at once --------------------------------------------------------------------------------------------------


def test_each_timer_is_claimed_by_one_worker_at_a_time(backend: str, url: URL, store: Store) -> None:
    entries = [TimerEntry(uuid4(), number, NOW) for number in range(400)]
    with store.timers() as timers:
        timers.schedule_many(entries)
    claimed: Counter[UUID] = Counter()

    def work(other: Store, number: int) -> None:
        empty = 0
        while empty < 3:
            with other.timers() as timers:
                claims = timers.claim(NOW, limit=7 + number, lease=LEASE)
            claimed.update(claim.timer.workflow_id for claim in claims)
            left = claims
            while left:  # a claim that saw a row free may have it locked, though it does not get it
                with other.timers() as timers:
                    settled = timers.complete(*left)
                assert settled.lost == ()
                left = settled.busy
            empty = 0 if claims else empty + 1

    in_threads(backend, url, work)
    assert claimed == Counter(entry.workflow_id for entry in entries)
    with store.timers() as timers:
        assert timers.next_fire_at() is None


@pytest.fixture
def locked(store: Store) -> Iterator[tuple[Any, list[Claim]]]:
    """Three claims, and a host's transaction that has the row of the second one open."""
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(3))
        claims = timers.claim(NOW, limit=3, lease=LEASE)
    session = store.new_session()
    store.repository(session).confirm(claims[1])
    yield session, claims
    session.rollback()
    session.close()


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
@pytest.mark.parametrize("how", ["complete", "release", "extend"])
def test_a_row_that_another_transaction_has_locked_holds_up_no_other(
    backend: str, url: URL, locked: tuple[Any, list[Claim]], how: str
) -> None:
    session, claims = locked
    found: list[Settlement] = []

    def settle(other: Store, _: int) -> None:
        with other.timers() as timers:
            options = {"lease": LEASE} if how == "extend" else {}
            found.append(getattr(timers, how)(*claims, **options))

    started = time.monotonic()
    in_threads(backend, url, settle, threads=1)
    assert time.monotonic() - started < 5
    assert found == [Settlement((claims[0], claims[2]), (claims[1],), ())]
    session.rollback()
    in_threads(backend, url, settle, threads=1)
    assert claims[1] in found[1].done


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
def test_a_lease_is_never_given_from_before_a_wait(backend: str, url: URL, locked: tuple[Any, list[Claim]]) -> None:
    session, claims = locked
    short = timedelta(milliseconds=400)

    def extend(other: Store, _: int) -> None:
        until = time.monotonic() + 10
        left = set(claims)
        while left and time.monotonic() < until:
            with other.timers() as timers:
                left -= set(timers.extend(*left, lease=short).done)
        with other.timers() as timers:
            assert timers.claim(limit=3, lease=LEASE) == [] or not left

    waiting = threading.Thread(target=in_threads, args=(backend, url, extend, 1))
    waiting.start()
    time.sleep(0.6)
    session.rollback()
    waiting.join()


@pytest.mark.parametrize("seconds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_claim_waits_for_nobody_and_a_second_settles_nothing(
    backend: str, url: URL, store: Store, seconds: int
) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(50))
    until = time.monotonic() + seconds

    def work(other: Store, number: int) -> None:
        while time.monotonic() < until:
            with other.timers() as timers:
                claims = timers.claim(NOW, limit=10, lease=LEASE)
            with other.timers() as timers:
                if number % 2:
                    timers.release(*claims)
                else:
                    timers.schedule_many([claim.timer for claim in claims])

    in_threads(backend, url, work)
    with store.timers() as timers:
        assert len(timers.list_workflow(ALPHA)) == 50


@pytest.mark.parametrize("backend", ["libsql", "sqlite"], indirect=True)
def test_a_timer_that_is_claimed_between_being_read_and_being_leased_is_left(
    backend: str, url: URL, store: Store
) -> None:
    other = Store(backend, open_engine(url), store.runner)
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, NOW) for name in ("theirs", "ours"))
    theirs: list[Claim] = []

    def claim(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("UPDATE timers SET lease_token") and not theirs:
            with other.timers() as timers:
                theirs.extend(timers.claim(NOW, limit=1, lease=LEASE, names=["theirs"]))

    event.listen(store.engine, "before_cursor_execute", claim)
    with store.connection(isolation_level="AUTOCOMMIT") as connection:
        claims = store.repository(connection).claim(NOW, limit=10, lease=LEASE)
    with other.timers() as timers:
        assert timers.complete(*theirs).done == tuple(theirs)
    other.close()
    assert (ids(theirs), ids(claims)) == (["theirs"], ["ours"])


# -- the other program ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
@pytest.mark.parametrize("instant", ["2026-06-03T02:30:00.000000000Z", "2026-06-04T00:00:00.000000001Z"])
def test_a_timer_that_the_other_program_moves_is_lost_to_its_claimer(store: Store, instant: str) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        (claim,) = timers.claim(NOW, limit=1, lease=LEASE)
    with store.connection() as connection:
        connection.exec_driver_sql(
            "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (?, ?, ?)"
            " ON CONFLICT(workflow_id, timer_id) DO UPDATE SET fire_at = excluded.fire_at",
            (f'"{ALPHA}"', '{"Named":"a"}', instant),
        )
    with store.timers() as timers:
        assert timers.complete(claim) == Settlement((), (), (claim,))
        assert store.sql("SELECT fire_at FROM timers") == [(instant,)] if not store.is_async else True
        (again,) = timers.claim(NOW + timedelta(days=9), limit=1, lease=LEASE)
        assert again.attempt == 1


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
def test_a_foreign_row_is_not_claimed_and_hides_no_other(store: Store) -> None:
    with store.connection() as connection:
        for number in range(30):
            connection.exec_driver_sql(
                "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (?, ?, ?)",
                (f'"bad {number}"', '{"Named":"a"}', "2026-06-01T00:00:00.000000000Z"),
            )
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, NOW) for number in range(5))
        assert ids(timers.claim(NOW, limit=3, lease=LEASE)) == [0, 1, 2]
        assert ids(timers.claim(NOW, limit=3, lease=LEASE)) == [3, 4]
    assert store.sql("SELECT count(*) FROM timers WHERE lease_token IS NULL") == [(30,)]


# -- bad input --------------------------------------------------------------------------------------------------------

BAD_CALLS: dict[str, Any] = {
    "lease of zero": lambda t, _: t.claim(NOW, limit=1, lease=timedelta(0)),
    "negative lease": lambda t, _: t.claim(NOW, limit=1, lease=-SECOND),
    "number as lease": lambda t, _: t.claim(NOW, limit=1, lease=30),
    "lease without end": lambda t, c: t.extend(c, lease=timedelta.max),
    "limit of zero": lambda t, _: t.claim(NOW, limit=0, lease=LEASE),
    "naive retry": lambda t, c: t.release(c, retry_at=datetime(2026, 6, 3)),  # noqa: DTZ001 - naive on purpose
    "a timer as claim": lambda t, c: t.complete(c.timer),
    "a list as claim": lambda t, c: t.complete([c]),
    "None as claim": lambda t, _: t.confirm(None),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_input_is_refused_and_settles_nothing(store: Store, call: Any) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
        (claim,) = timers.claim(NOW, limit=1, lease=LEASE)
        with pytest.raises(InvalidInputError):
            call(timers, claim)
        assert timers.complete(claim).done == (claim,)
