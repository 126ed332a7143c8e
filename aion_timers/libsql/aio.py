"""The async dialect, ``sqlite+aiolibsql``: each connection has a thread of its own, in which the driver may block."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import pool
from sqlalchemy.connectors.asyncio import (
    AsyncAdapt_dbapi_connection,
    AsyncAdapt_dbapi_cursor,
    AsyncAdapt_dbapi_module,
    AsyncAdapt_terminate,
)
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteExecutionContext_aiosqlite
from sqlalchemy.util.concurrency import await_

from aion_timers.libsql import dbapi as libsql_dbapi
from aion_timers.libsql.dialect import LibsqlDialect, pool_class

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection

_T = TypeVar("_T")


class AsyncCursor(AsyncAdapt_dbapi_cursor):
    """A cursor whose statements run in its connection's thread; their rows are there afterwards."""

    __slots__ = ()
    _awaitable_cursor_close = False
    _adapt_connection: AsyncConnection
    _cursor: Any

    def _aenter_cursor(self, cursor: Any) -> Any:  # noqa: ANN401 - typed for async drivers, this is a sync cursor
        return cursor

    async def _execute_async(self, operation: str, parameters: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
        connection = self._adapt_connection
        async with connection._execute_mutex:  # noqa: SLF001 - SQLAlchemy's base class made it for this
            await connection.run(self._cursor.execute, operation, parameters or ())
            self._rows = deque(self._cursor.fetchall() if self._cursor.description else ())

    async def _executemany_async(self, operation: str, seq_of_parameters: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
        connection = self._adapt_connection
        async with connection._execute_mutex:  # noqa: SLF001 - SQLAlchemy's base class made it for this
            await connection.run(self._cursor.executemany, operation, seq_of_parameters)

    def setinputsizes(self, *inputsizes: object) -> None:
        """Do nothing, as PEP 249 allows."""


class AsyncConnection(AsyncAdapt_terminate, AsyncAdapt_dbapi_connection):
    """A connection and its thread, driven from SQLAlchemy's greenlet.

    The event loop's own threads are too few: waiters for a lock could occupy all of them, and its owner would find
    none to commit in.
    """

    __slots__ = ("_thread",)
    _cursor_cls = AsyncCursor
    _ss_cursor_cls = AsyncCursor  # type: ignore[assignment] # stream() works, with rows that were read before
    _connection: Any

    def __init__(self, dbapi: AsyncDbapi, connection: libsql_dbapi.Connection, thread: ThreadPoolExecutor) -> None:
        super().__init__(dbapi, cast("Any", connection))  # typed for async drivers
        self._thread = thread

    @classmethod
    async def open(cls, dbapi: AsyncDbapi, connect: Callable[[], libsql_dbapi.Connection]) -> AsyncConnection:
        """Connect in a new thread."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aiolibsql")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, connect)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(dbapi, connection, thread)

    async def run(self, function: Callable[..., _T], *arguments: Any) -> _T:  # noqa: ANN401 - the function's own
        """Run a function in the thread. When the task is cancelled, a wait for a lock there ends, too."""
        if self._connection.is_the_parents:  # and so is the thread
            return function(*arguments)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except asyncio.CancelledError:
            self._connection.abandon()
            raise

    def commit(self) -> None:
        """Commit."""
        if self._connection.in_transaction:
            await_(self.run(self._connection.commit))
        else:
            self._connection.commit()  # nothing that takes time

    def rollback(self) -> None:
        """Roll back."""
        if self._connection.in_transaction:
            await_(self.run(self._connection.rollback))
        else:
            self._connection.rollback()  # nothing that takes time

    def ping(self) -> None:
        """See whether the connection works; it begins no transaction."""
        await_(self.run(self._connection.ping))

    def sync(self) -> None:
        """Fetch what the primary of an embedded replica has."""
        await_(self.run(self._connection.sync))

    def close(self) -> None:
        """Close the connection and end its thread."""
        await_(self._terminate_graceful_close())

    async def _terminate_graceful_close(self) -> None:
        try:
            await self.run(self._connection.close)
        finally:
            self._thread.shutdown(wait=False)

    def _terminate_force_close(self) -> None:
        if self._connection.is_the_parents:
            return
        self._connection.abandon()
        try:
            self._thread.submit(self._connection.close)
        except RuntimeError:  # the thread has ended, or the interpreter is about to
            self._connection.close()
        self._thread.shutdown(wait=False)

    @property
    def isolation_level(self) -> str:
        """The level of the next transaction."""
        level: str = self._connection.isolation_level
        return level

    @isolation_level.setter
    def isolation_level(self, level: str | None) -> None:
        self._connection.isolation_level = level


class AsyncDbapi(AsyncAdapt_dbapi_module):
    """The PEP 249 module as SQLAlchemy's async engines want it; its errors are the sync module's own."""

    def __init__(self) -> None:
        super().__init__(libsql_dbapi, dbapi_module=libsql_dbapi)
        for name in libsql_dbapi.__all__:
            if name not in ("Connection", "Cursor", "connect"):
                setattr(self, name, getattr(libsql_dbapi, name))

    def connect(self, *arguments: Any, **options: Any) -> AsyncConnection:  # noqa: ANN401 - those of the sync module
        """Connect, from within SQLAlchemy's greenlet."""
        connect = partial(libsql_dbapi.connect, *arguments, **options)
        connection: AsyncConnection = await_(AsyncConnection.open(self, connect))
        return connection


class AsyncLibsqlDialect(LibsqlDialect):
    """The dialect for ``create_async_engine``."""

    driver = "aiolibsql"
    is_async = True
    has_terminate = True
    supports_server_side_cursors = True
    execution_ctx_cls = SQLiteExecutionContext_aiosqlite
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> AsyncDbapi:
        """The PEP 249 module, adapted."""
        return AsyncDbapi()

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        """A queue for files; one connection for a database in memory, which no other connection could reach."""
        return pool_class(url, pool.AsyncAdaptedQueuePool)

    def get_driver_connection(self, connection: DBAPIConnection) -> Any:  # noqa: ANN401 - SQLAlchemy's
        """The sync connection behind an adapted one."""
        return connection._connection  # noqa: SLF001 - SQLAlchemy's own adapters do the same

    def do_terminate(self, dbapi_connection: DBAPIConnection) -> None:
        """Close a connection that may be broken."""
        dbapi_connection.terminate()
