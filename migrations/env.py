"""Where Alembic finds the database, and what a migration runs in.

On the command line the database is ``-x url=...``, else that of the environment's AION_TIMERS_URL, else the libSQL file
``timers.db`` beside ``alembic.ini``; a command that changes it is one transaction under a lock. `aion_timers.migrate`
hands over a connection that has all this already.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import contextmanager
from logging.config import fileConfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import URL, Connection, MetaData, Table, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import DropTable

from aion_timers import migrate
from aion_timers.engine import explained, schema_of
from aion_timers.errors import TimerStoreError
from aion_timers.schema import metadata, timers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from alembic.runtime.migration import MigrationContext

OPTIONS = {"url", "force"}
READS = {"branches", "check", "current", "heads", "history", "revision", "show"}
SHORTEST_SECRET = 8
EXAMPLES = "for example postgresql+psycopg://user@host/name or sqlite+libsql:////path/to/timers.db"


def command() -> str:
    """The name of Alembic's command, empty if it was called from Python."""
    given = getattr(context.config.cmd_opts, "cmd", None)
    return given[0].__name__ if given else ""


# -- which database ---------------------------------------------------------------------------------------------------


def database() -> URL:
    """The database that the command line, the environment or the place of ``alembic.ini`` names."""
    given = context.get_x_argument(as_dictionary=True)
    if unknown := sorted(given.keys() - OPTIONS):
        raise CommandError(f"there is no option -x {unknown[0]}; there are {' and '.join(sorted(OPTIONS))}")
    if "url" in given:
        return parsed(given["url"], "-x url")
    if text := os.environ.get("AION_TIMERS_URL"):
        return parsed(text, "AION_TIMERS_URL")
    beside = Path(context.config.config_file_name or "alembic.ini").absolute().parent
    return URL.create("sqlite+libsql", database=str(beside / "timers.db"))


def parsed(text: str, origin: str) -> URL:
    """The URL that a text is; the text may hold a secret, so no message shows it."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise CommandError(f"{origin} is not a database URL; give one, {EXAMPLES}") from None
    if url.get_backend_name() not in {"postgresql", "sqlite"}:
        raise CommandError(f"{origin} names the database {url.get_backend_name()!r}; give a supported one, {EXAMPLES}")
    return url


def shown(url: URL) -> str:
    """The URL without password and options, any of which may be a secret."""
    return url.set(query={}).render_as_string(hide_password=True)


@contextmanager
def told_in_one_line(url: URL, also: type[Exception] = SQLAlchemyError) -> Iterator[None]:
    """Turn what can go wrong with a database into the error that Alembic's command line shows without a traceback."""
    try:
        yield
    except TimerStoreError as error:
        raise CommandError(str(error)) from error
    except (SQLAlchemyError, also) as error:
        raise CommandError(f"{shown(url)}: {first_line(error, url)}") from error


def first_line(error: BaseException, url: URL) -> str:
    """What the driver says, without the secrets that it may have been given."""
    text = str(getattr(error, "orig", None) or error).strip().partition("\n")[0] or type(error).__name__
    # an option such as "1" or "true" is no secret, and taking it out would garble the text
    for secret in (url.password, *(value for value in url.query.values() if len(value) >= SHORTEST_SECRET)):
        if secret:
            text = text.replace(str(secret), "***")
    return text


# -- what a migration runs in -----------------------------------------------------------------------------------------


def only_ours(_: Any, name: str | None, kind: str, reflected: bool, compare_to: object) -> bool:  # noqa: ANN401, FBT001 - Alembic's signature
    """Compare `timers`, and leave alone what a host or another program added to it."""
    return name == timers.name if kind == "table" else not (reflected and compare_to is None)


def configure(**options: Any) -> None:  # noqa: ANN401 - Alembic's own options
    """Set up Alembic for one run, online or offline."""
    context.configure(
        target_metadata=metadata,
        version_table=migrate.VERSION_TABLE,
        transactional_ddl=True,
        include_name=lambda name, kind, _: kind != "table" or name == timers.name,
        include_object=only_ours,
        **options,
    )


def run(connection: Connection) -> None:
    """Run the command on a connection that is in a transaction."""
    schema = schema_of(connection)
    configure(connection=connection, version_table_schema=schema)
    migrations = context.get_context()
    if not migrations.purge:
        migrate.require_known(connection)
    if "revision_context" in migrations.opts and command() in {"", "check"}:
        migrate.check(connection)
    context.run_migrations()
    if not migrations.opts.get("dont_mutate") and not migrations.get_current_heads():
        version_table(schema).drop(connection, checkfirst=True)


def version_table(schema: str | None = None) -> Table:
    """The table that Alembic leaves empty at base; the database shall be as it was before."""
    return Table(migrate.VERSION_TABLE, MetaData(), schema=schema)


def write_sql(url: URL) -> None:
    """Write the command as SQL, without a database."""
    reached: list[set[str]] = []

    def applied(ctx: MigrationContext, heads: set[str], **_: Any) -> None:  # noqa: ANN401, ARG001 - Alembic's signature
        reached.append(heads)

    configure(dialect_name=url.get_backend_name(), literal_binds=True, on_version_apply=applied)
    with told_in_one_line(url), context.begin_transaction():
        if url.get_backend_name() == "postgresql":
            for statement in migrate.POSTGRESQL_LOCK:
                context.execute(statement)
        context.run_migrations()
        if reached and not reached[-1]:
            context.execute(DropTable(version_table()))


# -- the command line -------------------------------------------------------------------------------------------------


def run_alone(connection: Connection) -> None:
    """Run the command on a connection of its own; what changes the database, in one transaction under the lock."""
    if command() in READS:
        run(connection)
    else:
        with migrate.locked(connection):
            run(connection)


async def run_async(url: URL) -> None:
    """Run the command through an async driver."""
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - only async drivers need greenlet

    engine = create_async_engine(url, poolclass=NullPool)
    with told_in_one_line(url, Exception), explained():  # asyncpg raises whatever it met
        connection = await engine.connect()
    try:
        await connection.run_sync(run_alone)
    finally:
        await connection.close()


def main() -> None:
    """Run the command line's command on the database that it names."""
    config = context.config
    if config.config_file_name is not None and config.file_config.has_section("loggers"):
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    url = database()
    logging.getLogger("alembic.env").info("Database %s", shown(url))
    if context.is_offline_mode():
        write_sql(url)
        return
    with told_in_one_line(url, ImportError):
        if url.get_dialect().is_async:
            asyncio.run(run_async(url))
        else:
            with explained():
                connection = create_engine(url, poolclass=NullPool).connect()
            with connection:
                run_alone(connection)


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    main()
