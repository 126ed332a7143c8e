"""The async dialect for a server: the same code, which awaits its round trips in SQLAlchemy's greenlet. No threads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import pool
from sqlalchemy.connectors.asyncio import AsyncAdapt_terminate
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteExecutionContext_aiosqlite
from sqlalchemy.util import greenlet_spawn

from aion_timers.libsql.hrana import dbapi as server_dbapi
from aion_timers.libsql.hrana.dialect import ServerDialect
from aion_timers.libsql.hrana.http import AsyncExchange

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection


class AsyncConnection(AsyncAdapt_terminate, server_dbapi.Connection):
    """A connection that is used in SQLAlchemy's greenlet."""

    async def _terminate_graceful_close(self) -> None:
        await greenlet_spawn(self.close)

    def _terminate_force_close(self) -> None:
        self.abandon()

    def _terminate_handled_exceptions(self) -> tuple[type[BaseException], ...]:
        return (TimeoutError, asyncio.CancelledError, OSError, server_dbapi.Error)


class AsyncDbapi:
    """The PEP 249 module with another ``connect()``."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module has
        return getattr(server_dbapi, name)

    def connect(self, address: str, **options: Any) -> AsyncConnection:  # noqa: ANN401 - those of the sync module
        """Connect, from within SQLAlchemy's greenlet."""
        return server_dbapi.open_connection(AsyncConnection, AsyncExchange, address, **options)


class AsyncServerDialect(ServerDialect):
    """The dialect for ``create_async_engine``."""

    driver = "aiolibsql"
    is_async = True
    has_terminate = True
    supports_server_side_cursors = True
    execution_ctx_cls = SQLiteExecutionContext_aiosqlite
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> AsyncDbapi:
        """The PEP 249 module, adapted."""
        return AsyncDbapi()

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:  # noqa: ARG003 - SQLAlchemy's
        """A queue, as for a file."""
        return pool.AsyncAdaptedQueuePool

    def get_driver_connection(self, connection: DBAPIConnection) -> Any:  # noqa: ANN401 - SQLAlchemy's
        """The connection itself: there is no other beneath it."""
        return connection

    def do_terminate(self, dbapi_connection: DBAPIConnection) -> None:
        """Close a connection that may be broken."""
        dbapi_connection.terminate()
