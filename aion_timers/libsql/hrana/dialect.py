"""The sync dialect for a server. SQLAlchemy imports it when the first engine is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import exc, pool
from sqlalchemy.dialects.sqlite.base import SQLiteDialect

from aion_timers.libsql.hrana import dbapi as server_dbapi
from aion_timers.libsql.hrana.address import is_loopback
from aion_timers.libsql.sound import SoundDialect, url_level, url_seconds
from aion_timers.libsql.transaction import Level

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, Engine
    from sqlalchemy.engine.interfaces import ConnectArgsType

_TIMES: Final = ("timeout", "connect_timeout", "read_timeout", "request_timeout")
_QUERY_TOKEN: Final = "authToken"  # noqa: S105 - the name of an option
_TLS: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class ServerDialect(SoundDialect, SQLiteDialect):
    """libSQL on a server, over HTTP."""

    driver = "libsql"
    default_paramstyle = "qmark"
    returns_native_bytes = True
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> Any:  # noqa: ANN401 - a module, or the async form of one
        """The PEP 249 module."""
        return server_dbapi

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:  # noqa: ARG003 - SQLAlchemy's
        """A queue, as for a file."""
        return pool.QueuePool

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Move a token from the URL's query to its password, which no text shows."""
        url = engine.url
        if token := url.query.get(_QUERY_TOKEN):
            engine.url = url.difference_update_query([_QUERY_TOKEN]).set(
                username=url.username or "", password=str(token)
            )

    def create_connect_args(self, url: URL) -> ConnectArgsType:
        """The arguments of ``connect()`` for a URL.

        Raises:
            ArgumentError: an option that is unknown or wrong, or a token that would be sent in the clear.
        """
        query = dict(url.query)
        options: dict[str, Any] = {name: url_seconds(name, query.pop(name)) for name in _TIMES if name in query}
        if "isolation_level" in query:
            options["isolation_level"] = url_level(query.pop("isolation_level"))
        token = query.pop(_QUERY_TOKEN, None) or url.password
        if token:
            options["auth_token"] = str(token)
        said = [query.pop(name) for name in ("secure", "tls") if name in query]
        if query:
            raise exc.ArgumentError(
                f"the URL of a server has no option {min(query)!r}: there are {', '.join(_TIMES)}, isolation_level,"
                f" secure and {_QUERY_TOKEN}"
            )
        secure = _tls(said[0]) if said else url.drivername.partition("+")[0] == "libsql"
        if token and not said and not secure and not is_loopback(str(url.host)):
            raise exc.ArgumentError(
                f"the token would be sent to {url.host} in the clear: add ?secure=true for https, or ?secure=false if"
                " that is meant"
            )
        return [_address(url, secure=secure)], options

    def _get_server_version_info(self, connection: Connection) -> tuple[int, ...]:
        # not in a transaction, whose end would have the HTTP connection when the application's first one wants it
        own: Any = connection.connection.dbapi_connection
        if own.in_transaction:  # a listener of the host's has begun one
            return super()._get_server_version_info(connection)
        level, own.isolation_level = own.isolation_level, Level.AUTOCOMMIT.value
        try:
            return super()._get_server_version_info(connection)
        finally:
            own.isolation_level = level

    def _get_default_schema_name(self, connection: Any) -> str:  # noqa: ANN401, ARG002 - SQLAlchemy's
        return "main"


def _tls(text: str | tuple[str, ...]) -> bool:
    try:
        return _TLS[str(text).lower()]
    except KeyError:
        raise exc.ArgumentError(f"the URL's secure is true or false, not {text!r}") from None


def _address(url: URL, *, secure: bool) -> str:
    host = f"[{url.host}]" if ":" in str(url.host) else url.host
    port = f":{url.port}" if url.port else ""
    path = f"/{url.database}" if url.database else ""
    return f"{'https' if secure else 'http'}://{host}{port}{path}"
