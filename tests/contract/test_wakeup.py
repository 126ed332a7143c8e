"""A waiter rings when somebody has committed; it is in nobody's way, survives outages, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import pytest
from sqlalchemy import URL, create_engine, event, make_url, pool
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from aion_timers import wakeup
from aion_timers.libsql import dbapi
from aion_timers.wakeup import AsyncWakeup, Wakeup
from tests.conftest import open_engine
from tests.forkserver import fork_server
from tests.store import ASYNC_DRIVERS, HEARING, SERVERS, Store

SOON = 30.0  # seconds that nobody waits for, unless something is broken
NEVER = 0.2  # seconds in which something that must not happen would have
POSTGRES = pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
FILES = pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
ASYNC_FILES = pytest.mark.parametrize("backend", ["aiolibsql", "aiosqlite"], indirect=True)


@pytest.fixture(params=HEARING)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend whose waiters hear."""
    return str(request.param)


class Waiter:
    """A waiter of either kind, which looks sync; the async one runs in an event loop of its own thread."""

    def __init__(self, engine: Any) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        if not isinstance(engine, AsyncEngine):
            self.inner: Any = Wakeup(engine)
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.inner = self.run(self._enter(engine))

    @staticmethod
    async def _enter(engine: AsyncEngine) -> AsyncWakeup:
        return await AsyncWakeup(engine).__aenter__()

    def run(self, result: Any) -> Any:
        """The result of a coroutine of the loop, or a result as it is."""
        if self._loop is None:
            return result
        return asyncio.run_coroutine_threadsafe(result, self._loop).result()

    def wait(self, timeout: float) -> bool:
        """Whether it rang."""
        return bool(self.run(self.inner.wait(timeout)))

    def close(self) -> None:
        """Close the waiter; its loop goes on, so that what is left behind can be seen."""
        self.run(self.inner.close())

    def tasks(self) -> set[str]:
        """The names of the loop's other tasks."""

        async def names() -> set[str]:
            return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}

        return set() if self._loop is None else set(self.run(names()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@contextmanager
def listening(engine: Any) -> Iterator[Waiter]:
    """A waiter that has rung for its beginning."""
    with Waiter(engine) as waiter:
        assert waiter.wait(SOON)
        yield waiter


def stir(connection: Any, store: Store, table: str = "timers") -> None:
    """What rings, within a transaction that is to be committed."""
    if store.is_sqlite:
        connection.exec_driver_sql(f"INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES ('{uuid4()}', '', '')")
    else:
        connection.exec_driver_sql(f"SELECT pg_notify('aion_timers_' || CAST('{table}'::regclass AS oid), '')")


def stirred(store: Store, table: str = "timers") -> None:
    with store.connection() as connection:
        stir(connection, store, table)


def listeners(store: Store) -> list[tuple[Any, ...]]:
    return store.sql(
        "SELECT pid, state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND query NOT LIKE '%pg_stat_activity%' AND (query ILIKE 'LISTEN%' OR query = 'SELECT 1')"
    )


def test_rings_when_it_begins_since_nobody_heard_what_came_before(store: Store) -> None:
    with Waiter(store.engine) as waiter:
        assert waiter.wait(SOON)
        assert not waiter.wait(NEVER)


@pytest.mark.parametrize("backend", SERVERS, indirect=True)
def test_on_a_libsql_server_nothing_rings_but_who_calls(store: Store) -> None:
    with Waiter(store.engine) as waiter:
        stirred(store)
        assert not waiter.wait(NEVER)
        waiter.inner.wake()
        assert waiter.wait(SOON)


def test_rings_after_another_connection_commits_and_not_before(store: Store) -> None:
    with listening(store.engine) as waiter:
        with store.connection() as connection:
            stir(connection, store)
            assert not waiter.wait(NEVER)
        assert waiter.wait(SOON)


def test_a_transaction_that_is_rolled_back_does_not_ring(store: Store) -> None:
    with listening(store.engine) as waiter:
        with store.connection() as connection:
            stir(connection, store)
            connection.rollback()
        assert not waiter.wait(NEVER)


def test_rings_once_for_many_and_not_late(store: Store) -> None:
    with listening(store.engine) as waiter:
        for _ in range(20):
            stirred(store)
        assert waiter.wait(SOON)
        rings = 1
        while waiter.wait(NEVER):  # the last of them may have come after the first ring
            rings += 1
        assert rings <= 20
        began = time.monotonic()
        for _ in range(10):
            stirred(store)
            assert waiter.wait(SOON)
        # in the mean, which one stall does not spoil
        assert time.monotonic() - began < 5


def test_what_comes_between_two_waits_is_kept(store: Store) -> None:
    with listening(store.engine) as waiter:
        assert not waiter.wait(0)
        stirred(store)
        eventually(lambda: waiter.wait(0))
        assert not waiter.wait(NEVER)


@pytest.mark.parametrize("timeout", [-1, 0, 0.05, 0.4])
def test_a_wait_lasts_as_long_as_it_was_told(store: Store, timeout: float) -> None:
    with listening(store.engine) as waiter:

        def overrun() -> float:
            began = time.monotonic()
            assert not waiter.wait(timeout)
            return time.monotonic() - began - max(timeout, 0)

        overruns = [overrun()]
        while min(overruns) >= 0.1:  # a stall lengthens some
            assert len(overruns) < 20
            overruns.append(overrun())
        assert min(overruns) >= -0.01


OTHER_PROCESS = """
import sys
from sqlalchemy import create_engine, text
from aion_timers import prepare_sqlite
engine = create_engine(sys.argv[1])
if engine.dialect.driver == "pysqlite":
    prepare_sqlite(engine)
with engine.begin() as connection:
    connection.execute(text(sys.argv[2]))
"""


def test_rings_for_another_process(store: Store, url: URL) -> None:
    sync = url.set(drivername=url.drivername.replace("aiosqlite", "pysqlite").replace("aiolibsql", "libsql"))
    if not store.is_sqlite:
        sync = url.set(drivername="postgresql+psycopg")
    statement = (
        "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES ('a', 'b', 'c')"
        if store.is_sqlite
        else "SELECT pg_notify('aion_timers_' || CAST('timers'::regclass AS oid), '')"
    )
    with listening(store.engine) as waiter:
        shown = sync.render_as_string(hide_password=False)
        other = fork_server().start(["-c", OTHER_PROCESS, shown, statement], Path.cwd(), os.environ)
        _, report = other.communicate(60)
        assert other.returncode == 0, report
        assert waiter.wait(SOON)


def test_a_repository_that_schedules_rings_on_a_file(store: Store) -> None:
    if not store.is_sqlite:
        return  # what PostgreSQL's statements send is proved with them
    with listening(store.engine) as waiter:
        with store.timers() as timers:
            timers.schedule(uuid4(), "a", datetime.now(UTC) + timedelta(days=1))
        assert waiter.wait(SOON)


def test_any_thread_can_ring(store: Store) -> None:
    with listening(store.engine) as waiter:
        ringer = threading.Timer(0.1, waiter.inner.wake)
        ringer.start()
        began = time.monotonic()
        assert waiter.wait(SOON)
        assert time.monotonic() - began < SOON / 2
        ringer.join()
        assert not waiter.wait(0.05)


def test_close_ends_a_wait_and_leaves_nothing_behind(store: Store) -> None:
    threads, files = threading.active_count(), open_files()
    with listening(store.engine) as waiter:
        threading.Timer(0.1, waiter.close).start()
        began = time.monotonic()
        assert waiter.wait(SOON)
        assert time.monotonic() - began < SOON / 2
        waiter.close()
        for _ in range(2):
            assert waiter.wait(SOON)  # a loop that waits once more is not held up
        assert waiter.tasks() == set()
        assert not listens(waiter)
        assert store.engine.pool.checkedout() == 0
        waiter.inner.wake()
    eventually(lambda: threading.active_count() <= threads)
    eventually(lambda: open_files() <= files)
    if not store.is_sqlite:
        eventually(lambda: not listeners(store))


def listens(waiter: Waiter) -> bool:
    return "aion-timers-wakeup" in {thread.name for thread in threading.enumerate()} | waiter.tasks()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").is_dir() else 0


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_can_be_closed_at_once_and_twice(store: Store) -> None:
    with Waiter(store.engine) as waiter:
        waiter.close()
        waiter.close()


@contextmanager
def opened(store: Store, url: URL, **options: Any) -> Iterator[Any]:
    engine = open_engine(url, **options)
    try:
        yield engine
    finally:
        if isinstance(engine, AsyncEngine):
            store.runner.run(disposed(engine.dispose()))
        else:
            engine.dispose()


async def disposed(result: Awaitable[None]) -> None:
    await result


def test_it_needs_no_connection_of_the_engines_pool(store: Store, url: URL) -> None:
    with opened(store, url, pool_size=1, max_overflow=0, pool_timeout=0.1) as engine, listening(engine) as waiter:
        assert engine.pool.checkedout() == 0
        assert engine.pool.checkedin() == 0
        stirred(store)
        assert waiter.wait(SOON)


def test_it_works_with_an_engine_that_has_no_pool(store: Store, url: URL) -> None:
    with opened(store, url, poolclass=pool.NullPool) as engine, listening(engine) as waiter:
        stirred(store)
        assert waiter.wait(SOON)


def test_it_connects_as_the_engine_does(store: Store, url: URL) -> None:
    connects: list[object] = []
    with opened(store, url) as engine:
        sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        event.listen(sync, "do_connect", lambda *_: connects.append("do_connect"))
        event.listen(sync, "connect", lambda *_: connects.append("connect"))
        with listening(engine):
            assert connects == ["do_connect", "connect"]


def test_a_close_that_comes_while_a_wait_ends_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = threading.Event.clear

    def interrupted(bell: threading.Event) -> None:
        # as another thread might, just before the bell is silent again
        waiter.close()
        clear(bell)

    with Wakeup(create_engine("sqlite://")) as waiter:
        waiter.wake()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Event, "clear", interrupted)
            assert waiter.wait(SOON)
        assert waiter.wait(0)


def test_nobody_meets_a_dialect_that_its_first_connection_has_not_initialized_yet(store: Store, url: URL) -> None:
    begun = threading.Event()
    ended: list[bool] = []
    with opened(store, url) as engine:
        dialect = engine.dialect
        initialize = dialect.initialize

        def slow(connection: Any) -> None:
            begun.set()
            if store.is_async:
                await_only(asyncio.sleep(0.3))
            else:
                time.sleep(0.3)
            initialize(connection)
            ended.append(True)

        async def connect() -> None:
            async with engine.connect():
                assert ended

        dialect.initialize = slow
        with Waiter(engine) as waiter:
            assert begun.wait(SOON)
            if store.is_async:
                waiter.run(connect())
            else:
                with engine.connect():
                    assert ended
            assert waiter.wait(SOON)
            if store.is_async:
                waiter.run(engine.dispose())
    assert ended == [True]


# -- PostgreSQL -------------------------------------------------------------------------------------------------------


@POSTGRES
def test_it_holds_no_transaction_open(store: Store) -> None:
    with listening(store.engine):
        assert [state for _, state in listeners(store)] == ["idle"]


@POSTGRES
def test_a_connection_that_is_killed_is_made_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aion_timers.wakeup")
    with listening(store.engine) as waiter:
        for _ in range(3):
            eventually(lambda: len(listeners(store)) == 1)  # the server is slow to forget one that it has killed
            ((pid, _),) = listeners(store)
            store.sql("SELECT pg_terminate_backend(:pid)", pid=pid)
            assert waiter.wait(SOON)  # something may have come while nobody listened
            stirred(store)
            assert waiter.wait(SOON)
            assert not waiter.wait(0.1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 3


@POSTGRES
def test_a_server_that_is_not_there_holds_nobody_up(store: Store, url: URL, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = make_url(f"{url.drivername}://worker:s3cret@127.0.0.1:1/nowhere")
    with opened(store, nowhere) as engine, Waiter(engine) as waiter:
        began = time.monotonic()
        eventually(lambda: bool(caplog.records))
        assert not waiter.wait(0.1)
        waiter.inner.wake()
        assert waiter.wait(SOON)
    assert time.monotonic() - began < SOON / 2
    (record,) = [record for record in caplog.records if record.name == "aion_timers.wakeup"]
    assert record.levelname == "WARNING"
    assert "s3cret" not in record.getMessage()


class Proxy:
    """Stands between a client and a server, and can stop to pass anything on, as a firewall does that forgets."""

    def __init__(self, server: URL) -> None:
        directory = server.query.get("host")
        port = server.port or 5432
        self._target: Any = f"{directory}/.s.PGSQL.{port}" if directory else (server.host, port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self._frozen: set[socket.socket] = set()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self.url = server.set(host="127.0.0.1", port=self._door.getsockname()[1], query={})

    def freeze(self) -> None:
        """Pass on nothing more of the connections that there are."""
        self._frozen |= set(self._pairs)

    def _serve(self) -> None:
        while not self._end.is_set():
            ready, _, _ = select.select([self._door, *(set(self._pairs) - self._frozen)], [], [], 0.02)
            for readable in ready:
                if readable is self._door:
                    client, _ = self._door.accept()
                    server = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
                    server.connect(self._target)
                    self._pairs |= {client: server, server: client}
                elif readable in self._pairs:
                    if data := readable.recv(65536):
                        self._pairs[readable].sendall(data)
                    else:
                        for end in (readable, self._pairs[readable]):
                            del self._pairs[end]
                            end.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for end in (self._door, *self._pairs):
            end.close()


@POSTGRES
def test_a_connection_that_died_in_silence_is_found_out(
    store: Store, url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeup, "_PING_AFTER", 0.2)
    monkeypatch.setattr(wakeup, "_PING_WITHIN", 2.5)
    with Proxy(url) as proxy, opened(store, proxy.url) as engine, listening(engine) as waiter:
        assert not waiter.wait(1)  # answered some times, so it is let alone
        stirred(store)
        assert waiter.wait(SOON)
        proxy.freeze()
        stirred(store)
        assert waiter.wait(SOON)  # by a new connection
        assert not waiter.wait(NEVER)
        stirred(store)
        assert waiter.wait(SOON)


@POSTGRES
def test_two_installations_in_one_database_do_not_disturb_each_other(store: Store) -> None:
    store.sql('CREATE SCHEMA "an Other"')
    store.sql('CREATE TABLE "an Other".timers (LIKE public.timers INCLUDING ALL)')
    other = store.engine.execution_options(schema_translate_map={None: "an Other"})
    with listening(store.engine) as ours, listening(other) as theirs:
        stirred(store)
        assert ours.wait(SOON)
        assert not theirs.wait(NEVER)
        stirred(store, '"an Other".timers')
        assert theirs.wait(SOON)
        assert not ours.wait(NEVER)


@POSTGRES
def test_a_schema_that_a_hook_sets_is_kept_even_if_it_leaves_a_transaction_open(store: Store, url: URL) -> None:
    store.sql("CREATE SCHEMA other")
    store.sql("ALTER TABLE timers SET SCHEMA other")
    with opened(store, url) as engine:

        @event.listens_for(engine.sync_engine if isinstance(engine, AsyncEngine) else engine, "connect")
        def on_connect(connection: Any, _: object) -> None:
            cursor = connection.cursor()
            cursor.execute("SET search_path TO other")
            cursor.close()

        with listening(engine) as waiter:
            stirred(store, "other.timers")
            assert waiter.wait(SOON)


@POSTGRES
def test_it_waits_for_the_table_to_be_made(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.sql("ALTER TABLE timers RENAME TO gone")
    with Waiter(store.engine) as waiter:
        eventually(lambda: "alembic upgrade head" in caplog.text)
        assert not waiter.wait(0)
        store.sql("ALTER TABLE gone RENAME TO timers")
        assert waiter.wait(SOON)
        stirred(store)
        assert waiter.wait(SOON)


# -- files ------------------------------------------------------------------------------------------------------------


@FILES
def test_it_holds_no_snapshot(store: Store) -> None:
    with listening(store.engine) as waiter:
        for _ in range(5):
            stirred(store)
            assert waiter.wait(SOON)
        with store.connection(isolation_level="AUTOCOMMIT") as connection:
            # a reader of an old snapshot keeps the log from being emptied, for longer than a look at the version does
            eventually(lambda: connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0] == 0)


@pytest.mark.parametrize("backend", ["sqlite", "aiosqlite"], indirect=True)
def test_a_writer_without_wal_is_waited_for_and_no_outage(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with store.connection(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = DELETE")
    with listening(store.engine) as waiter:
        with store.connection(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            stir(connection, store)
            assert not waiter.wait(NEVER)
            connection.exec_driver_sql("COMMIT")
        assert waiter.wait(SOON)
        with store.connection(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            assert not waiter.wait(NEVER)
            waiter.close()
            assert not listens(waiter)
            connection.exec_driver_sql("ROLLBACK")
    assert caplog.records == []


@ASYNC_FILES
def test_the_event_loop_goes_on_while_a_file_is_asked(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0
    during: list[int] = []

    def slow(statement: str) -> None:
        if "data_version" in statement:
            before = turns
            time.sleep(0.2)
            during.append(turns - before)

    async def ask() -> None:
        nonlocal turns
        engine: Any = open_engine(url)
        if engine.dialect.driver == "aiosqlite":

            @event.listens_for(engine.sync_engine, "connect")
            def trace(connection: Any, _: object) -> None:
                await_only(connection.driver_connection.set_trace_callback(slow))

        end = time.monotonic() + SOON
        async with AsyncWakeup(engine):
            while max(during, default=0) < 5:
                assert time.monotonic() < end, during
                await asyncio.sleep(0.005)
                turns += 1
        await engine.dispose()

    look = dbapi.Connection.data_version
    monkeypatch.setattr(dbapi.Connection, "data_version", lambda connection: slow("data_version") or look(connection))
    with asyncio.Runner() as runner:
        runner.run(ask())


@pytest.mark.parametrize("driver", ["sqlite+libsql", "sqlite", "sqlite+aiolibsql", "sqlite+aiosqlite"])
@pytest.mark.parametrize("database", [None, ":memory:", "file:shared?mode=memory&cache=shared&uri=true"])
def test_in_memory_only_wake_rings(driver: str, database: str | None) -> None:
    url = f"{driver}://" if database is None else f"{driver}:///{database}"
    create: Any = create_async_engine if driver.removeprefix("sqlite+") in ASYNC_DRIVERS else create_engine
    engine = create(url, poolclass=pool.StaticPool)
    with Waiter(engine) as waiter:
        assert not waiter.wait(NEVER)
        waiter.inner.wake()
        assert waiter.wait(SOON)
    if isinstance(engine, AsyncEngine):
        asyncio.run(disposed(engine.dispose()))
    else:
        engine.dispose()


# -- async ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", sorted(ASYNC_DRIVERS.intersection(HEARING)), indirect=True)
def test_a_wait_that_is_cancelled_keeps_what_rings(store: Store) -> None:
    async def scenario() -> None:
        async with AsyncWakeup(store.engine) as waiter:  # type: ignore[arg-type] # async here
            assert await waiter.wait(SOON)
            waiting = asyncio.ensure_future(waiter.wait(SOON))
            await asyncio.sleep(0.05)
            waiter.wake()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await waiter.wait(SOON)

    store.runner.run(scenario())


@pytest.mark.parametrize("backend", ["aiosqlite"], indirect=True)
def test_close_waits_for_a_file_that_is_being_opened(url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    connect = sqlite3.connect

    def slow(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        begun.set()
        time.sleep(0.3)
        connection = connect(*args, **kwargs)
        ended.set()
        return connection

    async def scenario() -> None:
        async with AsyncWakeup(engine):
            while not begun.is_set():  # noqa: ASYNC110 - a thread sets it
                await asyncio.sleep(0.005)
        # otherwise its thread might have news for a loop that has ended
        assert ended.is_set()

    engine: Any = open_engine(url)
    threads = threading.active_count()
    monkeypatch.setattr(sqlite3, "connect", slow)
    asyncio.run(scenario())
    eventually(lambda: threading.active_count() <= threads)


@pytest.mark.parametrize("backend", sorted(ASYNC_DRIVERS.intersection(HEARING)), indirect=True)
def test_a_loop_that_ends_without_close_leaves_no_connection(store: Store, url: URL) -> None:
    async def scenario() -> None:
        waiter = await AsyncWakeup(open_engine(url)).__aenter__()  # type: ignore[arg-type] # async here
        assert await waiter.wait(SOON)

    threads = threading.active_count()
    asyncio.run(scenario())
    eventually(lambda: threading.active_count() <= threads)
    if not store.is_sqlite:
        eventually(lambda: not listeners(store))
