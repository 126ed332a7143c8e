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
from aion_timers.libsql.sound import SoundDialect, url_level, url_seconds

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine
    from sqlalchemy.engine.interfaces import ConnectArgsType

try:
    from sqlalchemy_libsql.libsql import SQLiteDialect_libsql
except ImportError as error:
    raise ModuleNotFoundError(MISSING) from error


class LibsqlDialect(SoundDialect, SQLiteDialect_libsql):  # type: ignore[misc] # sqlalchemy_libsql has no types
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
            options["timeout"] = url_seconds("timeout", timeout)
        if level is not None:
            options["isolation_level"] = url_level(level)
        options.pop("secure", None)
        options["synchronous"] = self.synchronous
        return arguments, options

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Have the engine make new connections in forked children, where those of the parent can't be used."""
        _engines.add(engine)

    def on_connect(self) -> None:
        """Nothing: the driver can't have functions written in Python."""


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
