"""Prepares engines as the suite wants them: every connection has a second file, ``test_schema``."""

import sqlalchemy.dialects.sqlite.provision  # noqa: F401 - what it registers is extended here
from sqlalchemy import URL, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.testing import provision

import aion_timers.libsql

aion_timers.libsql.register()

_configure_for_sqlite = provision.post_configure_testing_engine.fns["sqlite"]


@provision.post_configure_testing_engine.for_db("sqlite")
def configure(url: URL, engine: Engine | AsyncEngine, options: dict[str, object], scope: str) -> None:
    """Attach the file to the engines that a test makes for itself, as SQLAlchemy does to the main one."""
    _configure_for_sqlite(url, engine, options, scope)
    if scope == "global":
        return
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine

    @event.listens_for(sync, "connect")
    def attach(connection: object, _record: object) -> None:
        connection.execute(f'ATTACH "{sync.driver}_test_schema.db" AS test_schema')  # type: ignore[attr-defined] # every driver of SQLite has it
