"""Which database a command works on, engines for it, and what its errors mean to somebody at a terminal."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer
from sqlalchemy import URL, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from aion_timers.engine import MIGRATE, connecting, prepare_sqlite
from aion_timers.errors import (
    InvalidInputError,
    MigrationError,
    StoreUnavailableError,
    TimerStoreError,
    UnsupportedBindError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

VARIABLE: Final = "AION_TIMERS_URL"
FINDING: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 69
SOFTWARE: Final = 70
CONFIG: Final = 78

_EXAMPLES: Final = "as in postgresql+psycopg://user@host/name or sqlite+libsql:////path/to/timers.db"
_SHORTEST_SECRET: Final = 8
_TWINS: Final = {
    "postgresql+asyncpg": "postgresql+psycopg",
    "postgresql+psycopg_async": "postgresql+psycopg",
    "sqlite+aiolibsql": "sqlite+libsql",
    "sqlite+aiosqlite": "sqlite",
}
_ASYNC_TWINS: Final = {
    "sqlite+libsql": "sqlite+aiolibsql",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+pysqlite": "sqlite+aiosqlite",
}
_OF_ASYNCPG: Final = {"ssl": "sslmode", "timeout": "connect_timeout"}
_ONLY_ASYNCPG: Final = ("command_timeout", "prepared_statement_cache_size", "prepared_statement_name_func")


class CommandError(Exception):
    """What ends a command: one line that names the value and the cure, and the code to exit with."""

    def __init__(self, message: str, code: int = FINDING) -> None:
        super().__init__(message)
        self.code = code


class Database:
    """A database that a command works on.

    Args:
        url: its URL; the text may hold a secret, so no message shows it. By default that of the environment.
        schema: the PostgreSQL schema of the table, by default the one that the connection finds first.
        origin: what the URL is called in messages.
        new: whether a file that does not exist may be made.

    Raises:
        CommandError: no URL, or none that serves.
    """

    def __init__(self, url: str | None, schema: str | None = None, *, origin: str = "--url", new: bool = False) -> None:
        if not url:
            raise CommandError(f"no database was named; give --url or set {VARIABLE}, {_EXAMPLES}", USAGE)
        try:
            self.url = make_url(url)
        except (ArgumentError, ValueError):
            raise CommandError(f"{origin} is not the URL of a database; give one, {_EXAMPLES}", USAGE) from None
        if self.url.drivername == "libsql":
            self.url = _with_driver(self.url)
        backend = self.url.get_backend_name()
        if backend not in {"postgresql", "sqlite"}:
            raise CommandError(f"{origin} names the database {backend!r}; give one that serves, {_EXAMPLES}", USAGE)
        self.schema = schema
        self.is_sqlite = backend == "sqlite"
        if schema and self.is_sqlite:
            raise CommandError(f"--schema {schema!r}: a file has no schemas; leave it out", USAGE)
        if self.is_sqlite and not new:
            self._require_file()

    def _require_file(self) -> None:
        # SQLite makes a file that does not exist, and a slip of the pen would then be an empty database
        path = self.path
        if path is not None and not path.exists():
            raise CommandError(
                f"there is no file {path}; correct the path, or make the database with `aion-timers migrate`",
                UNAVAILABLE,
            )

    @property
    def path(self) -> Path | None:
        """The file of the SQLite family, None if there is none or it is named by a URI."""
        name = self.url.database
        if not self.is_sqlite or not name or name == ":memory:" or self.url.host or name.startswith("file:"):
            return None
        return Path(name).absolute()

    @property
    def sync_url(self) -> URL:
        """The URL of the sync driver that serves the same database."""
        name = self.url.drivername
        url = self.url.set(drivername=_TWINS.get(name, name))
        if name == "postgresql+asyncpg":
            url = url.difference_update_query([*_OF_ASYNCPG, *_ONLY_ASYNCPG])
            url = url.update_query_dict(
                {ours: self.url.query[its] for its, ours in _OF_ASYNCPG.items() if its in self.url.query}
            )
        return url

    @property
    def async_url(self) -> URL:
        """The URL of an async driver that serves the same database."""
        name = self.url.drivername
        return self.url.set(drivername=_ASYNC_TWINS.get(name, name))

    def engine(self, **options: Any) -> Engine:  # noqa: ANN401 - those of create_engine
        """A sync engine; without options it has no pool."""
        options.setdefault("poolclass", NullPool)
        with told(self):
            engine: Engine = self._set_up(create_engine(self.sync_url, **options))
        return engine

    def async_engine(self, **options: Any) -> AsyncEngine:  # noqa: ANN401 - those of create_async_engine
        """An async engine."""
        with told(self):
            from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - what it needs is an extra

            engine: AsyncEngine = self._set_up(create_async_engine(self.async_url, **options))
        return engine

    def _set_up(self, engine: Any) -> Any:  # noqa: ANN401 - either kind of engine
        if self.is_sqlite and engine.dialect.driver in {"pysqlite", "aiosqlite"}:
            prepare_sqlite(engine)
        if self.schema:
            return engine.execution_options(schema_translate_map={None: self.schema})
        return engine

    @property
    def identity(self) -> tuple[object, ...]:
        """What two URLs of one database have in common."""
        if self.path is not None:
            return (self.path.resolve(),)
        url = self.url
        return (url.get_backend_name(), url.host, url.port, url.database, *url.query.items(), self.schema)

    def __str__(self) -> str:
        """The URL without password and options, any of which may be a secret."""
        name = self.url.set(query={}).render_as_string(hide_password=True)
        return f"{name} (schema {self.schema})" if self.schema else name

    def scrub(self, text: str) -> str:
        """The text without the secrets of the URL, which a server may echo."""
        # an option such as "1" or "true" is no secret, and taking it out would garble the text
        options = [str(value) for value in self.url.query.values() if len(str(value)) >= _SHORTEST_SECRET]
        for secret in (self.url.password, *options):
            if secret:
                text = text.replace(str(secret), "***")
        return text


def _with_driver(url: URL) -> URL:
    """The long form of ``libsql://``, which means TLS unless it says something else."""
    said = "secure" in url.query or "tls" in url.query or not url.host
    return url.set(drivername="sqlite+libsql").update_query_dict({} if said else {"secure": "true"})


