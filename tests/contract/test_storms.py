"""Much at once, and handlers and clocks that misbehave: everybody else is on time."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import URL, func, select

from aion_timers import Backoff, Timer, TimerEntry
from tests import storming
from tests.dispatching import Dispatchers, Fired, wait_until
from tests.store import Store

ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
PAST = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
FUTURE = datetime(9000, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SQLITE = ["libsql", "aiolibsql", "sqlite", "aiosqlite"]
POSTGRES = ["psycopg", "psycopg_async", "asyncpg"]


@pytest.fixture
def dispatchers(backend: str, url: URL) -> Dispatchers:
    """Makes dispatchers on the database of the store."""
    return Dispatchers(backend, url)


def left(store: Store) -> int:
    with store.session() as session:
        return int(session.scalars(select(func.count()).select_from(Timer)).one())


CONTEXT = multiprocessing.get_context("forkserver")


@contextmanager
def processes(work: Callable[..., None], *arguments: tuple[Any, ...]) -> Iterator[None]:
    """Processes that work, each with its own arguments, until they are killed."""
    CONTEXT.set_forkserver_preload([storming.__name__])
    started = [CONTEXT.Process(target=work, args=own) for own in arguments]
    try:
        for process in started:
            process.start()
        yield
        assert all(process.is_alive() for process in started), "a worker ended by itself"
    finally:
        for process in started:
            process.kill()
            process.join()


def text_of(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def be_taken_for_empty(store: Store) -> None:
    """Have the table as it is after a storm that was drained, if the server could not give its pages back."""
    store.sql("ALTER TABLE timers SET (autovacuum_enabled = false)")
    schedule(store, FUTURE, *(f"before-{number}" for number in range(500)))
    store.sql("DELETE FROM timers")
    store.sql("ANALYZE timers")
    assert store.sql("SELECT relpages > 0, reltuples FROM pg_class WHERE relname = 'timers'") == [(True, 0)]


@pytest.mark.parametrize(
    ("backend", "many", "before"),
    [
        *((backend, 4000, "warm") for backend in ("libsql", "aiolibsql", "psycopg", "asyncpg")),
        *(
            pytest.param(backend, 200_000, "warm", marks=pytest.mark.slow)
            for backend in ("libsql", "psycopg", "asyncpg")
        ),
        *(pytest.param(backend, 200_000, "analyzed", marks=pytest.mark.slow) for backend in ("psycopg", "asyncpg")),
    ],
    indirect=["backend"],
)
@pytest.mark.timeout(600)
def test_a_storm_is_fired_by_two_processes_in_bounded_memory(
    backend: str, url: URL, store: Store, *, many: int, before: str, record_property: Callable[[str, object], None]
) -> None:
    counts = [CONTEXT.RawArray("q", len(storming.COUNTS)) for _ in range(2)]
    fired = [CONTEXT.RawArray("B", many) for _ in range(2)]
    with processes(storming.fire, *((text_of(url), *own) for own in zip(counts, fired, strict=True))):

        def is_over(prefix: str, number: int) -> bool:
            with store.timers() as timers:
                timers.schedule_many(TimerEntry(uuid4(), f"{prefix}-{one}", PAST) for one in range(number))
            wait_until(lambda: left(store) == 0, seconds=30)
            return all(count[storming.WARMED_UP] >= 500 for count in counts)

        wait_until(lambda: is_over("warm", 500), seconds=60)
        if before == "analyzed":
            be_taken_for_empty(store)
        peaks = [count[storming.PEAK_KIB] for count in counts]
        with store.timers() as timers:
            timers.schedule_many(TimerEntry(uuid4(), f"storm-{one}", PAST) for one in range(many))
        started = time.monotonic()
        # not by asking the database, which has enough to do
        wait_until(lambda: sum(count[storming.FIRED] for count in counts) >= many, seconds=300)
        wait_until(lambda: left(store) == 0)
        seconds = time.monotonic() - started
    grown = [count[storming.PEAK_KIB] - peak for count, peak in zip(counts, peaks, strict=True)]
    shares = [sum(map(bool, own)) for own in fired]
    times = Counter(sum(pair) for pair in zip(*fired, strict=True))
    if many >= 100_000:
        row = {
            "backend": backend,
            "before": before,
            "timers": many,
            "first": shares[0],
            "second": shares[1],
            "lost": times[0],
            "double": many - times[0] - times[1],
            "grown MiB": round(max(grown) / 1024, 1),
            "seconds": round(seconds),
        }
        record_property("storms", row)
    assert times == {1: many}
    assert max(grown) < 16 * 1024
    # neither was busy for most of the time with reading what the server took for an empty table
    assert many < 100_000 or min(shares) > many // 4


@pytest.mark.parametrize("backend", ["psycopg", "asyncpg"], indirect=True)
def test_a_worker_of_an_empty_table_does_not_read_all_of_a_full_one(store: Store, dispatchers: Dispatchers) -> None:
    many = 20_000
    fired: list[Any] = []

    def handle(delivery: Fired) -> None:
        with delivery.transaction():
            pass
        fired.append(delivery.name)

    def fire(count: int) -> None:
        for _ in range(count):
            before = len(fired)
            schedule(store, PAST, "a")
            wait_until(lambda before=before: len(fired) > before)  # type: ignore[misc] # bound now

    def statistics() -> tuple[int, int]:
        (row,) = store.sql("SELECT seq_tup_read, n_tup_del FROM pg_stat_user_tables WHERE relname = 'timers'")
        return row[0], row[1]

    def read_while_firing(count: int) -> int:
        # what a connection has done is told when its transactions have been over for a moment
        wait_until(lambda: statistics()[1] == len(fired))
        before, _ = statistics()
        fire(count)
        wait_until(lambda: statistics()[1] == len(fired))
        return statistics()[0] - before

    with dispatchers.running(handle):
        # so often that the server keeps its plans, and they are those for a table that is known to be small
        fire(1)
        with store.connection(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ALTER TABLE timers SET (autovacuum_enabled = false)")
            connection.exec_driver_sql("VACUUM ANALYZE timers")
        fire(20)
        with store.timers() as timers:
            timers.schedule_many(TimerEntry(uuid4(), "later", FUTURE) for _ in range(many))
        wait_until(lambda: read_while_firing(5) < many)


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_table_that_was_analyzed_while_it_was_empty_is_drained_by_its_index(
    store: Store, dispatchers: Dispatchers
) -> None:
    many = 8000
    be_taken_for_empty(store)
    schedule(store, PAST, *(f"storm-{number}" for number in range(many)))
    fired: list[Any] = []

    def fire(delivery: Fired) -> None:
        fired.append(delivery.name)

    with dispatchers.running(fire), dispatchers.running(fire):
        wait_until(lambda: len(fired) == many, seconds=60)
    # what a connection has done is told when its transactions have been over for a moment, or at its end
    deleted = "SELECT n_tup_del FROM pg_stat_user_tables WHERE relname = 'timers'"
    wait_until(lambda: store.sql(deleted) == [(500 + many,)])
    read = "SELECT CAST(sum(idx_tup_read) AS bigint) FROM pg_stat_user_indexes WHERE relname = 'timers'"
    assert store.sql(read)[0][0] < 12 * many


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_worker_that_may_not_analyze_the_table_fires_its_timers_all_the_same(
    backend: str, url: URL, store: Store
) -> None:
    be_taken_for_empty(store)
    schedule(store, PAST, "a", "b")
    role = f"worker_of_{url.database}"
    store.sql(f"CREATE ROLE {role} LOGIN")
    try:
        store.sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON timers TO {role}")
        fired: list[Any] = []
        with Dispatchers(backend, url.set(username=role)).running(lambda delivery: fired.append(delivery.name)):
            wait_until(lambda: left(store) == 0)
        assert sorted(fired) == ["a", "b"]
        assert store.sql("SELECT reltuples FROM pg_class WHERE relname = 'timers'") == [(0,)]
    finally:
        store.sql(f"DROP OWNED BY {role}")
        store.sql(f"DROP ROLE {role}")


def test_timers_that_always_fail_keep_no_others_waiting(store: Store, dispatchers: Dispatchers) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, f"bad-{number}", PAST) for number in range(50))
    failed: Counter[Any] = Counter()
    late: list[timedelta] = []

    def fail(delivery: Fired) -> None:
        failed[delivery.name] += 1
        raise ConnectionError("always")

    retry = Backoff(first=timedelta(seconds=0.2), longest=timedelta(seconds=2))
    handlers = {"bad-*": fail, "good-*": lambda delivery: late.append(delivery.late_by)}
    with dispatchers.running(handlers, retry=retry):
        wait_until(lambda: len(failed) == 50)
        for number in range(20):
            with store.timers() as timers:
                timers.schedule(ALPHA, f"good-{number}", timers.now() + timedelta(seconds=0.02))
            wait_until(lambda fired=number + 1: len(late) == fired)  # type: ignore[misc] # bound now
    assert sorted(late)[10] < timedelta(seconds=0.5)
    assert left(store) == 50


def test_a_handler_that_hangs_keeps_its_timer_and_no_others_waiting(store: Store, dispatchers: Dispatchers) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "hanging", PAST - MINUTE)
        timers.schedule_many(TimerEntry(ALPHA, f"good-{number}", PAST) for number in range(60))
    let_go = threading.Event()
    attempts: list[int] = []
    fired: list[Any] = []

    def hang(delivery: Fired) -> None:
        attempts.append(delivery.attempt)
        delivery.wait_for(let_go.is_set, seconds=60)

    handlers = {"hanging": hang, "good-*": lambda delivery: fired.append(delivery.name)}
    try:
        with dispatchers.running(handlers, concurrency=2) as running:
            wait_until(lambda: attempts and left(store) == 1)
            assert len(fired) == 60
            let_go.set()
            running.stop()
    finally:
        let_go.set()
    assert attempts == [1]
    assert left(store) == 0


@pytest.mark.parametrize("backend", SQLITE, indirect=True)
def test_a_row_that_nobody_can_fire_keeps_no_others_waiting(
    store: Store, dispatchers: Dispatchers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "aion_timers")
    monkeypatch.setattr("aion_timers.repository._reported", set())  # as in a process that has just begun
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, f"good-{number}", PAST) for number in range(20))
    # an instant that only looks earlier than the others
    store.sql("INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES ('w', 't', '2026-06-03 02:30:00+05:00')")
    fired: list[Any] = []
    with dispatchers.running(lambda delivery: fired.append(delivery.name)):
        wait_until(lambda: left(store) == 1)
        with store.timers() as timers:
            timers.schedule(ALPHA, "good-last", PAST)
        wait_until(lambda: left(store) == 1)
    assert len(fired) == 21
    assert store.sql("SELECT fire_at FROM timers") == [("2026-06-03 02:30:00+05:00",)]
    assert sum("2026-06-03 02:30:00+05:00" in record.getMessage() for record in caplog.records) == 1


@pytest.fixture(params=[5 * MINUTE, -5 * MINUTE], ids=["ahead", "behind"])
def off_by(request: pytest.FixtureRequest) -> timedelta:
    """By how much the clock of one worker is wrong."""
    wrong: timedelta = request.param
    return wrong


@contextmanager
def right_and_wrong(backend: str, url: URL, store: Store, off_by: timedelta) -> Iterator[datetime]:
    """A worker with a right clock beside one whose clock is wrong, both of them ready; what time it is then."""
    store.sql("CREATE TABLE fired (name text, due text, seen text, attempt integer, who text)")
    schedule(store, PAST, "right-ready", "wrong-ready")
    arguments = [(backend, text_of(url), who, by) for who, by in (("right", timedelta(0)), ("wrong", off_by))]
    with processes(storming.fire_by_clock, *arguments):
        wait_until(lambda: left(store) == 0, seconds=30)
        yield datetime.fromisoformat(store.sql(f"SELECT {storming.CLOCKS[url.get_backend_name()]}")[0][0])


def schedule(store: Store, at: datetime, *names: str) -> None:
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(uuid4(), name, at) for name in names)


def is_early(due: str, seen: str) -> bool:
    return datetime.fromisoformat(seen) < datetime.fromisoformat(due)


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
def test_a_worker_whose_own_clock_is_wrong_is_on_time_and_so_are_others(
    backend: str, url: URL, store: Store, off_by: timedelta
) -> None:
    names = {"right-ready", "wrong-ready"}
    with right_and_wrong(backend, url, store, off_by) as now:
        for number in range(8):
            kinds = {f"{who}-{number}{kind}" for who in ("right", "wrong", "shared") for kind in ("", "-flaky")}
            schedule(store, now + timedelta(seconds=0.3 + 0.05 * number), *kinds)
            names |= kinds
        # long before five minutes have gone by
        wait_until(lambda: left(store) == 0, seconds=30)
    fired = store.sql("SELECT name, due, seen, attempt, who FROM fired")
    assert Counter(name for name, *_ in fired) == dict.fromkeys(names, 1)
    assert not [name for name, due, seen, *_ in fired if is_early(due, seen)]
    assert all(attempt == 2 for name, _, _, attempt, _ in fired if name.endswith("flaky"))


@pytest.mark.parametrize("backend", SQLITE, indirect=True)
def test_a_wrong_clock_on_a_file_makes_no_others_early_or_late_and_nothing_happens_twice(
    backend: str, url: URL, store: Store, off_by: timedelta
) -> None:
    names = {"right-ready", "wrong-ready"}
    with right_and_wrong(backend, url, store, off_by) as now:
        # what is overdue by both clocks, and a lease of either has run out, or runs on, by the other one's
        overdue = {f"shared-{number}" for number in range(30)}
        schedule(store, PAST, *overdue)
        names |= overdue
        for number in range(30, 38):
            kinds = {f"right-{number}", f"right-{number}-flaky", f"shared-{number}"}
            schedule(store, now + timedelta(seconds=0.3 + 0.05 * (number - 30)), *kinds)
            names |= kinds
        wait_until(lambda: left(store) == 0, seconds=30)
    fired = store.sql("SELECT name, due, seen, attempt, who FROM fired")
    assert Counter(name for name, *_ in fired) == dict.fromkeys(names, 1)
    assert not [name for name, due, seen, _, who in fired if who == "right" and is_early(due, seen)]
