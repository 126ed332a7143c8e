"""The driver, ``libsql_experimental``, behind types and PEP 249's exceptions: the only module that imports it.

The driver reports every error as a ``ValueError`` with SQLite's text, and its own failures as panics, which aren't
even ``Exception``.
"""

import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import unquote

from aion_timers.libsql import forking
from aion_timers.libsql.errors import (
    BusyError,
    DatabaseError,
    DataError,
    DisconnectError,
    Error,
    IntegrityError,
    OperationalError,
    ProgrammingError,
)
from aion_timers.libsql.replica import without_secrets
from aion_timers.libsql.sql import Parameters, Rows
from aion_timers.libsql.waiting import Line, line_of

Description = tuple[tuple[str, None, None, None, None, None, None], ...]
_T = TypeVar("_T")


class RawCursor(Protocol):
    """What the driver returns for a statement."""

    description: Description | None
    lastrowid: int | None
    rowcount: int

    def fetchall(self) -> Rows:
        """All rows that are left."""


class RawConnection(Protocol):
    """A connection of the driver."""

    in_transaction: bool

    def execute(self, sql: str, parameters: Parameters = ()) -> RawCursor:
        """Run one statement up to its first row."""

    def commit(self) -> None:
        """Commit."""

    def rollback(self) -> None:
        """Roll back."""

    def sync(self) -> None:
        """Fetch what a replica's primary has."""

    def close(self) -> None:
        """Drop the connection."""


MISSING: Final = (
    "libSQL databases need the driver: pip install sqlalchemy-libsql (its driver, libsql-experimental, has wheels for"
    " Linux on x86-64 with glibc and for macOS, for Python up to 3.13; elsewhere use sqlite:// or PostgreSQL)"
)
"""What to do when an import of the driver fails."""


def load() -> ModuleType:
    """Import the driver.

    What it has to log of a replica would go to stdout, so nothing is logged unless RUST_LOG is set.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    silenced = _LOG not in os.environ
    if silenced:
        os.environ[_LOG] = "off"  # it is read once, when the driver is imported
    try:
        return importlib.import_module("libsql_experimental")
    except ImportError as error:
        raise ModuleNotFoundError(MISSING) from error
    finally:
        if silenced:
            del os.environ[_LOG]


_LOG = "RUST_LOG"


def is_panic(error: BaseException) -> bool:
    """Whether the driver itself has failed; such an error isn't even an ``Exception``."""
    return type(error).__name__ == "PanicException"


def needs_primary(error: BaseException) -> bool:
    """Whether a replica refused a statement in a transaction that only reads."""
    return "Invalid write in a readonly transaction" in str(error)


