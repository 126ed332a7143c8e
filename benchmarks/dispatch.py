# ruff: noqa: S608 - its statements are constants
"""How quick, and how punctual, a dispatcher is: ``make bench``.

On a libSQL file (WAL) and on a throw-away PostgreSQL server with the settings that it has when nobody changes them.
What is compared runs in turns, within each round; a figure is made of numbers of one round, and its median over the
rounds is held against the goal. Only ratios and differences mean something on a machine that does other things too.

==================  ==================================================================================================
drain               timers that are due at once, fired by `Dispatcher.run_due` with one handler that does next to
                    nothing, until the last one is settled. The floor is the driver alone: it leases a batch, calls a
                    function for each row, and deletes the batch, both fenced by a token; constant statement texts, no
                    checks. ``raw`` has a transaction for each of the two, ``raw 2`` deletes a batch and leases the
                    next one in one. Each contender is measured with several batch sizes, and the best of ours is held
                    against the best of the floor. libSQL commits with ``synchronous=FULL``.
two processes       the same on PostgreSQL, all of it by one or by two processes that are connected already.
transaction         each timer in a `Delivery.transaction` of its own, which writes a row, against a loop written by
                    hand with SQLAlchemy: lease a batch; then for each timer a session that locks the row by its key
                    and token, writes the same row, deletes the timer by key and token, and commits.
lag                 how late a handler starts, at 200 timers a second, less how late ``asyncio.sleep`` alone wakes up,
                    with one sleeping task for each of the same instants. libSQL commits with ``synchronous=NORMAL``.
wake-up             another process schedules a timer for now: from when its commit has returned to the handler's
                    start. The worker sleeps meanwhile. libSQL commits with ``synchronous=NORMAL``.
idle                a worker with nothing to do beside many future timers: the statements that reach its driver, those
                    that only look at whether a file has changed (``PRAGMA data_version``) apart; on PostgreSQL also
                    the transactions that the server counts, those of the listener among them; and the processor time
                    of the whole process.
==================  ==================================================================================================
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from raw import LibsqlRaw, PostgresRaw, Raw, Row, Timer, console, new_database, overdue, postgresql_server, to_json
from rich.table import Table
from sqlalchemy import URL, Column, Engine, MetaData, Uuid, create_engine, event, insert, make_url, text
from sqlalchemy import Table as SqlTable
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import TimerEntry, TimerRepository, migrate
from aion_timers.dispatcher import Delivery, Dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RATE: Final = 200
BATCHES: Final = (100, 500, 1000)
LEASE: Final = timedelta(seconds=30)
AHEAD: Final = 1.0
"""Seconds from when the timers of a lag measurement are scheduled to the first of them."""

EFFECTS: Final = SqlTable("effects", MetaData(), Column("workflow_id", Uuid, primary_key=True))


def nothing(_: object) -> None:
    """The handler of a drain."""


# -- the floors -------------------------------------------------------------------------------------------------------


class Floor(Raw):
    """Lease and delete, done with a driver alone."""

    _lease: str

    def drain(self, batch: int, handler: Callable[[Timer], None]) -> int:
        """Lease, handle and delete until nothing is due; how many there were."""
        count = 0
        while True:
            with self.transaction():
                token, rows = self._leased(batch)
            for timer in self.decoded(rows):
                handler(timer)
                count += 1
            if not rows:
                return count
            with self.transaction():
                self._delete(token, rows)

    def drain_2(self, batch: int, handler: Callable[[Timer], None]) -> int:
        """The same, each batch deleted in the transaction that leases the next one."""
        count = 0
        token, rows = UUID(int=0), []
        while True:
            with self.transaction():
                if rows:
                    self._delete(token, rows)
                token, rows = self._leased(batch)
            for timer in self.decoded(rows):
                handler(timer)
                count += 1
            if not rows:
                return count

    def _leased(self, batch: int) -> tuple[UUID, list[Row]]:
        token = uuid4()
        rows = self.execute(self._lease, (self._token(token), batch)).fetchall()
        return token, sorted(rows, key=lambda row: (row[2], row[0], row[1]))

    def _token(self, token: UUID) -> object:
        raise NotImplementedError

    def _delete(self, token: UUID, rows: Sequence[Row]) -> None:
        raise NotImplementedError


_FREE: Final = "(lease_until IS NULL OR lease_until <= {now})"
_FIRST: Final = "ORDER BY fire_at, workflow_id, timer_id LIMIT"


class LibsqlFloor(LibsqlRaw, Floor):
    """The floor of a libSQL file."""

    _now = "strftime('%Y-%m-%dT%H:%M:%f000000Z', 'now')"
    _lease = (
        "UPDATE timers SET lease_token = ?, lease_until = strftime('%Y-%m-%dT%H:%M:%f000000Z', 'now', '+30 seconds'),"
        " attempts = attempts + 1 WHERE (workflow_id, timer_id) IN (SELECT workflow_id, timer_id FROM timers"
        f" WHERE fire_at <= {_now} AND {_FREE.format(now=_now)} {_FIRST} ?) RETURNING workflow_id, timer_id, fire_at"
    )
    _done = (
        "DELETE FROM timers WHERE (workflow_id, timer_id, lease_token) IN"
        " (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?))"
    )

    def _token(self, token: UUID) -> str:
        return str(token)

    def _delete(self, token: UUID, rows: Sequence[Row]) -> None:
        held = str(token)
        self.execute(self._done, (to_json([(workflow_id, timer_id, held) for workflow_id, timer_id, _ in rows]),))


class PostgresFloor(PostgresRaw, Floor):
    """The floor of a PostgreSQL server."""

    _now = "statement_timestamp()"
    _lease = (
        "WITH mine AS MATERIALIZED (SELECT ctid FROM timers"
        f" WHERE fire_at <= {_now} AND {_FREE.format(now=_now)} {_FIRST} %b FOR UPDATE SKIP LOCKED)"
        " UPDATE timers SET lease_token = %b, lease_until = clock_timestamp() + interval '30 seconds',"
        " attempts = attempts + 1 WHERE ctid = ANY (ARRAY(SELECT ctid FROM mine))"
        " RETURNING workflow_id, timer_id, fire_at"
    )
    _done = (
        "DELETE FROM timers USING unnest(%b::uuid[], %b::text[]) AS given (workflow, timer)"
        " WHERE workflow_id = workflow AND timer_id = timer AND lease_token = %b"
    )

    def _leased(self, batch: int) -> tuple[UUID, list[Row]]:
        token = uuid4()
        rows = self.execute(self._lease, (batch, token)).fetchall()
        return token, sorted(rows, key=lambda row: (row[2], row[0].int, row[1]))

    def _delete(self, token: UUID, rows: Sequence[Row]) -> None:
        self.execute(self._done, ([row[0] for row in rows], [row[1] for row in rows], token))


# -- databases --------------------------------------------------------------------------------------------------------


@dataclass
class Database:
    """A migrated database, with both ways to it."""

    name: str
    url: URL
    engine: Engine
    floor: Floor

    @property
    def is_libsql(self) -> bool:
        """Whether it is a file."""
        return self.name == "libsql"

    def address(self) -> str:
        """The URL for another process."""
        return self.url.render_as_string(hide_password=False)

    def fill(self, timers: Sequence[Timer]) -> None:
        """Schedule these timers, and do what the database would do later about it."""
        with self.engine.begin() as connection:
            TimerRepository(connection).schedule_many([TimerEntry(*timer) for timer in timers])
        self.floor.settle()

    def fill_with_future(self, rows: int) -> None:
        """Put so many timers there that are due in a day or more, by one statement of SQL."""
        if self.is_libsql:
            statement = (
                "INSERT INTO timers (workflow_id, timer_id, fire_at) SELECT '\"' || lower(hex(randomblob(4)) || '-' ||"
                " hex(randomblob(2)) || '-' || hex(randomblob(2)) || '-' || hex(randomblob(2)) || '-' ||"
                " hex(randomblob(6))) || '\"', '{\"Named\":\"wake-up\"}', strftime('%Y-%m-%dT%H:%M:%f000000Z', 'now',"
                " '+1 day', '+' || (value * 7) || ' seconds') FROM (WITH RECURSIVE n(value) AS"
                " (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < :rows) SELECT value FROM n)"
            )
        else:
            statement = (
                'INSERT INTO timers (workflow_id, timer_id, fire_at) SELECT gen_random_uuid(), \'{"Named":"wake-up"}\','
                " now() + interval '1 day' + value * interval '7 seconds' FROM generate_series(1, :rows) AS value"
            )
        with self.engine.begin() as connection:
            # written without colons that would look like parameters
            connection.execute(text(statement.replace("%H:%M:", "%H\\:%M\\:")), {"rows": rows})
        self.floor.settle()

    def count(self, table: str) -> int:
        """How many rows a table has."""
        with self.engine.connect() as connection:
            return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())

    def empty(self) -> None:
        """Delete all that was written."""
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM timers"))
            connection.execute(text("DELETE FROM effects"))
        self.floor.settle()

    def close(self) -> None:
        """Close all connections."""
        self.floor.close()
        self.engine.dispose()


def _migrated(name: str, url: URL, floor: Callable[[], Floor]) -> Database:
    engine = create_engine(url)
    migrate.upgrade(engine)
    EFFECTS.create(engine)
    return Database(name, url, engine, floor())


@contextmanager
def libsql(directory: Path) -> Iterator[Database]:
    """A file."""
    path = directory / "timers.db"
    database = _migrated("libsql", URL.create("sqlite+libsql", database=str(path)), lambda: LibsqlFloor(path))
    try:
        yield database
    finally:
        database.close()


@contextmanager
def postgresql(directory: Path) -> Iterator[Database]:
    """A database on a server of its own."""
    with postgresql_server(directory) as server:
        url = new_database(server, "timers")
        database = _migrated("postgresql", url, lambda: PostgresFloor(url))
        try:
            yield database
        finally:
            database.close()


DATABASES: Final = {"libsql": libsql, "postgresql": postgresql}


# -- figures ----------------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """A number for each round, and the goal for their median."""

    what: str
    unit: str
    goal: float | None = None
    at_most: bool = False
    values: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, if there is one."""
        if self.goal is None:
            return None
        return median(self.values) <= self.goal if self.at_most else median(self.values) >= self.goal


