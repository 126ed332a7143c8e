"""A sound SQLAlchemy dialect, sync and async, for libSQL files. Importing it needs no driver.

After ``register()`` the usual URLs ``sqlite+libsql:///file.db`` and ``sqlite+aiolibsql:///file.db`` give engines whose
transactions are real and whose errors are those of PEP 249. A transaction begins with its first statement:

=================  ==============================  ========================
isolation level    first statement reads           first statement writes
=================  ==============================  ========================
``SERIALIZABLE``   a snapshot, without a lock      waits for the write lock
``IMMEDIATE``      waits for the write lock        waits for the write lock
``AUTOCOMMIT``     no transaction                  no transaction
=================  ==============================  ========================

``SERIALIZABLE`` is the default. Whoever only reads holds no lock. A transaction that has read and then writes fails
with ``SnapshotError`` if another connection has changed what it read; it is to be run again. Rows that many read and
write are better served at ``IMMEDIATE``. Waiting ends with ``BusyError`` after ``timeout`` seconds (15 by default;
``?timeout=5`` in the URL or ``connect_args={"timeout": 5}``). Files are in WAL mode; ``create_engine(...,
synchronous="NORMAL")`` trades the last commits before a power cut for speed.
"""

import importlib
import sys
from contextlib import suppress

from sqlalchemy.dialects import registry
from sqlalchemy.engine.interfaces import Dialect

from aion_timers.libsql.driver import load
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

__all__ = [
    "BusyError",
    "ClosedError",
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
    "is_sound",
    "register",
]

_MODULE = "aion_timers.libsql.sound"


def register() -> None:
    """Make ``sqlite+libsql``, ``sqlite+aiolibsql`` and ``libsql`` the names of this package's dialects.

    What each needs, the driver or httpx, is needed only when an engine is made.
    """
    # sqlalchemy_libsql registers its own dialects when it is first imported: that shall be before, not after
    with suppress(ImportError):
        load()
        importlib.import_module("sqlalchemy_libsql")
    registry.register("sqlite.libsql", _MODULE, "SyncEntry")
    registry.register("sqlite.aiolibsql", _MODULE, "AsyncEntry")
    registry.register("libsql", _MODULE, "EitherEntry")


def is_sound(dialect: Dialect) -> bool:
    """Whether it is one of this package's dialects; an engine made before ``register()`` has another."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(dialect, module.SoundDialect)
