"""Something may have come earlier: what wakes a worker that sleeps until its next timer.

A waiter rings when another transaction may have committed a timer that comes before all others. It is a hint and no
more: a worker that is never rung still looks for itself, from time to time. So it rings once too often rather than
once too little, namely whenever it begins, or begins anew, to listen; and an outage is logged, never raised.

On PostgreSQL it listens on the channel that scheduling statements notify. On a SQLite file it asks for
``data_version``, which changes with every commit of any other connection, whatever that wrote. A database in memory has
no other process to hear of: there only `wake` rings.

The connection is the waiter's own, made as the engine makes its own (its arguments, its events), but in no pool of
the engine's, at AUTOCOMMIT.
"""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
import socket
import threading
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, text

from aion_timers.engine import MIGRATE, name_of_table
from aion_timers.errors import NotMigratedError
from aion_timers.statements import CHANNEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType
    from typing import Self

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_POLL: Final = 0.06  # seconds: half of it late in the mean, for less than a percent of a slow core
_PING_AFTER: Final = 30.0  # seconds of silence, after which a server or a firewall may have forgotten the connection
_PING_WITHIN: Final = 10.0
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 30.0
_JOIN: Final = 5.0  # seconds; only an attempt to connect can take longer, and nothing can end that

_log = logging.getLogger(__name__)


# -- connections of its own -------------------------------------------------------------------------------------------


def _apart(engine: Engine) -> Engine:
    """An engine that connects as this one does, with a pool of its own and without the hooks of its statements."""
    pool = engine.pool.recreate()
    # the first connection of either pool initializes the dialect, and those of the other have to wait for that, too
    both: list[Any] = [each.dispatch.connect.for_modify(each.dispatch) for each in (pool, engine.pool)]
    ours, theirs = both
    ours._exec_once_mutex = theirs._get_exec_once_mutex()  # noqa: SLF001 - SQLAlchemy knows of one pool only
    return Engine(pool, engine.dialect, engine.url)


def _can_hear(engine: Engine) -> bool:
    # a database in memory has one connection, and a second one would be another database
    url = engine.url
    return engine.dialect.name == "postgresql" or (bool(url.database) and url.database != ":memory:" and not url.host)


def _settled(connection: Connection) -> Connection:
    # a host's connect hook may have left a transaction open, which would keep the level from being set
    connection.connection.commit()
    return connection.execution_options(isolation_level="AUTOCOMMIT")


def _channel(connection: Connection, table: str) -> str:
    """Prepare a connection to PostgreSQL; the channel of the table."""
    number = _settled(connection).scalar(text("SELECT CAST(to_regclass(:table) AS oid)"), {"table": table})
    connection.commit()
    if number is None:
        raise NotMigratedError(f"there is no table {table}", MIGRATE)
    return f"{CHANNEL}{number}"


def _watched(connection: Connection) -> bool:
    """Prepare a connection to SQLite; whether it has a file."""
    cursor = _settled(connection).connection.cursor()
    try:
        if not connection.dialect.driver.endswith("libsql"):
            # whoever writes keeps it from reading where there is no WAL, and asking again is as good as waiting
            cursor.execute("PRAGMA busy_timeout = 0")
            cursor.fetchall()
        cursor.execute("PRAGMA database_list")
        return any(name == "main" and path for _, name, path in cursor.fetchall())
    finally:
        cursor.close()


def _look(raw: Any) -> Callable[[], int]:  # noqa: ANN401 - the driver's
    """A question for a number that is another one once somebody else has committed to the file."""
    # to the driver: it is asked day and night, and everything above costs several times as much
    if hasattr(raw, "data_version"):
        look: Callable[[], int] = raw.data_version
        return look
    cursor = raw.cursor()

    def look_with_cursor() -> int:
        cursor.execute("PRAGMA data_version")
        version: int = cursor.fetchall()[0][0]
        return version

    return look_with_cursor


def _poll(raw: Any, closed: threading.Event, ring: Callable[[], None]) -> None:  # noqa: ANN401 - the driver's
    """Ring when somebody has committed, until it is closed; run in the thread that the connection belongs to."""
    look, seen = _look(raw), None
    while not closed.is_set():
        try:
            version = look()
        except Exception as error:
            if "locked" not in str(error):
                raise
        else:
            if version != seen:
                seen = version
                ring()
        closed.wait(_POLL)


def _cut(number: int) -> None:
    """Shut a socket, of which this is the file descriptor, so that whoever reads from it comes to its end."""
    shut = socket.socket(fileno=number)
    try:
        shut.shutdown(socket.SHUT_RDWR)
    finally:
        shut.detach()


