"""PEP 249 over Hrana: like the module for files, but for what a server is and isn't told.

Values are those of a file; besides, text may hold NUL characters, and integers are exact. An infinite number can be
neither sent nor read. sqld refuses some statements: ATTACH, VACUUM, temporary tables.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aion_timers.libsql import dbapi as file_dbapi
from aion_timers.libsql.dbapi import (
    DEFAULT_TIMEOUT,
    Binary,
    BusyError,
    ClosedError,
    DatabaseError,
    DataError,
    DisconnectError,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    OutcomeUnknownError,
    ProgrammingError,
    SnapshotError,
    Warning,  # noqa: A004 - PEP 249 fixes the name
    apilevel,
    paramstyle,
    sqlite_version,
    sqlite_version_info,
    threadsafety,
)
from aion_timers.libsql.hrana.address import Server
from aion_timers.libsql.hrana.http import Exchange, Settings, SyncExchange, proxy_for
from aion_timers.libsql.hrana.stream import Stream
from aion_timers.libsql.hrana.transaction import Transaction
from aion_timers.libsql.sql import Statement, parse

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Sequence

    from aion_timers.libsql.hrana.protocol import ResultSet

__all__ = [
    "Binary",
    "BusyError",
    "ClosedError",
    "Connection",
    "Cursor",
    "DataError",
    "DatabaseError",
    "DisconnectError",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "NotSupportedError",
    "OperationalError",
    "OutcomeUnknownError",
    "ProgrammingError",
    "SnapshotError",
    "Warning",
    "apilevel",
    "connect",
    "paramstyle",
    "sqlite_version",
    "sqlite_version_info",
    "threadsafety",
]

_ConnectionT = TypeVar("_ConnectionT", bound="Connection")

CONNECT_TIMEOUT: Final = 5.0
READ_TIMEOUT: Final = 30.0
REQUEST_TIMEOUT: Final = 120.0


def connect(address: str, **options: Any) -> Connection:  # noqa: ANN401 - those of open_connection()
    """Connect to a server, for sync code; see `open_connection`."""
    return open_connection(Connection, SyncExchange, address, **options)


def open_connection(
    kind: type[_ConnectionT],
    exchange: Callable[[Settings, dict[str, str]], Exchange],
    address: str,
    *,
    auth_token: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    connect_timeout: float = CONNECT_TIMEOUT,
    read_timeout: float = READ_TIMEOUT,
    request_timeout: float = REQUEST_TIMEOUT,
    isolation_level: str | None = "SERIALIZABLE",
    ssl_context: ssl.SSLContext | None = None,
) -> _ConnectionT:
    """Connect to a server, and see that it answers and accepts the token.

    Args:
        kind: the connection's class.
        exchange: what carries requests.
        address: ``http://host:port`` or ``https://host:port``, perhaps with a path.
        auth_token: for the server, as a bearer token.
        timeout: how many seconds to try again while the server says that it is busy. It waits for a lock itself, too,
            as long as it likes.
        connect_timeout: how many seconds it may take until there is a connection, TLS included.
        read_timeout: how many seconds the server may be silent: more than the slowest statement takes.
        request_timeout: how many seconds one round trip may take, from its beginning to the end of the answer.
        isolation_level: ``SERIALIZABLE``, ``IMMEDIATE`` or ``AUTOCOMMIT``; None is ``AUTOCOMMIT``.
        ssl_context: how the server's certificate is checked; the usual way if it isn't given.

    Raises:
        DisconnectError: the server can't be reached, or doesn't answer in time.
        OperationalError: it refuses, or isn't a libSQL server.
        ProgrammingError: an argument is wrong.
    """
    server = Server(address.rstrip("/") if isinstance(address, str) else address, auth_token)
    settings = Settings(
        checked_limit("connect_timeout", connect_timeout),
        checked_limit("read_timeout", read_timeout),
        checked_limit("request_timeout", request_timeout),
        ssl_context,
        proxy_for(server.base),
    )
    level, seconds = file_dbapi.checked_level(isolation_level), file_dbapi.checked_timeout(timeout)
    connection = kind(Transaction(Stream(server, exchange(settings, server.headers)), level, seconds))
    try:
        connection.ping()
    except BaseException:
        connection.close()
        raise
    return connection


def checked_limit(name: str, seconds: object) -> float:
    """A time limit, if it is a number of seconds; else ProgrammingError."""
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf:
        return float(seconds)
    raise ProgrammingError(f"{name} is a number of seconds, more than 0, not {seconds!r}")


class Connection(file_dbapi.Connection):
    """A connection. One thread or task at a time may use it, and any may."""

    _transaction: Any

    def __init__(self, transaction: Transaction) -> None:
        super().__init__(transaction)  # type: ignore[arg-type] # it does the same as a file's

    def cursor(self, *, server_side: bool = False) -> Cursor:  # noqa: ARG002 - rows are read whole in any case
        """A new cursor."""
        return Cursor(self)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Cursor:
        """Run a statement on a new cursor."""
        return Cursor(self).execute(sql, parameters)

    def commit(self) -> None:
        """Commit; a commit that fails rolls back. If nothing was written it may go on without the server's answer.

        Raises:
            IntegrityError: a deferred foreign key is violated.
            OperationalError: the transaction had been rolled back after an error.
            OutcomeUnknownError: no answer came, so it may have been committed or not.
        """
        super().commit()

    def ping(self) -> None:
        """See whether the server answers; it begins no transaction."""
        self._transaction.ping()

    def data_version(self) -> int:
        """Refuse: it is of a file."""
        raise NotSupportedError("a server has no data_version(): its files are its own")

    def sync(self) -> None:
        """Refuse: only a replica can be synchronized."""
        raise NotSupportedError("sync() is for embedded replicas: what a server has is read from it")

    def abandon(self) -> None:
        """Drop the connection without a round trip; the server rolls back some seconds later."""
        self._transaction.close(quietly=True)


class Cursor(file_dbapi.Cursor):
    """Runs statements and holds the rows of the last one."""

    __slots__ = ()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Cursor:
        """Run one statement with a sequence of values for its ``?`` marks.

        Raises:
            BusyError: the server was busy for longer than the connection's ``timeout``.
            DisconnectError: the transaction is gone: its stream has expired, or the server can't be reached.
            OutcomeUnknownError: no answer came to a write at level AUTOCOMMIT, so it may have been done or not.
            SnapshotError: the transaction can't go from reading to writing; roll back and run it again.
        """
        transaction: Any = self._open()
        statement = parse(sql)
        result: ResultSet | None = transaction.execute(statement, _bound(statement, parameters))
        if result is None:
            return self
        if result.columns:
            self.description = tuple([(name, None, None, None, None, None, None) for name in result.columns])
            self._rows = iter(result.rows)
        if statement.changes_rows:
            self.lastrowid = result.last_rowid
            self.rowcount = len(result.rows) if result.columns else result.changed
        return self

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]]) -> Cursor:
        """Run an INSERT, UPDATE, DELETE or REPLACE for each set of parameters; rows that it returns are dropped."""
        transaction: Any = self._open()
        statement = parse(sql)
        if not statement.changes_rows:
            raise ProgrammingError("executemany() is for INSERT, UPDATE, DELETE and REPLACE: use execute()")
        self.rowcount = transaction.execute_many(statement, (_bound(statement, one) for one in parameters))
        return self

    async def _async_soft_close(self) -> None:
        """Do nothing: there are no rows that have not been read."""


def _bound(statement: Statement, parameters: Sequence[Any]) -> tuple[Any, ...]:
    values = file_dbapi.positional(parameters)
    if len(values) != statement.parameter_count:
        raise ProgrammingError(
            f"the statement has {statement.parameter_count} parameters, but {len(values)} were given"
        )
    return values