def ratio_of(what: str, ours: Sequence[float], theirs: Sequence[float], goal: float | None = None) -> Figure:
    """What part of the others' rates ours are, round by round."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Figure(what, "ratio", goal, values=ratios, ours=list(ours), theirs=list(theirs))


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print the table of one database."""
    table = Table(title=title)
    table.add_column("figure", no_wrap=True)
    for column in ("ours", "theirs", "min", "median", "max", "unit", "goal", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for figure in figures:
        sides = (f"{median(side):,.1f}" if side else "" for side in (figure.ours, figure.theirs))
        spread = (f"{number:.2f}" for number in (min(figure.values), median(figure.values), max(figure.values)))
        goal = "" if figure.goal is None else f"{'<=' if figure.at_most else '>='} {figure.goal:g}"
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[figure.met]
        table.add_row(figure.what, *sides, *spread, figure.unit, goal, verdict)
    console.print(table)


# -- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def started(*commands: Sequence[str]) -> Iterator[Callable[[], list[Any]]]:
    """Processes that are ready; a function lets them go and waits for the JSON that each prints."""
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our scripts
        for command in commands
    ]

    def go() -> list[Any]:
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate()[0]) for process in processes]

    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        yield go
    finally:
        for process in processes:
            process.kill()
            process.wait()


