import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import aion_timers.libsql
from aion_timers.libsql import BusyError, dbapi

aion_timers.libsql.register()

ROOT = Path(aion_timers.libsql.__file__).parents[2]


class Base(DeclarativeBase):
    """The models of these tests."""


class Item(Base):
    """A row to read and write."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)
    n: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    data: Mapped[bytes | None]


class Database:
    """A file, and what another program may do to it meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connect(self, **options: Any) -> dbapi.Connection:
        """A connection that the test closes."""
        return dbapi.connect(str(self.path), **options)

    def run(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Run and commit a statement on a connection of its own."""
        connection = self.connect()
        try:
            cursor = connection.execute(sql, parameters)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
            return rows
        finally:
            connection.close()

    @property
    def locked(self) -> bool:
        """Whether somebody holds the write lock."""
        connection = self.connect(timeout=0)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except BusyError:
            return True
        finally:
            connection.close()
        return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """The write lock, held by another connection; what it wrote is rolled back."""
        connection = self.connect()
        connection.execute("UPDATE items SET n = n + 1")
        try:
            yield
        finally:
            connection.close()

    @contextmanager
    def writer(self, seconds: float, *, sql: str = "UPDATE items SET n = n + 1", commit: bool = True) -> Iterator[None]:
        """Another thread that holds the write lock for a while."""
        holds = threading.Event()

        def write() -> None:
            connection = self.connect()
            connection.execute(sql)
            holds.set()
            time.sleep(seconds)
            (connection.commit if commit else connection.rollback)()
            connection.close()

        thread = threading.Thread(target=write)
        thread.start()
        holds.wait()
        try:
            yield
        finally:
            thread.join()


class SyncWorld:
    """Runs test bodies, which are sync functions, on the sync dialect."""

    driver = "libsql"

    def __init__(self, url: str, **options: Any) -> None:
        self.engine: Any = sa.create_engine(f"sqlite+libsql://{url}", **options)
        self.sync_engine: sa.Engine = self.engine

    def connection(self, body: Callable[[sa.Connection], Any], **options: Any) -> Any:
        """Run a body on a connection with these execution options."""
        with self.engine.connect().execution_options(**options) as connection:
            return body(connection)

    def session(self, body: Callable[[Session], Any], **options: Any) -> Any:
        """Run a body on a session."""
        with Session(self.engine.execution_options(**options)) as session:
            return body(session)

    def dispose(self) -> None:
        """Dispose of the engine's connections."""
        self.engine.dispose()

    close = dispose


class AsyncWorld:
    """Runs the same bodies on the async dialect: `run_sync` hands them the sync face of a connection or session."""

    driver = "aiolibsql"

    def __init__(self, url: str, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.engine: Any = create_async_engine(f"sqlite+aiolibsql://{url}", **options)
        self.sync_engine: sa.Engine = self.engine.sync_engine

    def connection(self, body: Callable[[sa.Connection], Any], **options: Any) -> Any:
        """Run a body on a connection with these execution options."""

        async def run() -> Any:
            async with self.engine.connect() as connection:
                await connection.execution_options(**options)
                return await connection.run_sync(body)

        return self.runner.run(run())

    def session(self, body: Callable[[Session], Any], **options: Any) -> Any:
        """Run a body on a session."""

        async def run() -> Any:
            async with AsyncSession(self.engine.execution_options(**options)) as session:
                return await session.run_sync(body)

        return self.runner.run(run())

    def dispose(self) -> None:
        """Dispose of the engine's connections."""
        self.runner.run(self.engine.dispose())

    def close(self) -> None:
        """Dispose of the engine, and end the event loop."""
        self.dispose()
        self.runner.close()


World = SyncWorld | AsyncWorld


@pytest.fixture
def model() -> type[Item]:
    return Item


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """A file with two rows, 1 and 2."""
    database = Database(tmp_path / "app.db")
    engine = sa.create_engine(f"sqlite+libsql:///{database.path}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Item), [{"id": 1, "n": 0}, {"id": 2, "n": 0}])
    engine.dispose()
    return database


@pytest.fixture(params=[SyncWorld, AsyncWorld], ids=["sync", "async"])
def make_world(request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """Makes an engine for a URL (from the third slash on), and disposes of it."""
    worlds: list[World] = []

    def make(url: object, **options: Any) -> World:
        worlds.append(request.param(f"/{url}" if url else "", **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World], database: Database) -> World:
    """An engine on the database."""
    return make_world(database.path, connect_args={"timeout": 2})


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts Python on a script, and ends what is left of it."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run_python(start: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., str]:
    """Runs a piece of Python in a process of its own and returns what it prints; it must succeed."""

    def run(code: str, *arguments: object) -> str:
        process = start("-c", code, *arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out.strip()

    return run
