"""Where the shop's Alembic finds its database; what belongs to aion_timers is left out of every comparison."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from alembic import context
from shop import SCHEMA, URL, Base
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from aion_timers import migrate

if TYPE_CHECKING:
    from sqlalchemy import Connection


def configure(**options: Any) -> None:  # noqa: ANN401 - Alembic's own options
    """Set up Alembic for one run."""
    context.configure(
        target_metadata=Base.metadata,
        include_object=migrate.include_object,
        include_schemas=SCHEMA is not None,
        version_table_schema=SCHEMA,
        render_as_batch=True,
        **options,
    )


def run(connection: Connection) -> None:
    """Run the command; of several that start at once, one after the other."""
    with migrate.locked(connection):
        configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()


async def run_async() -> None:
    """The same on an async driver."""
    async with create_async_engine(URL, poolclass=NullPool).connect() as connection:
        await connection.run_sync(run)


if context.is_offline_mode():
    configure(url=URL, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif URL.get_dialect().is_async:
    asyncio.run(run_async())
else:
    with create_engine(URL, poolclass=NullPool).connect() as connection:
        run(connection)
