"""Much at once, and handlers and clocks that misbehave: everybody else is on time."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
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
WARMED_UP = 500
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


@pytest.mark.parametrize(
    ("backend", "many"),
    [
        *((backend, 4000) for backend in ("libsql", "aiolibsql", "psycopg", "asyncpg")),
        *(pytest.param(backend, 200_000, marks=pytest.mark.slow) for backend in ("libsql", "psycopg", "asyncpg")),
    ],
    indirect=["backend"],
)
@pytest.mark.timeout(600)
def test_a_storm_is_fired_by_two_processes_in_bounded_memory(
    backend: str, url: URL, store: Store, many: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def schedule(number: int) -> int:
        with store.timers() as timers:
            return int(timers.schedule_many(TimerEntry(uuid4(), f"storm-{one}", PAST) for one in range(number)))

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([storming.__name__])
    counts = [context.RawArray("q", 2) for _ in range(2)]
    address = url.render_as_string(hide_password=False)
    workers = [context.Process(target=storming.fire, args=(address, count)) for count in counts]
    scheduled = 0
    try:
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + 60
        while min(count[storming.FIRED] for count in counts) < WARMED_UP and time.monotonic() < deadline:
            scheduled += schedule(WARMED_UP)
            wait_until(lambda: left(store) == 0)
        # what a small backlog takes, to be compared with what a large one does
        before = [count[storming.PEAK_KIB] for count in counts]
        scheduled += schedule(many)
        started = time.monotonic()
        wait_until(lambda: left(store) == 0, seconds=300)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    fired = [count[storming.FIRED] for count in counts]
    grown = [(count[storming.PEAK_KIB] - peak) / 1024 for count, peak in zip(counts, before, strict=True)]
    if many > 100_000:
        with capsys.disabled():
            print(  # noqa: T201 - the table of `make soak`
                f"\n{backend}: {many} due at once, fired by two processes {fired}"
                f" in {time.monotonic() - started:.0f} s; memory grew by {max(grown):.1f} MiB"
            )
    # a kill comes after the last one was settled, so nobody fired anything twice
    assert sum(fired) == scheduled
    assert min(fired) >= WARMED_UP
    assert max(grown) < 32


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
def wrong_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process whose own clock is wrong, as far as this library looks at it."""

    class SameKind(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, datetime)

    class WrongDatetime(datetime, metaclass=SameKind):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + request.param

    real = time.time
    for name, module in list(sys.modules.items()):
        if name.startswith("aion_timers") and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", WrongDatetime)
    monkeypatch.setattr(time, "time", lambda: real() + request.param.total_seconds())
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("backend", POSTGRES, indirect=True)
@pytest.mark.usefixtures("wrong_clock")
def test_a_worker_whose_own_clock_is_wrong_is_on_time_by_the_servers(store: Store, dispatchers: Dispatchers) -> None:
    clock = "SELECT clock_timestamp() AT TIME ZONE 'UTC'"

    def server_time() -> datetime:
        instant: datetime = store.sql(clock)[0][0]
        return instant.replace(tzinfo=UTC)

    fired: dict[Any, tuple[datetime, timedelta]] = {}

    def handle(delivery: Fired) -> None:
        with delivery.transaction() as session:
            at = delivery.timers(session).now()
        fired[delivery.name] = (at, delivery.late_by)

    start = server_time()
    instants = {f"t{number}": start + timedelta(seconds=0.3 * number) for number in range(4)}
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, name, at) for name, at in instants.items())
    with dispatchers.running(handle):
        wait_until(lambda: len(fired) == 4)
    for name, at in instants.items():
        assert fired[name][0] >= at
        assert fired[name][1] < timedelta(minutes=1)
    assert max(at for at, _ in fired.values()) < start + MINUTE
