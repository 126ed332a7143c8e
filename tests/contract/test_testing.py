"""`FakeClock` and `run_due` with real rows, on every backend."""

from __future__ import annotations

import asyncio
import heapq
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from shutil import copyfile
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import OperationalError

from aion_timers import InvalidInputError, LeaseLost, TimerEntry, UnsupportedBindError, migrate
from aion_timers.dispatcher import Backoff
from aion_timers.testing import FakeClock, Fired, NoProgressError, run_due, stepping
from tests.conftest import DATA, open_engine
from tests.dispatching import Dispatchers
from tests.dispatching import Fired as Delivery
from tests.store import Store, _wait

ALPHA, BETA = UUID("00000000-0000-4000-8000-00000000000a"), UUID("00000000-0000-4000-8000-00000000000b")
START = datetime(2026, 1, 1, tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = (timedelta(**{unit: 1}) for unit in ("seconds", "minutes", "hours", "days"))


class Bench:
    """A store, a clock, and dispatchers that are stepped."""

    def __init__(self, store: Store, dispatchers: Dispatchers) -> None:
        self.store = store
        self.clock = FakeClock(START)
        self._dispatchers = dispatchers

    def schedule(self, *names: str | int, after: timedelta = timedelta(0), workflow_id: UUID = ALPHA) -> None:
        """Schedule timers, so long after the start."""
        with self.store.timers(clock=self.clock) as timers:
            timers.schedule_many([TimerEntry(workflow_id, name, START + after) for name in names])

    def dispatcher(self, handlers: Any, **options: Any) -> Any:
        """A dispatcher with the bench's clock."""
        return self._dispatchers.make(self.store.engine, handlers, **{"clock": self.clock, **options})

    def step(self, dispatcher: Any, until: datetime | timedelta | None = None, **how: Any) -> list[Fired]:
        """Call run_due, and wait for it."""
        if isinstance(until, timedelta):
            until = START + until
        result: Any = run_due(dispatcher, until=until, **how)
        return self.store.runner.run(_wait(result)) if self.store.is_async else result  # type: ignore[no-any-return] # either

    def run(self, handlers: Any, until: datetime | timedelta | None = None, **options: Any) -> list[Fired]:
        """Make a dispatcher, and call run_due with it."""
        how = {name: options.pop(name) for name in ("raise_handler_errors", "max_firings") if name in options}
        return self.step(self.dispatcher(handlers, **options), until, **how)

    def left(self) -> dict[str | int, datetime]:
        """The timers of one workflow."""
        with self.store.timers() as timers:
            return {timer.timer_id.value: timer.fire_at for timer in timers.list_workflow(ALPHA)}


@pytest.fixture
def bench(backend: str, url: URL, store: Store) -> Bench:
    """A bench on the database of the store."""
    return Bench(store, Dispatchers(backend, url))


def nothing(_: Delivery) -> None:
    """A handler that only lets its timer be settled."""


def fail(_: Delivery) -> None:
    """A handler that fails."""
    raise ValueError("no")


def brief(fired: list[Fired]) -> list[tuple[str | int, timedelta]]:
    return [(one.timer.timer_id.value, one.at - START) for one in fired]


# -- the clock --------------------------------------------------------------------------------------------------------


def test_leases_run_out_by_the_clock(bench: Bench) -> None:
    bench.schedule("a")
    with bench.store.timers(clock=bench.clock) as timers:
        (first,) = timers.claim(limit=9, lease=MINUTE)
        assert timers.now() == START
        assert timers.claim(limit=9, lease=MINUTE) == []
        assert timers.next_wake() == MINUTE
        bench.clock.advance(MINUTE)
        (second,) = timers.claim(limit=9, lease=MINUTE)
        assert (first.attempt, second.attempt) == (1, 2)
        assert timers.complete(first).lost == (first,)
        assert timers.complete(second).done == (second,)


def test_a_lease_may_end_after_the_last_instant(bench: Bench) -> None:
    bench.clock.move_to(LAST - SECOND)
    with bench.store.timers(clock=bench.clock) as timers:
        timers.schedule(ALPHA, "a", START)
        (claim,) = timers.claim(limit=9, lease=MINUTE)
        assert timers.claim(limit=9, lease=MINUTE) == []
        assert timers.extend(claim, lease=HOUR).done == (claim,)
        assert timers.complete(claim).done == (claim,)


# -- time moves along -------------------------------------------------------------------------------------------------


def test_what_is_due_fires_in_order_at_its_instant_and_the_clock_ends_at_until(bench: Bench) -> None:
    bench.schedule("b", "a", 7, after=DAY)
    bench.schedule("a", after=DAY, workflow_id=BETA)
    bench.schedule("overdue", after=-HOUR)
    bench.schedule("first", after=HOUR)
    bench.schedule("last", after=3 * DAY)
    bench.schedule("beyond", after=3 * DAY + timedelta(microseconds=1))
    seen: list[tuple[UUID, str | int, datetime, timedelta]] = []

    def handle(delivery: Delivery) -> None:
        seen.append((delivery.timer.workflow_id, delivery.name, bench.clock.now(), delivery.late_by))

    fired = bench.run(handle, 3 * DAY)
    zero = timedelta(0)
    assert seen == [
        (ALPHA, "overdue", START, HOUR),
        (ALPHA, "first", START + HOUR, zero),
        (ALPHA, 7, START + DAY, zero),
        (ALPHA, "a", START + DAY, zero),
        (ALPHA, "b", START + DAY, zero),
        (BETA, "a", START + DAY, zero),
        (ALPHA, "last", START + 3 * DAY, zero),
    ]
    assert [
        (one.timer.workflow_id, one.timer.timer_id.value, one.at, one.at - one.timer.fire_at) for one in fired
    ] == seen
    assert {(one.attempt, one.error) for one in fired} == {(1, None)}
    assert bench.clock.now() == START + 3 * DAY
    assert set(bench.left()) == {"beyond"}
    assert bench.run(handle) == []
    assert bench.clock.now() == START + 3 * DAY


def test_without_until_the_clock_stands(bench: Bench) -> None:
    bench.schedule("now")
    bench.schedule("soon", after=timedelta(microseconds=1))

    assert brief(bench.run(nothing)) == [("now", timedelta(0))]
    assert bench.clock.now() == START
    assert set(bench.left()) == {"soon"}


def test_what_handlers_schedule_and_cancel_meanwhile_takes_its_turn(bench: Bench) -> None:
    bench.schedule("a", after=HOUR)
    bench.schedule("z", after=3 * HOUR)
    bench.schedule("cancelled", after=4 * HOUR)
    after = {
        "a": [("b", 2 * HOUR), ("same instant", HOUR), ("past", -HOUR)],
        "b": [("a", 5 * HOUR), ("beyond", 2 * DAY)],
    }

    def handle(delivery: Delivery) -> None:
        with delivery.transaction() as session:
            timers = delivery.timers(session)
            for name, at in after.pop(delivery.name, []):
                timers.schedule(ALPHA, name, START + at)
            if delivery.name == "z":
                timers.cancel(ALPHA, "cancelled")

    assert brief(bench.run(handle, DAY)) == [
        ("a", HOUR),
        ("past", HOUR),
        ("same instant", HOUR),
        ("b", 2 * HOUR),
        ("z", 3 * HOUR),
        ("a", 5 * HOUR),
    ]
    assert bench.left() == {"beyond": START + 2 * DAY}


def test_a_timer_whose_holder_died_fires_when_the_lease_has_run_out(bench: Bench) -> None:
    bench.schedule("held", "free", after=HOUR)
    bench.clock.advance(HOUR)
    with bench.store.timers(clock=bench.clock) as timers:
        (dead,) = timers.claim(limit=1, lease=10 * MINUTE)
    others = {"free", "held"} - {dead.timer.timer_id.value}

    fired = bench.run(nothing, DAY)
    assert brief(fired) == [(others.pop(), HOUR), (dead.timer.timer_id.value, HOUR + 10 * MINUTE)]
    assert [one.attempt for one in fired] == [1, 2]
    with bench.store.timers(clock=bench.clock) as timers:
        assert timers.complete(dead).lost == (dead,)


def test_only_timers_with_a_handler_move_the_clock(bench: Bench) -> None:
    bench.schedule("unknown", after=HOUR)
    bench.schedule("retry-1", "known", after=2 * HOUR)

    assert brief(bench.run({"known": nothing, "retry-*": nothing}, DAY)) == [
        ("known", 2 * HOUR),
        ("retry-1", 2 * HOUR),
    ]
    assert set(bench.left()) == {"unknown"}


def test_handlers_run_one_at_a_time_where_the_test_runs(bench: Bench) -> None:
    bench.schedule(*"abcd")
    running: list[str | int] = []
    threads: set[int] = set()

    def handle(delivery: Delivery) -> None:
        running.append(delivery.name)
        delivery.sleep(0.02)
        assert running.pop() == delivery.name
        threads.add(threading.get_ident())

    assert len(bench.run(handle, concurrency=3)) == 4
    assert threads == {threading.get_ident()}


def test_a_handler_may_move_the_clock_as_slow_work_does(bench: Bench) -> None:
    bench.schedule("a", after=HOUR)
    bench.schedule("b", after=2 * HOUR)
    bench.schedule("c", after=6 * HOUR)
    late: list[timedelta] = []

    def handle(delivery: Delivery) -> None:
        late.append(delivery.late_by)
        if delivery.name == "a":
            bench.clock.advance(4 * HOUR)  # longer than the lease
            delivery.extend()
            with delivery.transaction():
                pass

    assert brief(bench.run(handle, 3 * HOUR)) == [("a", HOUR), ("b", 5 * HOUR)]
    assert late == [timedelta(0), 3 * HOUR]
    assert bench.clock.now() == START + 5 * HOUR
    assert set(bench.left()) == {"c"}


def test_no_lease_runs_out_while_a_debugger_holds_a_handler(bench: Bench) -> None:
    bench.schedule("a")
    lost: list[bool] = []

    def handle(delivery: Delivery) -> None:
        delivery.sleep(0.3)
        lost.append(delivery.lost)
        delivery.extend()
        lost.append(delivery.lost)

    assert [one.attempt for one in bench.run(handle, lease=timedelta(milliseconds=150))] == [1]
    assert lost == [False, False]
    assert bench.left() == {}


def test_stop_ends_it_with_the_handler_that_calls_it(bench: Bench) -> None:
    bench.schedule("a", "b", after=HOUR)
    dispatcher = bench.dispatcher(lambda _: dispatcher.stop())

    assert brief(bench.step(dispatcher, DAY)) == [("a", HOUR)]
    assert bench.clock.now() == START + HOUR
    assert brief(bench.step(dispatcher, DAY)) == [("b", HOUR)]


@pytest.mark.parametrize("seed", range(3))
def test_it_fires_as_a_plain_simulation_does(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - makes up a course of events
    rules = {
        (number, attempt): chance.choice(["settle", "settle", "fail", "again", "other"])
        for number in range(25)
        for attempt in range(1, 5)
    }
    first = {number: chance.randrange(60) for number in range(20)}
    until, delay = 90, 7

    queue = [(at, number) for number, at in first.items()]
    heapq.heapify(queue)
    expected, attempts, now = [], dict.fromkeys(range(25), 0), 0
    while queue and queue[0][0] <= until:
        at, number = heapq.heappop(queue)
        now = max(now, at)
        attempts[number] += 1
        expected.append((number, now * MINUTE))
        rule = rules.get((number, attempts[number]))
        if rule == "fail":
            heapq.heappush(queue, (now + delay, number))
        elif rule == "again":
            heapq.heappush(queue, (now + 2 * delay, number))
        elif rule == "other":
            other = 20 + number % 5
            queue = [one for one in queue if one[1] != other]
            heapq.heapify(queue)
            heapq.heappush(queue, (now - delay, other))

    times = dict.fromkeys(range(25), 0)

    def handle(delivery: Delivery) -> None:
        number = int(delivery.name) - 100
        times[number] += 1
        rule = rules.get((number, times[number]))
        if rule == "fail":
            raise ValueError(rule)
        with delivery.transaction() as session:
            timers = delivery.timers(session)
            if rule == "again":
                timers.schedule(ALPHA, delivery.name, bench.clock.now() + 2 * delay * MINUTE)
            elif rule == "other":
                timers.schedule(ALPHA, 100 + 20 + number % 5, bench.clock.now() - delay * MINUTE)

    for number, at in first.items():
        bench.schedule(100 + number, after=at * MINUTE)  # three digits, so that text sorts as numbers do
    fired = bench.run(handle, until * MINUTE, retry=lambda *_: delay * MINUTE, raise_handler_errors=False)
    assert [(int(name) - 100, at) for name, at in brief(fired)] == expected
    assert len(bench.left()) == len(queue)


# -- handlers that fail -----------------------------------------------------------------------------------------------


def test_an_error_is_raised_with_the_timers_name_and_the_next_call_goes_on(bench: Bench) -> None:
    bench.schedule("bad", after=HOUR)
    bench.schedule("good", after=2 * HOUR)
    failures = [ValueError("no")]

    def handle(delivery: Delivery) -> None:
        with delivery.transaction() as session:
            delivery.timers(session).schedule(ALPHA, f"after {delivery.name}", START + 3 * HOUR)
            if failures:
                raise failures.pop()

    dispatcher = bench.dispatcher(handle, retry=lambda *_: 90 * MINUTE)
    with pytest.raises(ValueError, match="no") as caught:
        bench.step(dispatcher, DAY)
    assert caught.value.__notes__ == [
        f"while run_due() fired timer:named:bad of workflow {ALPHA}, attempt 1, at {START + HOUR}"
    ]
    assert bench.clock.now() == START + HOUR
    assert bench.left() == {"bad": START + 150 * MINUTE, "good": START + 2 * HOUR}

    fired = bench.step(dispatcher, 150 * MINUTE)
    assert brief(fired) == [("good", 2 * HOUR), ("bad", 150 * MINUTE)]
    assert fired[1].attempt == 2
    assert set(bench.left()) == {"after good", "after bad"}


def test_retry_decides_if_errors_are_not_raised(bench: Bench) -> None:
    bench.schedule("bad")

    fired = bench.run(
        fail,
        DAY,
        raise_handler_errors=False,
        retry=lambda delivery, _: delivery.attempt * HOUR if delivery.attempt < 4 else None,
    )
    assert brief(fired) == [("bad", hours * HOUR) for hours in (0, 1, 3, 6)]
    assert [(one.attempt, str(one.error)) for one in fired] == [(1, "no"), (2, "no"), (3, "no"), (4, "no")]
    assert bench.left() == {}
    assert bench.clock.now() == START + DAY


def test_the_default_backoff_lets_a_timer_fire_for_days(bench: Bench) -> None:
    bench.schedule("bad")

    fired = bench.run(fail, 2 * DAY, raise_handler_errors=False)
    # ten waits that grow to an hour, then one of half an hour to an hour each
    waits = [after.at - before.at for before, after in pairwise(fired)]
    assert all(wait <= min(HOUR, SECOND * 2 ** min(number, 12)) for number, wait in enumerate(waits))
    assert 48 <= len(fired) <= 110
    assert bench.run(fail, DAY * 3, raise_handler_errors=False, retry=Backoff(attempts=1))[-1].attempt == len(fired) + 1
    assert bench.left() == {}


def test_an_error_after_the_transaction_is_raised_and_not_tried_again(bench: Bench) -> None:
    bench.schedule("a")

    def handle(delivery: Delivery) -> None:
        with delivery.transaction():
            pass
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        bench.run(handle, DAY)
    assert bench.left() == {}


def test_a_lost_lease_is_no_failure(bench: Bench) -> None:
    bench.schedule("a")

    def handle(delivery: Delivery) -> None:
        if delivery.attempt == 1 and delivery.timer.fire_at == START:
            with delivery.session() as session:
                delivery.timers(session).schedule(ALPHA, "a", START + HOUR)
        with delivery.transaction():
            pass

    fired = bench.run(handle, DAY)
    assert brief(fired) == [("a", timedelta(0)), ("a", HOUR)]
    assert [type(one.error) for one in fired] == [LeaseLost, type(None)]


def test_what_is_no_mere_exception_is_raised_in_any_case(bench: Bench) -> None:
    bench.schedule("a")

    def interrupt(_: Delivery) -> None:
        raise KeyboardInterrupt

    def no_more(_: Delivery) -> None:
        raise StopIteration("not swallowed by a generator")

    with pytest.raises(KeyboardInterrupt):
        bench.run(interrupt, raise_handler_errors=False, retry=lambda *_: timedelta(0))
    if bench.store.is_async:
        return  # no coroutine can raise a StopIteration
    with pytest.raises(StopIteration, match="not swallowed"):
        bench.run(no_more)
    assert set(bench.left()) == {"a"}


# -- what would not end -----------------------------------------------------------------------------------------------


def test_a_handler_that_always_schedules_in_the_past_ends_with_the_timers_name(bench: Bench) -> None:
    bench.schedule("other")
    bench.schedule("poll", after=HOUR)

    def handle(delivery: Delivery) -> None:
        if delivery.name == "poll":
            with delivery.transaction() as session:
                delivery.timers(session).schedule(ALPHA, "poll", bench.clock.now() - SECOND)

    with pytest.raises(NoProgressError, match=f"timer:named:poll of workflow {ALPHA}.*endless loop") as caught:
        bench.run(handle, DAY, max_firings=20)
    assert caught.value.timer.timer_id.value == "poll"  # type: ignore[attr-defined] # a timer
    assert "max_firings" in caught.value.cure
    assert bench.clock.now() == START + HOUR
    assert bench.left() == {"poll": START + HOUR - SECOND}


def test_a_retry_at_once_ends_with_the_timers_name(bench: Bench) -> None:
    bench.schedule("bad")

    with pytest.raises(NoProgressError, match=r"11 times timer:named:bad"):
        bench.run(fail, DAY, raise_handler_errors=False, retry=lambda *_: timedelta(0), max_firings=10)
    assert set(bench.left()) == {"bad"}


def test_as_many_firings_as_are_allowed_are_no_endless_loop(bench: Bench) -> None:
    bench.schedule(*range(1, 11))
    assert len(bench.run(nothing, max_firings=10)) == 10


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
def test_a_timer_that_an_open_transaction_has_locked_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "_PATIENCE", 0.2)
    bench.schedule("locked", "free", after=HOUR)
    session = bench.store.new_session()
    bench.store.repository(session).schedule(ALPHA, "locked", START + DAY)

    with pytest.raises(
        NoProgressError, match=r"another transaction has them locked; the first one is timer:named:locked"
    ):
        bench.run({"locked": nothing, "free": nothing}, DAY)
    assert bench.clock.now() == START + HOUR
    session.commit()
    session.close()
    assert brief(bench.run({"locked": nothing}, DAY)) == [("locked", DAY)]


@contextmanager
def another_connection(url: URL) -> Iterator[Any]:
    engine = open_engine(url.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
def test_a_timer_that_another_transaction_locks_for_a_moment_is_waited_for(bench: Bench, url: URL) -> None:
    bench.schedule("locked", after=HOUR)
    with another_connection(url) as other:
        other.execute(text("SELECT * FROM timers FOR UPDATE"))
        release = threading.Timer(0.3, other.rollback)
        release.start()
        assert brief(bench.run(nothing, DAY)) == [("locked", HOUR)]
        release.join()


@pytest.mark.parametrize("backend", ["psycopg", "asyncpg"], indirect=True)
def test_a_timer_that_its_handler_leaves_locked_is_named(
    bench: Bench, url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "_PATIENCE", 0.2)
    bench.schedule("a")
    with another_connection(url) as forgotten:

        def handle(_: Delivery) -> None:
            forgotten.execute(text("SELECT * FROM timers FOR UPDATE"))

        with pytest.raises(NoProgressError, match=r"timer:named:a .*cannot be settled; see that the handler"):
            bench.run(handle)


@pytest.mark.parametrize("backend", ["psycopg", "asyncpg"], indirect=True)
def test_a_timer_that_is_locked_for_a_moment_after_it_fired_is_settled(bench: Bench, url: URL) -> None:
    bench.schedule("a")
    with another_connection(url) as other:
        release = threading.Timer(0.3, other.rollback)

        def handle(_: Delivery) -> None:
            other.execute(text("SELECT * FROM timers FOR UPDATE"))
            release.start()

        fired = bench.run(handle, DAY)
        release.join()
    assert [(one.at, one.attempt) for one in fired] == [(START, 1)]
    assert bench.left() == {}


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
def test_an_open_transaction_of_the_test_is_pointed_at(backend: str, url: URL, store: Store) -> None:
    hasty = url.update_query_dict({"timeout": "0.1"})
    with asyncio.Runner() as runner:
        impatient = Store(backend, open_engine(hasty), runner)
        bench = Bench(impatient, Dispatchers(backend, hasty))
        bench.schedule("a")
        session = store.new_session()
        store.repository(session).schedule(ALPHA, "b", START)
        with pytest.raises(OperationalError, match="locked") as caught:
            bench.run(nothing)
        session.rollback()
        session.close()
        assert "commit or close it before the call" in caught.value.__notes__[-1]
        assert brief(bench.run(nothing)) == [("a", timedelta(0))]
        impatient.close()


# -- what it is called with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "psycopg", "asyncpg"], indirect=True)
def test_it_runs_once_at_a_time(bench: Bench) -> None:
    bench.schedule("a")

    def handle(_: Delivery) -> None:
        again: Any = run_due(dispatcher)
        if bench.store.is_async:
            again.send(None)

    dispatcher = bench.dispatcher(handle)
    with pytest.raises(UnsupportedBindError, match="runs already"):
        bench.step(dispatcher)


@pytest.mark.parametrize("backend", ["aiolibsql", "aiosqlite", "psycopg_async", "asyncpg"], indirect=True)
def test_a_task_that_is_cancelled_gives_its_timer_back(bench: Bench) -> None:
    bench.schedule("a")

    def handle(delivery: Delivery) -> None:
        task.cancel()
        delivery.sleep(60)

    async def run() -> None:
        nonlocal task
        task = asyncio.ensure_future(run_due(bench.dispatcher(handle), until=START + DAY))
        with pytest.raises(asyncio.CancelledError):
            await task

    task: Any = None
    bench.store.runner.run(run())
    fired = bench.run(nothing)
    assert [(one.timer.timer_id.value, one.at, one.attempt) for one in fired] == [("a", START, 2)]


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql"], indirect=True)
def test_a_single_handler_is_refused_on_another_programs_table(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "adopted.db"
    copyfile(DATA / "aion-0.1.0.db", path)
    made = URL.create("sqlite+libsql", database=str(path))
    engine = open_engine(made)
    migrate.upgrade(engine)
    engine.dispose()
    url = made.set(drivername=f"sqlite+{backend}")
    with asyncio.Runner() as runner:
        bench = Bench(Store(backend, open_engine(url), runner), Dispatchers(backend, url))
        bench.clock.move_to(datetime(2027, 1, 1, tzinfo=UTC))
        with pytest.raises(UnsupportedBindError, match="another program made this table"):
            bench.run(nothing)
        with bench.store.timers(clock=bench.clock) as timers:
            timers.schedule(ALPHA, "ours", START)
        assert brief(bench.run({"ours": nothing})) == [("ours", bench.clock.now() - START)]
        bench.store.close()


WRONG: dict[str, tuple[Callable[[Bench], Any], type[Exception], str]] = {
    "a clock that is none of ours": (
        lambda bench: run_due(bench.dispatcher(nothing, clock=lambda: START)),
        InvalidInputError,
        "clock=FakeClock",
    ),
    "the database's clock": (
        lambda bench: run_due(bench.dispatcher(nothing, clock=None)),
        InvalidInputError,
        "clock=FakeClock",
    ),
    "an instant that is over": (
        lambda bench: run_due(bench.dispatcher(nothing), until=START - SECOND),
        InvalidInputError,
        "over already",
    ),
    "a naive instant": (
        lambda bench: run_due(bench.dispatcher(nothing), until=datetime(2027, 1, 1)),  # noqa: DTZ001 - it is refused
        InvalidInputError,
        "naive",
    ),
    "no firing": (
        lambda bench: run_due(bench.dispatcher(nothing), max_firings=0),
        InvalidInputError,
        "max_firings",
    ),
    "an engine": (lambda bench: run_due(bench.store.engine), UnsupportedBindError, "pass a dispatcher"),  # type: ignore[call-overload] # refused
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("backend", ["libsql", "asyncpg"], indirect=True)
def test_what_cannot_be_done_is_refused_before_anything_is(bench: Bench, wrong: str) -> None:
    call, kind, words = WRONG[wrong]
    bench.schedule("a")

    with pytest.raises(kind, match=words):
        call(bench)
    assert set(bench.left()) == {"a"}
    assert bench.clock.now() == START
