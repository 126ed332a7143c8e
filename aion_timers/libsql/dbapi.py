"""PEP 249 over the libSQL driver.

``connect()`` opens a database; transactions begin by themselves, as ``transaction`` tells. Results are read whole in
``execute``: an error in the middle of them is raised there, and nothing that was left unread stops a commit. Values
are None, int (64 bits), float, str and bytes, as SQLite knows them. The module has no type objects: SQLite types
values, not columns.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from aion_timers.libsql import forking
from aion_timers.libsql.driver import Description, Source
from aion_timers.libsql.errors import (
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
)
from aion_timers.libsql.replica import Claim, require_primary
from aion_timers.libsql.sql import (
    INT32_MAX,
    INT32_MIN,
    INT64_MAX,
    INT64_MIN,
    Parameters,
    Row,
    Rows,
    Statement,
    bindable,
    parse,
)
from aion_timers.libsql.transaction import Level, State, Transaction

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

apilevel: Final = "2.0"
threadsafety: Final = 1
paramstyle: Final = "qmark"
Binary: Final = bytes

# of the driver's build; the number that the driver's module gives is that of another
sqlite_version_info: Final = (3, 45, 1)
sqlite_version: Final = "3.45.1"

DEFAULT_TIMEOUT: Final = 15.0
"""Seconds to wait for a lock."""

_SYNCHRONOUS = ("FULL", "NORMAL")


def connect(
    database: str | os.PathLike[str],
    *,
    timeout: float = DEFAULT_TIMEOUT,
    isolation_level: str | None = "SERIALIZABLE",
    synchronous: str = "FULL",
    **options: Any,  # noqa: ANN401 - the driver's own
) -> "Connection":
    """Open a database; a file is switched to WAL, unless it can't be written.

    Args:
        database: a path, ``:memory:``, a ``file:`` URI together with ``uri=True``, or a server's address.
        timeout: how many seconds to wait for a lock that another connection holds, and for the primary of a replica to
            answer when the replica is opened.
        isolation_level: ``SERIALIZABLE``, ``IMMEDIATE`` or ``AUTOCOMMIT``; None is ``AUTOCOMMIT``, as in ``sqlite3``.
        synchronous: ``FULL`` keeps every commit through a power cut; ``NORMAL`` is faster, and a power cut may take
            back the last commits.
        options: for the driver, such as ``uri``, ``encryption_key``, ``sync_url``, ``auth_token``.

    Raises:
        DatabaseError: the file isn't a database, or its encryption key is another.
        OperationalError: it can't be opened or read.
        ProgrammingError: an argument is wrong.
    """
    address = os.fspath(database) if isinstance(database, os.PathLike) else database
    if not isinstance(address, str):
        raise ProgrammingError(f"a database is given as a str or a path, not as {type(database).__name__}")
    source = Source(address, {name: value for name, value in options.items() if name not in _FOR_SQLITE3})
    source.require_known()
    level, seconds, safety = checked_level(isolation_level), checked_timeout(timeout), checked_synchronous(synchronous)
    if source.is_replica:
        return _open_replica(source, level, seconds)
    connection = Connection(Transaction(source.open(), source, level, seconds))
    if source.is_file:
        try:
            _set_up(connection, source, safety)
        except BaseException:
            connection.close()
            raise
    return connection


def _open_replica(source: Source, level: Level, timeout: float) -> "Connection":
    """Open a replica, with what its primary has now."""
    forking.require_openable(source)  # before its primary is asked for nothing
    claim = Claim(source.name)
    try:
        require_primary(source.options["sync_url"], timeout)
        connection = Connection(Transaction(source.open(), source, level, timeout, claim))
    except BaseException:
        claim.release()
        raise
    try:
        connection.sync()
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: "Connection", source: Source, synchronous: str) -> None:
    """Switch a file to WAL and set how it is synced. The journal mode stays in the file, the other does not."""
    try:
        mode = connection.execute("PRAGMA journal_mode").fetchone()
    except OperationalError as error:
        if _READ_ONLY not in str(error):
            raise
        raise OperationalError(
            f"{source.name} can't be read: it is in WAL mode, and this user may not write the two files that SQLite"
            " keeps beside it; let this user write to the directory, or, if nobody writes the file meanwhile, open"
            " file:PATH?immutable=1 with uri=true"
        ) from None
    if mode != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except OperationalError as error:
            if _READ_ONLY not in str(error):  # else it can be read as it is
                raise
    connection.execute(f"PRAGMA synchronous={synchronous}")


_READ_ONLY = "readonly database"

# SQLAlchemy's SQLite dialects pass these on; they tune sqlite3 and mean nothing here
_FOR_SQLITE3 = frozenset(("cached_statements", "check_same_thread", "detect_types"))


def checked_timeout(timeout: object) -> float:
    """The timeout, if it is a number of seconds; else ProgrammingError."""
    if isinstance(timeout, int | float) and not isinstance(timeout, bool) and 0 <= timeout < math.inf:
        return float(timeout)
    raise ProgrammingError(f"timeout is a number of seconds, 0 or more, not {timeout!r}")


def checked_synchronous(synchronous: object) -> str:
    """The setting, if it is one of the two; else ProgrammingError."""
    if synchronous in _SYNCHRONOUS:
        return str(synchronous)
    raise ProgrammingError(f"synchronous is FULL or NORMAL, not {synchronous!r}")


def checked_level(name: object) -> Level:
    """The level of this name; else ProgrammingError."""
    if name is None:
        return Level.AUTOCOMMIT
    try:
        return Level(name)
    except ValueError:
        known = ", ".join(level.value for level in Level)
        raise ProgrammingError(f"the isolation level is one of {known}, not {name!r}") from None


class Connection:
    """A connection. One thread at a time may use it, and any thread may."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def __repr__(self) -> str:
        return f"<libSQL connection to {self._transaction.source.name}>"

    @property
    def isolation_level(self) -> str:
        """``SERIALIZABLE``, ``IMMEDIATE`` or ``AUTOCOMMIT``; it can be set outside a transaction."""
        return self._transaction.level.value

    @isolation_level.setter
    def isolation_level(self, name: str | None) -> None:
        self._transaction.level = checked_level(name)

    @property
    def timeout(self) -> float:
        """Seconds to wait for a lock."""
        return self._transaction.timeout

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, or was lost and wants a ``rollback()``."""
        return self._transaction.state is not State.IDLE

    @property
    def is_the_parents(self) -> bool:
        """Whether it was opened before this process was forked: here all but ``rollback()`` and ``close()`` fail."""
        return self._transaction.is_the_parents

    def cursor(self) -> "Cursor":
        """A new cursor."""
        return Cursor(self)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> "Cursor":
        """Run a statement on a new cursor."""
        return Cursor(self).execute(sql, parameters)

    def commit(self) -> None:
        """Commit; a commit that fails rolls back.

        Raises:
            IntegrityError: a deferred foreign key is violated.
            OperationalError: the transaction had been rolled back after an error.
        """
        self._transaction.commit()

    def rollback(self) -> None:
        """Roll back; without a transaction it does nothing."""
        self._transaction.rollback()

    def ping(self) -> None:
        """See whether the connection works; it begins no transaction."""
        transaction = self._transaction
        raw = transaction.raw
        transaction.source.call(lambda: raw.execute("SELECT 1").fetchall())

    def data_version(self) -> int:
        """A number that is another one once somebody else has committed to the file, as ``PRAGMA data_version`` has it.

        It begins no transaction. It is for who asks all the time: of what a cursor does, it does the least.
        """
        return self._transaction.data_version()

    def sync(self) -> None:
        """Fetch what the primary of an embedded replica has.

        Raises:
            OperationalError: the primary doesn't answer within ``timeout``; what the replica has can still be read.
            ProgrammingError: the connection is no replica, or a transaction is open.
        """
        self._transaction.sync()

    def abandon(self) -> None:
        """Let a statement that waits for a lock in another thread fail now; the connection can only be closed then."""
        self._transaction.abandoned = True

    def close(self) -> None:
        """Roll back and close; a second call does nothing."""
        self._transaction.close()


class Cursor:
    """Runs statements and holds the rows of the last one."""

    __slots__ = (
        "__weakref__",
        "_rows",
        "_transaction",
        "arraysize",
        "connection",
        "description",
        "lastrowid",
        "rowcount",
    )

    description: Description | None
    lastrowid: int | None
    rowcount: int
    arraysize: int

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._transaction: Transaction | None = connection._transaction  # noqa: SLF001 - one interface, two classes
        self._rows: Iterator[Row] | None = None
        self.description = None
        self.lastrowid = None
        self.rowcount = -1
        self.arraysize = 1

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> "Cursor":
        """Run one statement with a sequence of values for its ``?`` marks.

        Raises:
            BusyError: the lock was not free within the connection's ``timeout``.
            SnapshotError: the transaction can't go from reading to writing; roll back and run it again.
        """
        transaction = self._open()
        statement = parse(sql)
        text, values = _bound(statement, parameters) if parameters or statement.parameter_count else (sql, ())
        outcome = transaction.execute(statement, text, values)
        if outcome is None:
            return self
        raw, description, rows = outcome
        if rows is not None:
            self.description = description
            self._rows = iter(rows)
        if statement.changes_rows:
            self.lastrowid = raw.lastrowid
            # the driver's count is that of the statement before until all rows are read
            self.rowcount = raw.rowcount if rows is None else len(rows)
        return self

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]]) -> "Cursor":
        """Run an INSERT, UPDATE, DELETE or REPLACE for each set of parameters; rows that it returns are dropped."""
        transaction = self._open()
        statement = parse(sql)
        if not statement.changes_rows:
            raise ProgrammingError("executemany() is for INSERT, UPDATE, DELETE and REPLACE: use execute()")
        changed = 0
        for one in parameters:
            text, values = _bound(statement, one)
            outcome = transaction.execute(statement, text, values)
            if outcome is not None:
                raw, _, rows = outcome
                changed += raw.rowcount if rows is None else len(rows)
        self.rowcount = changed
        return self

    def fetchone(self) -> Row | None:
        """The next row, None after the last."""
        rows = self._rows
        return next(self._results() if rows is None else rows, None)

    def fetchmany(self, size: int | None = None) -> Rows:
        """The next rows, ``arraysize`` of them if no size is given."""
        return list(islice(self._results(), self.arraysize if size is None else size))

    def fetchall(self) -> Rows:
        """All rows that are left."""
        return list(self._results())

    def __iter__(self) -> Iterator[Row]:
        return self._results()

    def close(self) -> None:
        """Drop the rows; the cursor can't be used any more."""
        self._transaction = self._rows = self.description = None

    def setinputsizes(self, sizes: object) -> None:
        """Do nothing, as PEP 249 allows."""

    def setoutputsize(self, size: object, column: object = None) -> None:
        """Do nothing, as PEP 249 allows."""

    def _open(self) -> Transaction:
        if self._transaction is None:
            raise ProgrammingError("the cursor is closed")
        self.description = self.lastrowid = self._rows = None
        self.rowcount = -1
        return self._transaction

    def _results(self) -> Iterator[Row]:
        if self._rows is None:
            if self._transaction is None:
                raise ProgrammingError("the cursor is closed")
            raise ProgrammingError("there are no rows to fetch: the last statement returned none")
        return self._rows