class _Outages:
    """How long to wait before the next attempt, and what the log is told."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY
        self._began = 0.0
        self._down = False

    def begun(self) -> None:
        self._began = time.monotonic()
        if self._down:
            self._down = False
            _log.info("wake-ups come again")

    def ended(self, error: Exception) -> float:
        """Take note of an error; how many seconds to wait."""
        if not self._down:
            self._down = True
            _log.warning(
                "no wake-ups for now, so timers may be as late as a worker sleeps at most (%s: %s)",
                type(error).__name__,
                str(error).partition("\n")[0],
            )
        if self._began and time.monotonic() - self._began > _LONGEST_DELAY:
            self._delay = _FIRST_DELAY
        delay = self._delay
        self._began = 0.0
        self._delay = min(2 * delay, _LONGEST_DELAY)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - so that many workers don't come back at once


# -- sync -------------------------------------------------------------------------------------------------------------


class Wakeup:
    """Wakes a worker of a sync engine. It listens from the beginning until `close`, in a thread of its own.

    Args:
        engine: the engine whose database, and whose schema if it translates, holds the timers.

    Raises:
        Nothing for a database that is not there: that is logged, and tried again.
    """

    def __init__(self, engine: Engine) -> None:
        self._bell = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if _can_hear(engine):
            self._interrupted, self._interrupt = socket.socketpair()
            self._thread = threading.Thread(
                target=self._listen,
                args=(_apart(engine), name_of_table(engine)),
                name="aion-timers-wakeup",
                daemon=True,
            )
            self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Sleep for these seconds, or until it rings; whether it rang since the last wait. After `close` it is True."""
        rang = self._bell.wait(min(max(timeout, 0), threading.TIMEOUT_MAX))
        # before the caller looks at the database: what rings from now on is for the next wait
        if rang:
            self._bell.clear()
            # in this order, since another thread may close it at any moment
            if self._closed.is_set():
                self._bell.set()
        return rang

    def wake(self) -> None:
        """Ring, from any thread."""
        self._bell.set()

    def close(self) -> None:
        """Stop listening, from any thread, and end a wait. The thread and its connection are gone afterwards."""
        self._closed.set()
        self._bell.set()
        if self._thread is None:
            return
        with suppress(OSError):
            self._interrupt.send(b"!")
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, engine: Engine, table: str) -> None:
        outages = _Outages()
        try:
            while not self._closed.is_set():
                try:
                    self._hear_once(engine, table, outages.begun)
                except Exception as error:  # noqa: BLE001 - nothing here is worth more than a worker's going on
                    self._closed.wait(outages.ended(error))
                else:
                    return
        finally:
            engine.dispose()
            self._interrupt.close()
            self._interrupted.close()

    def _hear_once(self, engine: Engine, table: str, begun: Callable[[], None]) -> None:
        """Listen until `close` or an error."""
        with engine.connect() as connection:
            try:
                if engine.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"LISTEN {_channel(connection, table)}")
                    connection.commit()
                    begun()
                    self._bell.set()
                    self._hear_notifications(connection.connection.driver_connection)
                elif _watched(connection):
                    begun()
                    _poll(connection.connection.dbapi_connection, self._closed, self._bell.set)
            finally:
                # closed rather than given back to a pool, which would ask a dead one to roll back
                connection.invalidate()

    def _hear_notifications(self, driver: Any) -> None:  # noqa: ANN401 - psycopg's, which is an extra
        # not by the driver's own notifies(), which nothing but a message can end
        libpq = driver.pgconn
        with selectors.DefaultSelector() as selector:
            selector.register(libpq.socket, selectors.EVENT_READ)
            selector.register(self._interrupted, selectors.EVENT_READ)
            asked = False
            while not self._closed.is_set():
                if selector.select(_PING_WITHIN if asked else _PING_AFTER):
                    libpq.consume_input()
                    while asked and not libpq.is_busy():
                        asked = libpq.get_result() is not None
                    while libpq.notifies():
                        self._bell.set()
                elif asked:
                    raise TimeoutError("the server does not answer")
                else:
                    libpq.send_query(b"SELECT 1")
                    libpq.flush()
                    asked = True


