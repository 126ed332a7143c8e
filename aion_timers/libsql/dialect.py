"""The sync dialect, ``sqlite+libsql``. SQLAlchemy imports it when the first engine is made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote
from weakref import WeakSet

from sqlalchemy import exc, pool

from aion_timers.libsql import dbapi as libsql_dbapi
from aion_timers.libsql.driver import MISSING, in_memory
from aion_timers.libsql.transaction import Level

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, Engine
    from sqlalchemy.engine.interfaces import ConnectArgsType, DBAPIConnection

try:
    from sqlalchemy_libsql.libsql import SQLiteDialect_libsql
except ImportError as error:
    raise ModuleNotFoundError(MISSING) from error


class LibsqlDialect(SQLiteDialect_libsql):  # type: ignore[misc] # sqlalchemy_libsql has no types
    """libSQL through this package's PEP 249 module.

    Args:
        synchronous: ``FULL`` keeps every commit through a power cut; ``NORMAL`` is faster, and a power cut may take
            back the last commits.
        options: those of SQLAlchemy's SQLite dialect.
    """

    supports_statement_cache = True

    def __init__(self, synchronous: str = "FULL", **options: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
        try:
            self.synchronous = libsql_dbapi.checked_synchronous(synchronous)
        except libsql_dbapi.ProgrammingError as error:
            raise exc.ArgumentError(str(error)) from None
        super().__init__(**options)

    @classmethod
    def import_dbapi(cls) -> Any:  # noqa: ANN401 - a module, or the async adapter of one
        """The PEP 249 module."""
        return libsql_dbapi

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        """A queue for files; one connection for a database in memory, which no other connection could reach."""
        return pool_class(url, pool.QueuePool)

    def create_connect_args(self, url: URL) -> ConnectArgsType:
        """The arguments of ``connect()`` for a URL.

        Raises:
            ArgumentError: a timeout that is no number, or an option that would be ignored.
        """
        # SQLAlchemy drops the level and reports a wrong timeout as a bare ValueError
        timeout, level = url.query.get("timeout"), url.query.get("isolation_level")
        url = url.difference_update_query(["timeout", "isolation_level"])
        arguments, options = super().create_connect_args(url)
        if not url.host and not options.get("uri"):
            ignored = sorted(url.query.keys() - _OPTIONS)
            if ignored:
                raise exc.ArgumentError(
                    f"the URL's option {ignored[0]!r} would be ignored: SQLite reads options only from a URI, as in"
                    " sqlite+libsql:///file:/path/to/file.db?mode=ro&uri=true; those of the driver go into connect_args"
                )
        if not url.host and options.get("uri") and not str(url.database).startswith("file:"):
            raise exc.ArgumentError(
                f"uri=true is for a database that is written as a URI, as in file:/path/to/file.db, not {url.database}"
            )
        arguments = [_absolute(arguments[0])]
        if timeout is not None:
            options["timeout"] = _seconds(timeout)
        if level is not None:
            options["isolation_level"] = _level(level)
        options.pop("secure", None)
        options["synchronous"] = self.synchronous
        return arguments, options

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Have the engine make new connections in forked children, where those of the parent can't be used."""
        _engines.add(engine)

    def on_connect(self) -> None:
        """Nothing: the driver can't have functions written in Python."""

    def _get_server_version_info(self, connection: Connection) -> tuple[int, ...]:
        version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
        return tuple(map(int, version.split(".")))

    def get_isolation_level_values(self, dbapi_connection: DBAPIConnection) -> list[str]:  # noqa: ARG002
        """The levels that a connection can be set to."""
        return [level.value for level in Level]

    def get_isolation_level(self, dbapi_connection: DBAPIConnection) -> str:
        """The level of a connection."""
        level: str = dbapi_connection.isolation_level
        return level

    # at the first connect: the engine's isolation_level, where it has one, is set by then and is the default
    get_default_isolation_level = get_isolation_level

    def set_isolation_level(self, dbapi_connection: DBAPIConnection, level: str) -> None:
        """Set the level of a connection."""
        dbapi_connection.isolation_level = level

    def detect_autocommit_setting(self, dbapi_conn: DBAPIConnection) -> bool:
        """Whether a connection is at level AUTOCOMMIT."""
        autocommit: bool = dbapi_conn.isolation_level == Level.AUTOCOMMIT.value
        return autocommit

    def do_ping(self, dbapi_connection: DBAPIConnection) -> bool:
        """See whether a connection works, without beginning anything."""
        dbapi_connection.ping()
        return True

    def is_disconnect(self, e: Exception, connection: object, cursor: object) -> bool:  # noqa: ARG002
        """Whether the connection can't be used any more."""
        return isinstance(e, libsql_dbapi.DisconnectError | libsql_dbapi.ClosedError)


_engines: WeakSet[Engine] = WeakSet()


def _renew_pools() -> None:
    for engine in list(_engines):
        # what is in memory was copied, and is nowhere else
        if not isinstance(engine.pool, pool.StaticPool | pool.SingletonThreadPool):
            engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    # after the connections have been closed: the hook of that was registered before
    os.register_at_fork(after_in_child=_renew_pools)


_OPTIONS = frozenset(("cached_statements", "check_same_thread", "detect_types", "uri"))
_RELATIVE_URI = re.compile(r"file:(?P<path>[^/?#][^?#]*)")


def pool_class(url: URL, queue: type[pool.Pool]) -> type[pool.Pool]:
    """A single connection for a database that only one connection can reach, else the queue."""
    database = url.database or ""
    if database.startswith("file:"):
        database += "?" + "&".join(f"{name}={value}" for name, value in url.query.items())
    is_shared = url.query.get("cache") == "shared" or url.query.get("vfs") == "memdb"
    return pool.StaticPool if in_memory(database) and not is_shared and not url.host else queue


def _absolute(address: str) -> str:
    """A URI with the whole path, as SQLAlchemy makes it for paths: the directory may change before a connect."""
    relative = _RELATIVE_URI.match(address)
    if relative is None or in_memory(address):
        return address
    return f"file:{quote(str(Path(unquote(relative['path'])).absolute()))}{address[relative.end() :]}"


def _seconds(text: str | tuple[str, ...]) -> float:
    try:
        return libsql_dbapi.checked_timeout(float(str(text)))
    except (ValueError, libsql_dbapi.ProgrammingError):
        raise exc.ArgumentError(f"the URL's timeout is a number of seconds, 0 or more, not {text!r}") from None


def _level(name: str | tuple[str, ...]) -> str:
    levels = [level.value for level in Level]
    if name in levels:
        return str(name)
    raise exc.ArgumentError(f"the URL's isolation_level is one of {', '.join(levels)}, not {name!r}")