def _bound(statement: Statement, parameters: Sequence[Any]) -> tuple[str, Parameters]:
    """The text and the values that the driver can bind for these parameters."""
    values = parameters if type(parameters) is tuple else positional(parameters)
    if len(values) != statement.parameter_count:
        raise ProgrammingError(
            f"the statement has {statement.parameter_count} parameters, but {len(values)} were given"
        )
    wide = False
    for value in values:
        kind = type(value)
        if kind is str:
            if "\0" in value:
                bindable(value)
        elif kind is int:
            if not INT32_MIN <= value <= INT32_MAX:
                wide = True
                if not INT64_MIN <= value <= INT64_MAX:
                    bindable(value)
        elif value is not None and kind is not float and kind is not bytes:
            # a subclass or a type that wants converting is rare: all over again, the long way
            return statement.inlined(tuple([bindable(one) for one in values]))
    return statement.inlined(values) if wide else (statement.sql, values)


def positional(parameters: object) -> tuple[Any, ...]:
    """The parameters, if they are a sequence; else NotSupportedError."""
    if isinstance(parameters, Sequence) and not isinstance(parameters, str | bytes | bytearray | memoryview):
        return tuple(parameters)
    raise NotSupportedError(f"parameters are given as a sequence, not as {type(parameters).__name__}")
