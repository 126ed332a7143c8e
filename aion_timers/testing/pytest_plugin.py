"""Fixtures for pytest: fresh migrated databases, on a libSQL file and on PostgreSQL, and a clock that stands.

A project switches them on in the ``conftest.py`` of its root::

    pytest_plugins = ["aion_timers.testing.pytest_plugin"]

Each test has a database of its own: a copy of one that is migrated once a session, and once a worker of pytest-xdist.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias
from uuid import uuid4

import pytest
from sqlalchemy import URL, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from aion_timers import TimerStoreError, migrate
from aion_timers.testing.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    Prepare: TypeAlias = Callable[[Engine], object]

POSTGRES_VARIABLE: Final = "AION_TIMERS_TEST_POSTGRES"
"""The environment variable that names a PostgreSQL server on which databases may be made."""

_OBJECT_IN_USE: Final = "55006"
_PREFIX: Final = "aion_timers_test_"
_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
_BUSY_SECONDS: Final = 5.0
_LEFT_OPEN: Final = "timers_prepare has left a connection open: close every session, and dispose of its own engines"
_NO_URL: Final = "not a URL as in postgresql://user:password@localhost/postgres"


@pytest.fixture
def timers_clock() -> FakeClock:
    """A `FakeClock` that stands at the beginning of 2026, in UTC."""
    return FakeClock(_EPOCH)


@pytest.fixture(scope="session")
def timers_prepare() -> Prepare:
    """Called with a sync engine of each new template, after ``migrate.upgrade``: override it to make your own tables.

    All tests of a session get copies of what it makes. It does nothing by default.
    """
    return lambda _: None


# -- a libSQL file ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _timers_libsql_template(tmp_path_factory: pytest.TempPathFactory, timers_prepare: Prepare) -> Path:
    path = tmp_path_factory.mktemp("aion-timers") / "template.db"
    try:
        engine = create_engine(URL.create("sqlite+libsql", database=str(path)))
    except ModuleNotFoundError as error:
        _fail(f"{error}. Without that driver make an engine of sqlite:///, see aion_timers.prepare_sqlite")
    try:
        migrate.upgrade(engine)
        timers_prepare(engine)
    finally:
        engine.dispose()
    # a log beside the file means that it is still open, and a copy of the file alone would miss what is in there
    if path.with_name(path.name + "-wal").exists():
        _fail(_LEFT_OPEN)
    return path


@pytest.fixture
def timers_libsql_url(_timers_libsql_template: Path, tmp_path: Path) -> URL:
    """The URL, for sync engines, of a fresh migrated libSQL file in ``tmp_path``."""
    path = tmp_path / "aion-timers.db"
    shutil.copyfile(_timers_libsql_template, path)
    return URL.create("sqlite+libsql", database=str(path))


@pytest.fixture
def timers_libsql_engine(timers_libsql_url: URL) -> Iterator[Engine]:
    """An engine of a fresh migrated libSQL file."""
    engine = create_engine(timers_libsql_url, synchronous="NORMAL", connect_args={"timeout": _BUSY_SECONDS})
    yield engine
    engine.dispose()


@pytest.fixture
def timers_libsql_async_engine(timers_libsql_url: URL) -> AsyncEngine:
    """An async engine of the same file; it keeps no connection open, so that any event loop can use it."""
    return _async_engine(
        timers_libsql_url.set(drivername="sqlite+aiolibsql"),
        synchronous="NORMAL",
        connect_args={"timeout": _BUSY_SECONDS},
    )


# -- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def timers_postgres_server() -> str | URL:
    """The URL of a PostgreSQL server on which databases may be made: that of ``AION_TIMERS_TEST_POSTGRES``.

    Override it where the server comes from elsewhere, such as a container. The database in the URL is only connected
    to. The driver in it is that of the async engine, asyncpg or psycopg; the sync engine's is psycopg.
    """
    if not os.environ.get(POSTGRES_VARIABLE):
        _fail(
            f"no PostgreSQL server to test on: set {POSTGRES_VARIABLE} to the URL of one on which databases may be "
            "made, as in postgresql://user:password@localhost/postgres, or override the fixture timers_postgres_server"
        )
    return _postgres_url(os.environ[POSTGRES_VARIABLE]) or _fail(f"{POSTGRES_VARIABLE}: {_NO_URL}")


def _postgres_url(given: str | URL) -> URL | None:
    # it fails elsewhere: pytest can show the arguments of a function that fails, and a text has a password in it
    with suppress(ArgumentError, ValueError):
        url = make_url(given)
        if url.get_backend_name() == "postgresql":
            return url
    return None


class _Databases:
    """Makes and drops databases of a server."""

    def __init__(self, server: URL) -> None:
        self.server = server

    def create(self, template: str) -> URL:
        name = _PREFIX + uuid4().hex
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.server.set(database=name)

    def drop(self, url: URL) -> None:
        self._execute(f'DROP DATABASE IF EXISTS "{url.database}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with _on_postgres(self.server):
            engine = create_engine(_sync(self.server), poolclass=NullPool, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)


@pytest.fixture(scope="session")
def _timers_postgres_databases(timers_postgres_server: str | URL) -> _Databases:
    return _Databases(_postgres_url(timers_postgres_server) or _fail(f"timers_postgres_server: {_NO_URL}"))


@pytest.fixture(scope="session")
def _timers_postgres_template(_timers_postgres_databases: _Databases, timers_prepare: Prepare) -> Iterator[str]:
    databases = _timers_postgres_databases
    url = databases.create("template0")
    try:
        engine = create_engine(_sync(url), poolclass=NullPool)
        with _on_postgres(url):
            migrate.upgrade(engine)
        timers_prepare(engine)
        yield str(url.database)
    finally:
        databases.drop(url)


@pytest.fixture
def timers_postgres_url(_timers_postgres_databases: _Databases, _timers_postgres_template: str) -> Iterator[URL]:
    """The URL of a fresh migrated PostgreSQL database, dropped after the test whoever is connected."""
    url = _timers_postgres_databases.create(_timers_postgres_template)
    yield url
    _timers_postgres_databases.drop(url)


@pytest.fixture
def timers_postgres_engine(timers_postgres_url: URL) -> Iterator[Engine]:
    """An engine of a fresh migrated PostgreSQL database, with psycopg."""
    engine = create_engine(_sync(timers_postgres_url))
    yield engine
    engine.dispose()


@pytest.fixture
def timers_postgres_async_engine(timers_postgres_url: URL) -> AsyncEngine:
    """An async engine of the same database; it keeps no connection open, so that any event loop can use it."""
    is_asyncpg = timers_postgres_url.drivername == "postgresql+asyncpg"
    return _async_engine(timers_postgres_url if is_asyncpg else _sync(timers_postgres_url))


def _sync(url: URL) -> URL:
    return url.set(drivername="postgresql+psycopg")


@contextmanager
def _on_postgres(server: URL) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"{error}: pip install 'aion-timers[postgres]'")
    except (SQLAlchemyError, TimerStoreError) as error:
        orig = getattr(error, "orig", None) or error
        if getattr(orig, "sqlstate", None) == _OBJECT_IN_USE:
            _fail(_LEFT_OPEN)
        first, *_ = str(orig).splitlines() or [type(orig).__name__]
        _fail(
            f"the PostgreSQL server at {server.host or 'a local socket'}:{server.port or 5432} did not do it ({first})"
        )


# -- both -------------------------------------------------------------------------------------------------------------


def _async_engine(url: URL, **options: Any) -> AsyncEngine:  # noqa: ANN401 - SQLAlchemy's
    try:
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - greenlet, which it needs, is an extra

        return create_async_engine(url, poolclass=NullPool, **options)
    except ImportError as error:
        _fail(f"{error}: pip install 'aion-timers[asyncio]'")


def _fail(problem: str) -> NoReturn:
    # no traceback, no cause: pytest shows the arguments of functions that these lead through, passwords among them
    raise pytest.fail.Exception(problem, pytrace=False) from None
