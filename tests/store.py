"""One face for sync and async backends, so that a contract is written once, as plain sync code."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from aion_timers import AsyncTimerRepository, TimerRepository

SERVERS = ("libsql_server", "aiolibsql_server")
BACKENDS = ("libsql", "aiolibsql", *SERVERS, "sqlite", "aiosqlite", "psycopg", "psycopg_async", "asyncpg")
HEARING = tuple(backend for backend in BACKENDS if backend not in SERVERS)
"""Those whose workers hear of what others commit; on a libSQL server they look for themselves."""

ASYNC_DRIVERS = {"aiolibsql", "aiolibsql_server", "aiosqlite", "psycopg_async", "asyncpg"}


async def _wait(awaitable: Any) -> Any:
    return await awaitable


class Blocking:
    """An async object whose methods block until their result is there."""

    def __init__(self, wrapped: Any, runner: asyncio.Runner) -> None:
        self.wrapped = wrapped
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.wrapped, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            result = attribute(*args, **kwargs)
            return self._wait(result) if inspect.isawaitable(result) else result

        return call

    def _wait(self, awaitable: Any) -> Any:
        return self._runner.run(_wait(awaitable))


class Store:
    """A database of one backend, with sessions, connections and repositories that look sync."""

    def __init__(self, backend: str, engine: Engine | AsyncEngine, runner: asyncio.Runner) -> None:
        self.backend = backend
        self.engine = engine
        self.runner = runner
        self.is_async = isinstance(engine, AsyncEngine)
        self.is_sqlite = engine.dialect.name == "sqlite"

    @property
    def sync_engine(self) -> Engine:
        """The engine that events are listened to on."""
        return self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine

    def blocking(self, wrapped: Any) -> Any:
        """The object as it is, or with blocking methods if it is an async one."""
        return Blocking(wrapped, self.runner) if self.is_async else wrapped

    def new_session(self, **options: Any) -> Any:
        """A session that the caller closes."""
        return self.blocking(AsyncSession(self.engine, **options) if self.is_async else Session(self.engine, **options))

    def repository(self, bind: Any, **options: Any) -> Any:
        """The repository on a session or connection of this store."""
        if self.is_async:
            return self.blocking(AsyncTimerRepository(getattr(bind, "wrapped", bind), **options))
        return TimerRepository(bind, **options)

    @contextmanager
    def session(self, **options: Any) -> Iterator[Any]:
        """A session that commits at the end, or rolls back after an error."""
        session = self.new_session(**options)
        try:
            yield session
            session.commit()
        finally:
            session.close()

    @contextmanager
    def connection(self, **execution_options: Any) -> Iterator[Any]:
        """A connection that commits at the end, or rolls back after an error."""
        engine = self.engine.execution_options(**execution_options)
        raw = engine.connect()
        connection = Blocking(self.runner.run(_wait(raw)), self.runner) if self.is_async else raw
        try:
            yield connection
            connection.commit()
        finally:
            connection.close()

    @contextmanager
    def timers(self, **options: Any) -> Iterator[Any]:
        """A repository in a transaction of its own."""
        with self.session() as session:
            yield self.repository(session, **options)

    def sql(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run plain SQL in a transaction of its own; its rows, if it has any."""
        with self.connection() as connection:
            result = connection.execute(text(statement), parameters)
            return [tuple(row) for row in result] if result.returns_rows else []

    def close(self) -> None:
        """Close the engine, which must have every connection back."""
        checked_out = self.engine.pool.checkedout() if hasattr(self.engine.pool, "checkedout") else 0
        if self.is_async:
            self.runner.run(_wait(self.engine.dispose()))
        else:
            self.engine.dispose()
        assert checked_out == 0, "a connection was not given back"