def worker(kind: str, *arguments: str) -> Sequence[str]:
    """The command that runs one of `WORK`."""
    return [sys.executable, __file__, "--worker", kind, *arguments]


def _await_go() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def _worker_engine(url: str, *, normal: bool = False) -> Engine:
    address = make_url(url)
    libsql_options = {"synchronous": "NORMAL"} if normal and address.get_backend_name() == "sqlite" else {}
    engine = create_engine(address, **libsql_options)
    with engine.connect() as connection:
        TimerRepository(connection).now()
    return engine


def work_drain(url: str, batch: str) -> object:
    """Fire what is due; how many, and from when to when by the clock that all processes share."""
    dispatcher = Dispatcher(_worker_engine(url), nothing, batch=int(batch))
    _await_go()
    began = time.monotonic()
    handled = dispatcher.run_due()
    return handled, began, time.monotonic()


def work_lag(url: str, count: str) -> object:
    """Fire timers as they come; how late each was, in seconds."""
    late: list[float] = []

    def note(delivery: Delivery) -> None:
        late.append(time.time() - delivery.timer.fire_at.timestamp())
        if len(late) == int(count):
            dispatcher.stop()

    dispatcher = Dispatcher(_worker_engine(url, normal=True), note)
    _await_go()
    dispatcher.run()
    return late


