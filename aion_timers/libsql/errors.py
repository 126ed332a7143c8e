"""The exceptions of PEP 249, and four more that tell a caller what to do next.

::

    Exception
    ├── Warning
    └── Error
        ├── InterfaceError
        └── DatabaseError
            ├── DataError
            ├── IntegrityError
            ├── InternalError
            ├── NotSupportedError
            ├── OperationalError
            │   ├── BusyError            try again later
            │   ├── DisconnectError      take another connection
            │   ├── OutcomeUnknownError  look whether it was done
            │   └── SnapshotError        roll back and run the transaction again
            └── ProgrammingError
                └── ClosedError          the connection was closed

The module needs no driver, so that ``except SnapshotError`` can be written everywhere.
"""


class Warning(Exception):  # noqa: A001, N818 - PEP 249 fixes the name
    """An important warning; nothing here raises it."""


class Error(Exception):
    """Every error of this package."""

    code: str | None = None
    """What a server calls it, such as ``SQLITE_CONSTRAINT`` or ``STREAM_EXPIRED``; None for a file."""


class InterfaceError(Error):
    """The database interface was used in a way that it can't serve."""


class DatabaseError(Error):
    """An error of the database, or a file that isn't one."""


class DataError(DatabaseError):
    """A value that can't be stored as it is."""


class IntegrityError(DatabaseError):
    """A constraint was violated."""


class InternalError(DatabaseError):
    """The database is in a state that it should not be in."""


class NotSupportedError(DatabaseError):
    """Something that SQLite or the driver can't do."""


class OperationalError(DatabaseError):
    """The database could not do what it was asked."""


class ProgrammingError(DatabaseError):
    """A mistake in the statement, its parameters or the order of calls."""


class BusyError(OperationalError):
    """Another connection held the lock, or a server took no requests, for longer than ``timeout``."""


class DisconnectError(OperationalError):
    """The connection broke; a pool replaces it."""


class OutcomeUnknownError(OperationalError):
    """A server gave no answer to a COMMIT, or to a write at level AUTOCOMMIT: it may have been done, or not.

    The connection broke, and a pool replaces it. Look at the database before you do the same again.
    """


class SnapshotError(OperationalError):
    """What the transaction has read can't be relied on any more, so it may not write.

    Another connection committed since the first read, and the reads give other rows now or can't be repeated.
    Nothing was written. Everything but the clean-up of savepoints is refused until ``rollback()``; then run the whole
    transaction again, at isolation level IMMEDIATE if it should not meet this error a second time.
    """


class ClosedError(ProgrammingError):
    """The connection is closed."""
