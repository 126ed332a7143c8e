"""Which engines are dependable, and what a database's refusal means.

An engine is asked once, when the repository first meets it. The stock libSQL dialect is refused, since it loses
updates and hides errors; so is the ``sqlite3`` driver in its default mode, in which a SAVEPOINT can commit a
transaction that is rolled back later.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, OperationalError, UnboundExecutionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from aion_timers import libsql
from aion_timers.errors import (
    NotMigratedError,
    PoolExhaustedError,
    StoreUnavailableError,
    UnsafeEngineError,
    UnsupportedBindError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine

MIGRATE: Final = "run `aion-timers migrate` or `alembic upgrade heads`, or call aion_timers.migrate.upgrade(engine)"

_DRIVERS: Final = {
    "postgresql": ("psycopg", "psycopg_async", "asyncpg"),
    "sqlite": ("libsql", "aiolibsql", "pysqlite", "aiosqlite"),
}
_OLDEST_SQLITE: Final = (3, 35)
_BUSY_TIMEOUT: Final = 5000  # milliseconds, what sqlite3 waits if it is not told otherwise

_dependable: WeakSet[Engine] = WeakSet()
_prepared: WeakSet[Engine] = WeakSet()


def is_dependable(connection: Connection | None) -> bool:
    """Whether the connection is of an engine that has passed `require_dependable`."""
    return connection is not None and connection.engine in _dependable


def require_dependable(connection: Connection) -> None:
    """Refuse a connection of an engine that would lose timers; an engine that passed is not asked again.

    Raises:
        UnsupportedBindError: the database or its driver is not supported.
        UnsafeEngineError: the driver is, but not as this engine has set it up.
    """
    if is_dependable(connection):
        return
    dialect = connection.dialect
    drivers = _DRIVERS.get(dialect.name)
    if drivers is None:
        raise UnsupportedBindError(
            f"there is no support for the database {dialect.name!r}", "use PostgreSQL, a libSQL file or SQLite"
        )
    if dialect.driver not in drivers:
        raise UnsupportedBindError(
            f"there is no support for the driver {dialect.driver!r} of {dialect.name}",
            f"make the engine with one of {', '.join(drivers)}, as in {dialect.name}+{drivers[0]}://",
        )
    if dialect.driver.endswith("libsql"):
        if not libsql.is_sound(dialect):
            raise UnsafeEngineError(
                "the stock libSQL dialect loses updates and hides errors",
                "import aion_timers before create_engine() is called: it puts a sound dialect under the same URL",
            )
    elif dialect.name == "sqlite" and not _begins(connection):
        return
    _dependable.add(connection.engine)


def _begins(connection: Connection) -> bool:
    """Whether a ``sqlite3`` engine has shown that its transactions begin; one that shows otherwise is refused."""
    dialect = connection.dialect
    version = dialect.server_version_info or ()
    if version < _OLDEST_SQLITE:
        raise UnsupportedBindError(f"SQLite {'.'.join(map(str, version))} is too old", "3.35 is the oldest that serves")
    if _is_autocommit(connection):
        return False  # which is fine, but tells nothing of the engine's other connections
    fresh = not connection.in_transaction()
    if fresh:
        connection.begin()
    driver: Any = connection.connection.driver_connection
    driver = getattr(driver, "_conn", driver)  # aiosqlite shows no autocommit attribute
    explicit = driver.isolation_level is None or getattr(driver, "autocommit", None) is False
    # what came before may have begun a transaction in the driver's default mode, too
    if not driver.in_transaction or not (fresh or explicit):
        raise UnsafeEngineError(
            "the sqlite3 driver, as this engine sets it up, begins no transaction before a SAVEPOINT, and commits it",
            "call aion_timers.prepare_sqlite(engine) once after create_engine()",
        )
    return not connection.in_nested_transaction()  # a SAVEPOINT alone looks like a transaction


def _is_autocommit(connection: Connection) -> bool:
    # the driver's own mode does not tell: the level is given for a connection, or for the whole engine
    levels = (
        connection.get_execution_options().get("isolation_level"),
        getattr(connection.dialect, "_on_connect_isolation_level", None),
    )
    return next((level for level in levels if level), None) == "AUTOCOMMIT"


def schema_of(source: Connection | Engine) -> str | None:
    """The schema into which the host translates tables that name none, None if it leaves them in the default one."""
    translated: dict[str | None, str | None] = source.get_execution_options().get("schema_translate_map") or {}
    return translated.get(None)


def name_of_table(source: Connection | Engine) -> str:
    """The table of timers as a statement of this connection or engine names it: quoted, in the schema it is put in."""
    schema = schema_of(source)
    return f"{source.dialect.identifier_preparer.quote_schema(schema)}.timers" if schema else "timers"


def prepare_sqlite(engine: Engine | AsyncEngine) -> None:
    """Make a plain ``sqlite://`` or ``sqlite+aiosqlite://`` engine dependable; call it once after ``create_engine``.

    SQLAlchemy then emits BEGIN itself, as its documentation on the SQLite drivers advises, so that savepoints and DDL
    belong to the transaction; and a commit that fails rolls back. A connection that waits for no lock at all
    (``timeout=0``) waits 5 seconds. Connections at isolation level AUTOCOMMIT stay as they are. An engine of the libSQL
    dialects needs none of this.

    Raises:
        UnsupportedBindError: not an engine of these two drivers, or one that ``execution_options()`` has made of it.
    """
    sync: Engine = getattr(engine, "sync_engine", engine)  # type: ignore[arg-type] # either kind of engine
    if not isinstance(sync, Engine) or sync.dialect.driver not in {"pysqlite", "aiosqlite"}:
        raise UnsupportedBindError(
            "only engines of sqlite:// and sqlite+aiosqlite:// need to be prepared", "use this engine as it is"
        )
    if hasattr(sync, "_proxied"):
        raise UnsupportedBindError(
            "this engine was made by execution_options() and shares the pool of another", "prepare that one"
        )
    if sync in _prepared:
        return

    @event.listens_for(sync, "begin")
    def on_begin(connection: Connection) -> None:
        if _is_autocommit(connection):
            return
        driver: Any = connection.connection.dbapi_connection
        # the mode of a new connection, and of one that comes back from AUTOCOMMIT, is the driver's default
        if driver.isolation_level is not None:
            _prepare_connection(driver)
        connection.exec_driver_sql("BEGIN")

    @event.listens_for(sync, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        # a commit that SQLite refuses leaves its transaction open, which SQLAlchemy takes for ended and returns to the
        # pool, with the lock on the file
        connection = context.connection
        if context.statement is None and connection is not None and not connection.invalidated:
            driver: Any = connection.connection
            if driver.driver_connection.in_transaction:
                driver.rollback()

    _prepared.add(sync)


def _prepare_connection(driver: Any) -> None:  # noqa: ANN401 - sqlite3's or SQLAlchemy's adapter of aiosqlite's
    driver.isolation_level = None
    cursor = driver.cursor()
    cursor.execute("PRAGMA busy_timeout")
    if cursor.fetchone() == (0,):
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT}")
    cursor.close()


# -- what a refusal means ---------------------------------------------------------------------------------------------

_OUR_TABLE: Final = re.compile(r"(?:no such table: |relation \"|table )(?:\w+\.)?timers\b")
_OUR_COLUMN: Final = re.compile(r"column:? \"?(?:timers\.)?(?:workflow_id|timer_id|fire_at|lease_token|lease_until)\b")
_READ_ONLY: Final = re.compile(r"attempt to write a readonly database")
_NO_FILE: Final = re.compile(r"unable to open (?:the )?database|can't be opened", re.IGNORECASE)
_NO_DATABASE: Final = re.compile(r"file is not a database")


@contextmanager
def connecting() -> Iterator[None]:
    """Like `explained`, while a connection is acquired: a server that does not answer is unavailable, too."""
    try:
        with explained():
            yield
    except (OSError, OperationalError) as error:
        orig = getattr(error, "orig", None) or error
        raise StoreUnavailableError(
            f"the database does not answer ({_first_line(orig)})", "see that it runs, and that the URL names it"
        ) from error


@contextmanager
def explained() -> Iterator[None]:
    """Turn those errors of SQLAlchemy that a cure of ours answers into ours; let the others through.

    Raises:
        NotMigratedError: the table, or a column, does not exist.
        PoolExhaustedError: no connection came free in time.
        StoreUnavailableError: the file cannot be opened or written, or is no database.
        UnsupportedBindError: the session has no engine for timers.
    """
    try:
        yield
    except PoolTimeoutError as error:
        raise PoolExhaustedError(
            f"no connection of the pool came free ({_first_line(error)})",
            "give the engine a larger pool_size, or close sessions and connections sooner",
        ) from error
    except UnboundExecutionError as error:
        raise UnsupportedBindError(
            "the session has no engine for timers",
            "give it one, as in Session(engine) or Session(binds={Timer: engine})",
        ) from error
    except DBAPIError as error:
        if (ours := _explain(error)) is not None:
            raise ours from error
        raise


def _explain(error: DBAPIError) -> Exception | None:
    state = getattr(error.orig, "sqlstate", None)
    text = _first_line(error.orig) if error.orig is not None else ""
    missing = state in {None, "42P01", "42703"} and (_OUR_TABLE.search(text) or _OUR_COLUMN.search(text))
    if missing or state == "3F000":
        return NotMigratedError(f"the database is not migrated ({text})", MIGRATE)
    if state == "25006" or _READ_ONLY.search(text):
        return StoreUnavailableError(
            f"the database can only be read ({text})",
            "use a file and a directory that this process may write, or the primary server",
        )
    if _NO_DATABASE.search(text):
        return StoreUnavailableError(
            f"the file holds no SQLite database ({text})", "check the path in the URL, and the key of an encrypted file"
        )
    if _NO_FILE.search(text):
        return StoreUnavailableError(
            f"the file cannot be opened ({text})", "create its directory, and let this process write there"
        )
    return None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