def work_sleep(count: str) -> object:
    """Sleep until each of as many instants; how late each was, in seconds."""

    async def until(instant: float) -> float:
        await asyncio.sleep(instant - time.time())
        return time.time() - instant

    async def all_of_them() -> list[float]:
        first = time.time() + AHEAD
        return await asyncio.gather(*(until(first + number / RATE) for number in range(int(count))))

    _await_go()
    return asyncio.run(all_of_them())


def work_schedule(url: str, count: str) -> object:
    """Schedule timers for now, one by one; when each commit had returned."""
    engine = _worker_engine(url, normal=True)
    committed = {}
    _await_go()
    for _ in range(int(count)):
        time.sleep(random.uniform(0.05, 0.15))
        workflow_id = uuid4()
        with engine.begin() as connection:
            TimerRepository(connection).schedule(workflow_id, "wake-up", datetime.now(UTC))
        committed[str(workflow_id)] = time.time()
    return committed


def work_idle(url: str, seconds: str) -> object:
    """Have nothing to do; the statements and the processor time of so many seconds."""
    counts = {"statements": 0, "looks": 0}
    engine = _worker_engine(url)
    if engine.dialect.name == "sqlite":
        from aion_timers.libsql import dbapi  # noqa: PLC0415 - not where there is no such driver

        execute, data_version = dbapi.Cursor.execute, dbapi.Connection.data_version

        def counted(cursor: dbapi.Cursor, sql: str, parameters: Sequence[Any] = ()) -> dbapi.Cursor:
            counts["statements"] += 1
            return execute(cursor, sql, parameters)

        def looked(connection: dbapi.Connection) -> int:
            counts["looks"] += 1
            return data_version(connection)

        dbapi.Cursor.execute = counted  # type: ignore[method-assign] # the watcher's statements pass by the engine
        dbapi.Connection.data_version = looked  # type: ignore[method-assign]
    else:

        def count(*_: object) -> None:
            counts["statements"] += 1

        event.listen(engine, "before_cursor_execute", count)
    dispatcher = Dispatcher(engine, nothing)
    measured: dict[str, float] = {}

    def measure() -> None:
        time.sleep(2)  # it has connected, and seen that there is nothing
        usage, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        before = dict(counts)
        time.sleep(float(seconds))
        after, end = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        for name, count in counts.items():
            measured[name] = (count - before[name]) / (end - start)
        spent = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
        measured["cpu"] = 100 * spent / (end - start)
        dispatcher.stop()

    _await_go()
    thread = threading.Thread(target=measure)
    thread.start()
    dispatcher.run()
    thread.join()
    return measured


WORK: Final[dict[str, Callable[..., object]]] = {
    "drain": work_drain,
    "lag": work_lag,
    "sleep": work_sleep,
    "schedule": work_schedule,
    "idle": work_idle,
}


# -- the measurements -------------------------------------------------------------------------------------------------