# -- async ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _connected(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    connection = engine.connect()
    starting = asyncio.ensure_future(connection.start())
    try:
        # aiosqlite cannot be cancelled while it opens a file: its thread would go on, and might outlive the event loop
        await (asyncio.shield(starting) if engine.dialect.name == "sqlite" else starting)
    except asyncio.CancelledError:
        await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            await connection.invalidate()
            await connection.close()
        raise
    try:
        yield connection
    finally:
        await connection.close()


class AsyncWakeup:
    """Like `Wakeup`, for an async engine: it listens in a task, from ``async with`` on.

    Files are asked in the thread that the driver has for the connection, so the event loop goes on.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._bell = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109 - a timeout is a result here, and no error
        """Sleep for these seconds, or until it rings; whether it rang since the last wait. After `close` it is True."""
        if not self._bell.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._bell.wait()
        rang = self._bell.is_set()
        # before the caller looks at the database: what rings from now on is for the next wait
        if rang and not self._closed:
            self._bell.clear()
        return rang

    def wake(self) -> None:
        """Ring, from any thread."""
        if self._loop is None:
            self._bell.set()
            return
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._bell.set)

    async def close(self) -> None:
        """Stop listening, and end a wait. The task and its connection are gone afterwards."""
        begun, self._closed = self._closed, True
        self._bell.set()
        if self._task is None:
            return
        if not begun:
            self._task.cancel()
        # whoever closes it a second time waits, too, and does not disturb the first
        await asyncio.wait([self._task])

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if _can_hear(self._engine.sync_engine) and self._task is None and not self._closed:
            self._task = self._loop.create_task(self._listen(), name="aion-timers-wakeup")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _listen(self) -> None:
        from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415 - greenlet, which it needs, is an extra

        engine = AsyncEngine(_apart(self._engine.sync_engine))
        outages = _Outages()
        try:
            while True:
                try:
                    await self._hear_once(engine, outages.begun)
                except Exception as error:  # noqa: BLE001 - nothing here is worth more than a worker's going on
                    if self._closed:  # the driver made an error of the cancellation
                        return
                    await asyncio.sleep(outages.ended(error))
                else:
                    return
        finally:
            await engine.dispose()

    async def _hear_once(self, engine: AsyncEngine, begun: Callable[[], None]) -> None:
        async with _connected(engine) as connection:
            try:
                if engine.dialect.name == "sqlite":
                    if await connection.run_sync(_watched):
                        begun()
                        await self._poll(connection)
                    return
                channel = await connection.run_sync(_channel, name_of_table(self._engine.sync_engine))
                driver = (await connection.get_raw_connection()).driver_connection
                hear = self._hear_asyncpg if engine.dialect.driver == "asyncpg" else self._hear_psycopg
                await hear(driver, channel, begun)
            finally:
                # closed rather than given back to a pool, which would ask a dead one to roll back
                await connection.invalidate()

    async def _hear_psycopg(self, driver: Any, channel: str, begun: Callable[[], None]) -> None:  # noqa: ANN401 - an extra
        await driver.execute(f"LISTEN {channel}")
        begun()
        self._bell.set()
        while True:
            heard = False
            async for _ in driver.notifies(timeout=_PING_AFTER, stop_after=1):
                heard = True
                self._bell.set()
            if not heard:
                # cut off rather than cancelled: that would ask the server, which is silent
                cut = asyncio.get_running_loop().call_later(_PING_WITHIN, _cut, driver.fileno())
                try:
                    await driver.execute("SELECT 1")
                finally:
                    cut.cancel()

    async def _hear_asyncpg(self, driver: Any, channel: str, begun: Callable[[], None]) -> None:  # noqa: ANN401 - an extra
        lost = asyncio.Event()
        driver.add_termination_listener(lambda _: lost.set())
        await driver.add_listener(channel, lambda *_: self._bell.set())
        begun()
        self._bell.set()
        while not lost.is_set():
            try:
                async with asyncio.timeout(_PING_AFTER):
                    await lost.wait()
            except TimeoutError:
                await driver.execute("SELECT 1", timeout=_PING_WITHIN)
        raise ConnectionError("the server has closed the connection")

    async def _poll(self, connection: AsyncConnection) -> None:
        fairy = await connection.get_raw_connection()
        adapted: Any = fairy.dbapi_connection
        driver: Any = fairy.driver_connection
        # aiosqlite offers no other way into its thread
        run, raw = (adapted.run, driver) if hasattr(adapted, "run") else (driver._execute, driver._conn)  # noqa: SLF001 - just that
        closed = threading.Event()
        try:
            # all of it in the connection's thread: a task that goes there for each look costs three times as much
            await run(_poll, raw, closed, self.wake)
        finally:
            closed.set()