_REMOTE = re.compile(r"(?:https?|libsql)://", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SECRET_OPTIONS = ("auth_token", "encryption_key")
_URI = "file:"
_IN_MEMORY = re.compile(r":memory:$|file::memory:|file:.*[?&](?:mode=memory|vfs=memdb)\b")


def in_memory(database: str) -> bool:
    """Whether this names a database in memory, or a file without a name, which SQLite deletes when it is closed."""
    return database in {"", _URI} or _IN_MEMORY.match(database) is not None


@dataclass(frozen=True, eq=False)  # each is one connection's own
class Source:
    """What a connection was opened on; its text never shows a secret."""

    database: str = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The path, or the address without credentials and query."""
        if self.database.startswith(_URI):
            path = self.database.removeprefix(_URI).partition("?")[0].partition("#")[0]
            return unquote(re.sub(r"^//[^/]*", "", path))
        if not _REMOTE.match(self.database):
            return self.database
        return re.sub(r"//[^/@]*@", "//", self.database.partition("?")[0])

    @property
    def is_replica(self) -> bool:
        """Whether it is a file that follows a primary."""
        return bool(self.options.get("sync_url"))

    @property
    def is_file(self) -> bool:
        """Whether it is a plain local file: not remote, not a replica, not in memory."""
        return self.is_on_disk and not self.is_networked

    @property
    def is_on_disk(self) -> bool:
        """Whether it is a local file, or a replica in one."""
        return not _REMOTE.match(self.database) and not in_memory(self.database)

    @property
    def is_networked(self) -> bool:
        """Whether it is on a server, or a replica of what is there."""
        return bool(_REMOTE.match(self.database)) or self.is_replica

    @property
    def line(self) -> Line:
        """Where to wait for its write lock."""
        return line_of(str(Path(self.name).absolute())) if self.is_file else Line()

    def scrub(self, text: str) -> str:
        """The text without this connection's secrets: an address may hold them, and a server may echo them."""
        text = text.replace(self.database, self.name)
        if isinstance(primary := self.options.get("sync_url"), str) and primary:
            text = text.replace(primary, without_secrets(primary))
        for option in _SECRET_OPTIONS:
            secret = self.options.get(option)
            if isinstance(secret, str) and secret:
                text = text.replace(secret, "***")
        return text

    def require_known(self) -> None:
        """Refuse what the driver would take for the name of a file.

        Raises:
            ProgrammingError: an address of a kind that the driver doesn't know, or a replica that is no file.
        """
        scheme = _SCHEME.match(self.database)
        if scheme and not _REMOTE.match(self.database) and not self.database.startswith(_URI):
            raise ProgrammingError(
                f"there is no support for addresses that begin with {scheme.group()}: a database is a path, or a server"
                " at http://, https:// or libsql://"
            )
        is_path = not _REMOTE.match(self.database) and not self.database.startswith(_URI)
        if self.is_replica and (not is_path or in_memory(self.database)):
            raise ProgrammingError(f"a replica is kept in a file: give its path, not {self.name!r}, beside sync_url")

    def open(self) -> RawConnection:
        """Open it.

        Raises:
            ModuleNotFoundError: the driver isn't installed.
            OperationalError: it can't be opened, or not after the fork that made this process; the text names it and
                the cure.
            ProgrammingError: an option that the driver doesn't know.
        """
        connect = load().connect
        forking.require_openable(self)
        try:
            # None: the driver begins no transactions of its own
            raw = connect(self.database, isolation_level=None, **self.options)
        except TypeError as error:
            raise ProgrammingError(f"{self.name} can't be opened: {self.scrub(str(error))}") from None
        except BaseException as error:  # noqa: BLE001 - the driver's panics are no Exception
            translated = self.translate(error)
            if isinstance(translated, Error):
                raise OperationalError(self._why_not_opened(str(translated))) from None
            raise translated from None
        return cast("RawConnection", raw)

    def keeper(self, raw: RawConnection) -> RawCursor | None:
        """A cursor that has to be let go after the connection, if it is a local one.

        The driver closes a connection twice, the second time in memory that is freed, unless a cursor still refers to
        it when the connection goes; then the cursor closes it, once.
        """
        if _REMOTE.match(self.database):
            return None
        cursor = raw.execute("SELECT 1")
        cursor.fetchall()  # a result that is not read to its end would hold up a commit
        return cursor

    def _why_not_opened(self, message: str) -> str:
        if not self.is_file:
            return f"{self.name} can't be opened: {message}"
        # looking doesn't open: closing any handle on the file would drop the locks of this process on it
        path = Path(self.name)
        directory = path.absolute().parent
        if not directory.is_dir():
            return f"{path} can't be opened: its directory {directory} doesn't exist; create it, or correct the path"
        if path.is_dir():
            return f"{path} can't be opened: it is a directory; give the path of a file in it"
        if not path.exists():
            return (
                f"{path} can't be opened: it doesn't exist and can't be created; check the path, and that this user may"
                f" write to {directory}"
            )
        return f"{path} can't be opened ({message}): check that this user may read the file"

    def translate(self, error: BaseException) -> BaseException:
        """The PEP 249 error for one of the driver's; any other error as it is."""
        if is_panic(error):
            text = self.scrub(str(error))
            if "KeyboardInterrupt" in text:
                return KeyboardInterrupt()
            hint = "; to read text that isn't UTF-8, CAST the column to BLOB" if "Utf8Error" in text else ""
            return DisconnectError(f"the libSQL driver failed, and the connection with it: {text}{hint}")
        if not isinstance(error, ValueError):
            return error
        text = _FROM_PRIMARY.sub(r"\1", self.scrub(str(error)))
        for pattern, error_class, advice in _TRANSLATIONS:
            if pattern.search(text):
                return error_class(f"{text}{advice.format(name=self.name)}")
        return OperationalError(text)

    def call(self, operation: Callable[[], _T]) -> _T:
        """Call the driver, its errors translated."""
        try:
            return operation()
        except BaseException as error:
            translated = self.translate(error)
            if translated is error:
                raise
            raise translated from None


# a replica quotes its primary: two codes, and SQLite's text
_FROM_PRIMARY = re.compile(r"^Remote SQlite failure: `\d+:\d+:(.*)`$", re.DOTALL)
# the driver drops SQLite's code and keeps the text
_TRANSLATIONS: tuple[tuple[re.Pattern[str], type[Error], str], ...] = (
    (re.compile(r"^database (table |schema )?is locked"), BusyError, ""),
    (
        re.compile(
            r"(^|: |\d:)(\w+( \w+)? constraint failed|constraint failed$|cannot store \w+ value in)|datatype mismatch$"
        ),
        IntegrityError,
        "",
    ),
    (
        re.compile(
            r"STREAM_EXPIRED|TRANSACTION_TIMEOUT|^Transaction timed-out|error trying to connect|status=5\d\d"
            r"|^Write delegation: `status: (Unavailable|Unknown|Cancelled)"
        ),
        DisconnectError,
        "",
    ),
    (re.compile(r"^string or blob too big"), DataError, ""),
    (
        re.compile(r"^file is not a database"),
        DatabaseError,
        ": {name} is neither a SQLite nor a libSQL file, or encrypted with another key; check the path and the key",
    ),
    (re.compile(r"^database disk image is malformed|^malformed database schema"), DatabaseError, ": {name}"),
    (
        re.compile(r"^attempt to write a readonly database"),
        OperationalError,
        ": {name} can't be written; let this user write to the file and to its directory",
    ),
    (
        re.compile(r"^unable to open database file"),
        OperationalError,
        ": {name}; check that its directory exists and that this user may write to it",
    ),
    (re.compile(r"^database or disk is full"), OperationalError, ": {name}; make room on its disk"),
    # everything else was checked before
    (re.compile(r"^Unsupported parameter type"), DataError, ": text with a lone surrogate has no UTF-8 form"),
    (re.compile(r"^not an error$"), ProgrammingError, ": the statement is empty"),
)