@dataclass
class Effort:
    """How much of everything."""

    rounds: int
    warm_ups: int
    timers: int
    transactions: int
    lag_seconds: float
    wakes: int
    rows: int
    idle_seconds: float


def drain(database: Database, effort: Effort) -> list[Figure]:
    """All timers are due; ours and the floor, each with several batch sizes."""

    def ours(batch: int) -> int:
        return Dispatcher(database.engine, nothing, batch=batch).run_due()

    contenders: dict[tuple[str, int], Callable[[], int]] = {}
    for batch in BATCHES:
        contenders["ours", batch] = lambda batch=batch: ours(batch)
        contenders["raw", batch] = lambda batch=batch: database.floor.drain(batch, nothing)
        contenders["raw 2", batch] = lambda batch=batch: database.floor.drain_2(batch, nothing)
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for round_number in range(-effort.warm_ups, effort.rounds):
        order = list(contenders.items())
        for key, drained in order if round_number % 2 else reversed(order):
            database.fill(list(overdue(effort.timers)))
            gc.collect()
            start = time.perf_counter()
            handled = drained()
            seconds = time.perf_counter() - start
            assert handled == effort.timers, (key, handled)
            if round_number >= 0:  # the caches are warm now
                rates[key].append(handled / seconds)
    best, floor = (
        max((key for key in rates if (key[0] == "ours") is is_ours), key=lambda key: median(rates[key]))
        for is_ours in (True, False)
    )
    against = f"{floor[0]} with {floor[1]}"
    return [
        ratio_of(
            f"drain, batch {key[1]}, of {against}",
            rates[key],
            rates[floor],
            0.5 if key == best else None,
        )
        for key in rates
        if key[0] == "ours"
    ]


def two_processes(database: Database, effort: Effort) -> list[Figure]:
    """One process against two."""
    batch = BATCHES[1]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for round_number in range(effort.rounds):
        for processes in (1, 2) if round_number % 2 else (2, 1):
            database.fill(list(overdue(effort.timers)))
            with started(*[worker("drain", database.address(), str(batch))] * processes) as go:
                done = go()
            assert sum(handled for handled, _, _ in done) == effort.timers
            seconds = max(ended for _, _, ended in done) - min(began for _, began, _ in done)
            rates[processes].append(effort.timers / seconds)
    return [ratio_of("drain, 2 processes of 1", rates[2], rates[1], 1.5)]


