"""What the dialects of files and of servers have in common; and the names under which SQLAlchemy finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import exc
from sqlalchemy.engine.default import DefaultDialect

from aion_timers.libsql import dbapi as libsql_dbapi
from aion_timers.libsql.transaction import Level

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect


class SoundDialect(DefaultDialect):
    """The isolation levels, and which errors are a disconnect."""

    supports_statement_cache = True

    def _get_server_version_info(self, connection: Connection) -> tuple[int, ...]:
        version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
        return tuple(map(int, version.split(".")))

    def get_isolation_level_values(self, dbapi_connection: DBAPIConnection) -> list[Any]:  # noqa: ARG002 - SQLAlchemy's
        """The levels that a connection can be set to."""
        return [level.value for level in Level]

    def get_isolation_level(self, dbapi_connection: DBAPIConnection) -> Any:  # noqa: ANN401 - SQLAlchemy knows no IMMEDIATE
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
        return isinstance(e, _DISCONNECTS)


_DISCONNECTS = (libsql_dbapi.DisconnectError, libsql_dbapi.OutcomeUnknownError, libsql_dbapi.ClosedError)


def url_seconds(name: str, text: str | tuple[str, ...]) -> float:
    """The seconds that a URL gives; else ArgumentError."""
    try:
        return libsql_dbapi.checked_timeout(float(str(text)))
    except (ValueError, libsql_dbapi.ProgrammingError):
        raise exc.ArgumentError(f"the URL's {name} is a number of seconds, 0 or more, not {text!r}") from None


def url_level(name: str | tuple[str, ...]) -> str:
    """The isolation level that a URL gives; else ArgumentError."""
    levels = [level.value for level in Level]
    if name in levels:
        return str(name)
    raise exc.ArgumentError(f"the URL's isolation_level is one of {', '.join(levels)}, not {name!r}")


# -- which of them -----------------------------------------------------------------------------------------------------


class SyncEntry:
    """What ``sqlite+libsql`` stands for: a URL with a host is a server's, one without a host is a file's."""

    @classmethod
    def get_dialect_cls(cls, url: URL) -> type[Dialect]:
        """The sync dialect for a URL. Each of them imports only what it needs."""
        if url.host:
            from aion_timers.libsql.hrana.dialect import ServerDialect  # noqa: PLC0415 - it needs httpx

            return ServerDialect
        from aion_timers.libsql.dialect import LibsqlDialect  # noqa: PLC0415 - it needs the driver

        return LibsqlDialect

    get_async_dialect_cls = get_dialect_cls

    @classmethod
    def load_provisioning(cls) -> None:
        """Do nothing, for SQLAlchemy's own tests."""

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Do nothing: the dialects have hooks of their own."""


class AsyncEntry(SyncEntry):
    """What ``sqlite+aiolibsql`` stands for."""

    @classmethod
    def get_dialect_cls(cls, url: URL) -> type[Dialect]:
        """The async dialect for a URL."""
        if url.host:
            from aion_timers.libsql.hrana.aio import AsyncServerDialect  # noqa: PLC0415 - it needs httpx

            return AsyncServerDialect
        from aion_timers.libsql.aio import AsyncLibsqlDialect  # noqa: PLC0415 - it needs the driver

        return AsyncLibsqlDialect

    get_async_dialect_cls = get_dialect_cls


class EitherEntry(SyncEntry):
    """What ``libsql`` alone stands for: the sync dialect in ``create_engine()``, the async one in the other."""

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type[Dialect]:
        """The async dialect for a URL."""
        return AsyncEntry.get_dialect_cls(url)