# -- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def told(*databases: Database) -> Iterator[None]:
    """Turn what can go wrong into a `CommandError`, which has one line and an exit code."""
    try:
        with connecting():
            yield
    except (CommandError, typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        message, code = _meaning(error, databases)
        for database in databases:
            message = database.scrub(message)
        raise CommandError(message, code) from error


_MEANINGS: Final[tuple[tuple[type[Exception], int, str | None], ...]] = (
    (MigrationError, CONFIG, None),
    (StoreUnavailableError, UNAVAILABLE, None),
    (UnsupportedBindError, CONFIG, None),
    (TimerStoreError, FINDING, None),
    (OperationalError, UNAVAILABLE, "see that the database can be reached, and try again"),
    (DBAPIError, SOFTWARE, "see that this user may do it, and what `aion-timers doctor` says"),
    (SQLAlchemyError, USAGE, "see the URL and its options"),
)
"""What an error means, the first that fits: the code to exit with, and the cure if the error names none itself."""


def _meaning(error: Exception, databases: tuple[Database, ...]) -> tuple[str, int]:
    if isinstance(error, InvalidInputError):
        return str(error), USAGE
    names = " and ".join(map(str, databases))
    place = f"{names}: " if names else ""
    if isinstance(error, ModuleNotFoundError):
        return place + _missing(error), CONFIG
    for kind, code, cure in _MEANINGS:
        if isinstance(error, kind):
            said = (
                str(error).replace(MIGRATE, "run `aion-timers migrate`") if cure is None else f"{_said(error)}; {cure}"
            )
            return place + said, code
    return f"{place}{type(error).__name__}: {_said(error)}; {_TRACEBACK}", SOFTWARE


_TRACEBACK: Final = "set AION_TIMERS_TRACEBACK=1 to see where"


def _missing(error: ModuleNotFoundError) -> str:
    if error.name is None:
        return str(error)
    extras = {"psycopg": "postgres", "asyncpg": "postgres", "aiosqlite": "asyncio", "greenlet": "asyncio"}
    extra = extras.get(error.name.partition(".")[0])
    cure = f"pip install 'aion-timers[{extra}]'" if extra else f"pip install {error.name}"
    return f"the module {error.name!r} is not installed; {cure}"


def _said(error: BaseException) -> str:
    text = str(getattr(error, "orig", None) or error).strip()
    return text.partition("\n")[0] or type(error).__name__


def wants_traceback() -> bool:
    """Whether an error that nobody expected is shown with its traceback."""
    return os.environ.get("AION_TIMERS_TRACEBACK", "") not in {"", "0"}