def transactions(database: Database, effort: Effort) -> list[Figure]:
    """One timer a transaction, which also writes a row."""
    sessions = sessionmaker(database.engine)

    def handle(delivery: Delivery) -> None:
        with delivery.transaction() as session:
            session.execute(insert(EFFECTS), {"workflow_id": delivery.timer.workflow_id})

    contenders: dict[str, Callable[[], int]] = {
        "ours": lambda: Dispatcher(sessions, handle).run_due(),
        "by hand": lambda: by_hand(database, sessions),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(effort.rounds):
        for name, fire in contenders.items() if round_number % 2 else reversed(contenders.items()):
            database.empty()
            database.fill(list(overdue(effort.transactions)))
            start = time.perf_counter()
            handled = fire()
            rates[name].append(handled / (time.perf_counter() - start))
            assert handled == effort.transactions == database.count("effects")
            assert database.count("timers") == 0
    database.empty()
    return [ratio_of("transaction(), of a loop by hand", rates["ours"], rates["by hand"], 0.5)]


def by_hand(database: Database, sessions: sessionmaker[Session]) -> int:
    """What an application would write without a library, in the statements of SQLAlchemy; how many it fired."""
    same = "workflow_id = :workflow AND timer_id = :timer AND lease_token = :token"
    if database.is_libsql:
        now, until = "strftime('%Y-%m-%dT%H:%M:%f000000Z', 'now')", "'now', '+30 seconds'"
        lease = (
            f"UPDATE timers SET lease_token = :token, lease_until = strftime('%Y-%m-%dT%H:%M:%f000000Z', {until}),"
            " attempts = attempts + 1 WHERE (workflow_id, timer_id) IN (SELECT workflow_id, timer_id FROM timers"
            f" WHERE fire_at <= {now} AND {_FREE.format(now=now)} {_FIRST} :batch) RETURNING workflow_id, timer_id"
        ).replace("%H:%M:", "%H\\:%M\\:")
        lock = f"UPDATE timers SET lease_token = lease_token WHERE {same} RETURNING 1"
    else:
        now = "statement_timestamp()"
        lease = (
            "UPDATE timers SET lease_token = :token, lease_until = clock_timestamp() + interval '30 seconds',"
            " attempts = attempts + 1 WHERE (workflow_id, timer_id) IN (SELECT workflow_id, timer_id FROM timers"
            f" WHERE fire_at <= {now} AND {_FREE.format(now=now)} {_FIRST} :batch FOR UPDATE SKIP LOCKED)"
            " RETURNING workflow_id, timer_id"
        )
        lock = f"SELECT 1 FROM timers WHERE {same} FOR UPDATE"
    statements = [text(statement) for statement in (lease, lock, f"DELETE FROM timers WHERE {same}")]
    fired = 0
    while True:
        token: Any = str(uuid4()) if database.is_libsql else uuid4()
        with sessions() as session:
            rows = session.execute(statements[0], {"token": token, "batch": 100}).all()
            session.commit()
        if not rows:
            return fired
        for workflow, timer in rows:
            mine = {"workflow": workflow, "timer": timer, "token": token}
            with sessions() as session:
                assert session.execute(statements[1], mine).all()
                session.execute(
                    insert(EFFECTS), {"workflow_id": UUID(workflow[1:-1]) if database.is_libsql else workflow}
                )
                session.execute(statements[2], mine)
                session.commit()
            fired += 1


def lag(database: Database, effort: Effort) -> list[Figure]:
    """Timers at a steady rate, beside tasks that sleep until the same instants."""
    count = int(RATE * effort.lag_seconds)
    middle = Figure("lag p50, above asyncio.sleep", "ms", 2, at_most=True)
    tail = Figure("lag p99, above asyncio.sleep", "ms", 10, at_most=True)
    for round_number in range(effort.rounds):
        late: dict[str, list[float]] = {}
        for name in ("ours", "sleep") if round_number % 2 else ("sleep", "ours"):
            if name == "sleep":
                with started(worker("sleep", str(count))) as go:
                    (late[name],) = go()
                continue
            with started(worker("lag", database.address(), str(count))) as go:
                first = datetime.now(UTC) + timedelta(seconds=AHEAD)
                database.fill([(uuid4(), "wake-up", first + timedelta(seconds=n / RATE)) for n in range(count)])
                (late[name],) = go()
        assert min(late["ours"]) >= 0, "a timer was early"
        for figure, part in ((middle, 50), (tail, 99)):
            ours, theirs = (1000 * quantiles(late[name], n=100)[part - 1] for name in ("ours", "sleep"))
            figure.ours.append(ours)
            figure.theirs.append(theirs)
            figure.values.append(ours - theirs)
    return [middle, tail]


def wake_ups(database: Database, effort: Effort) -> list[Figure]:
    """Timers that another process schedules for now."""
    goal = 60 if database.is_libsql else 5
    middle = Figure("wake-up p50", "ms", goal, at_most=True)
    tail = Figure("wake-up p95", "ms")
    options = {"synchronous": "NORMAL"} if database.is_libsql else {}
    for _ in range(effort.rounds):
        engine = create_engine(database.url, **options)
        fired: dict[str, float] = {}

        def note(delivery: Delivery, fired: dict[str, float] = fired) -> None:
            fired[str(delivery.timer.workflow_id)] = time.time()

        dispatcher = Dispatcher(engine, note)
        thread = threading.Thread(target=dispatcher.run)
        thread.start()
        try:
            with started(worker("schedule", database.address(), str(effort.wakes))) as go:
                (committed,) = go()
            until = time.monotonic() + 10
            while len(fired) < len(committed) and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            dispatcher.stop()
            thread.join()
            engine.dispose()
        waits = [1000 * (fired[workflow_id] - at) for workflow_id, at in committed.items()]
        middle.values.append(median(waits))
        tail.values.append(quantiles(waits, n=20)[-1])
    return [middle, tail]


def idle(database: Database, effort: Effort) -> list[Figure]:
    """Nothing to do beside many future timers."""
    database.fill_with_future(effort.rows)
    assert database.count("timers") == effort.rows
    statements = Figure("idle: statements", "/s", 2, at_most=True)
    looks = Figure("idle: looks at data_version", "/s")
    counted = Figure("idle: server's transactions", "/s", 2, at_most=True)
    cpu = Figure("idle: processor time", "% of core", 1, at_most=True)
    for _ in range(1 if effort.rounds == 1 else 2):
        with started(worker("idle", database.address(), str(effort.idle_seconds))) as go:
            before, start = transactions_of(database), time.monotonic()
            (measured,) = go()
            # one is the question before, and the worker's begin and end are in it, too
            served = (transactions_of(database) - before - 1) / (time.monotonic() - start)
        statements.values.append(measured["statements"])
        looks.values.append(measured["looks"])
        counted.values.append(served)
        cpu.values.append(measured["cpu"])
    return [statements, looks if database.is_libsql else counted, cpu]


def transactions_of(database: Database) -> int:
    """How many transactions the server has ended in this database; 0 for a file."""
    if database.is_libsql:
        return 0
    with database.engine.connect() as connection:
        # the other processes tell the server what they did once a second, at most
        time.sleep(1.5)
        question = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        return int(connection.execute(text(question)).scalar_one())


MEASUREMENTS: Final[dict[str, Callable[[Database, Effort], list[Figure]]]] = {
    "drain": drain,
    "processes": two_processes,
    "transaction": transactions,
    "lag": lag,
    "wake-up": wake_ups,
    "idle": idle,
}


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure and print; a missed goal is no failure unless it is asked for: the machine has its part in it."""
    parser = argparse.ArgumentParser(description="Measure dispatchers.")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (5, or 1 with --quick)")
    parser.add_argument("--database", choices=[*DATABASES, "both"], default="both")
    parser.add_argument("--only", choices=list(MEASUREMENTS), help="this measurement alone")
    parser.add_argument("--quick", action="store_true", help="little of everything: done in a quarter of a minute")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a goal is missed")
    parser.add_argument("--directory", type=Path, help="where the databases are made, for a while; its disk counts")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *arguments = options.worker
        print(json.dumps(WORK[kind](*arguments)))
        return 0
    if options.quick:
        effort = Effort(1, 0, timers=300, transactions=50, lag_seconds=0.5, wakes=5, rows=10_000, idle_seconds=1)
    else:
        effort = Effort(
            5, 1, timers=20_000, transactions=2_000, lag_seconds=5, wakes=50, rows=1_000_000, idle_seconds=20
        )
    effort.rounds = options.rounds or effort.rounds
    figures = []
    for name in DATABASES if options.database == "both" else [options.database]:
        with (
            tempfile.TemporaryDirectory(prefix="aion-timers-bench-", dir=options.directory) as directory,
            DATABASES[name](Path(directory)) as database,
        ):
            found = []
            for kind, measurement in MEASUREMENTS.items():
                if options.only in (None, kind) and not (kind == "processes" and database.is_libsql):
                    found += measurement(database, effort)
            if found:
                show(f"{name}: {effort.rounds} rounds, drain of {effort.timers:,}, idle beside {effort.rows:,}", found)
        figures += found
    judged = [figure for figure in figures if figure.met is not None]
    met = sum(figure.met is True for figure in judged)
    console.print(f"goals met: {met} of {len(judged)}")
    return int(options.strict and met < len(judged))


if __name__ == "__main__":
    sys.exit(main())
