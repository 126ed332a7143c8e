"""A shop that makes the table of its timers when it starts; its own tables come from its own Alembic.

``SHOP_URL`` is its database, by default a libSQL file beside this one; ``SHOP_SCHEMA`` is a schema on PostgreSQL.
"""

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import Connection, MetaData, create_engine, make_url, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aion_timers import Timer, TimerRepository, migrate

URL = make_url(os.environ.get("SHOP_URL") or f"sqlite+libsql:///{Path(__file__).parent / 'shop.db'}")
SCHEMA = os.environ.get("SHOP_SCHEMA")


class Base(DeclarativeBase):
    """The shop's own tables, which keep to a naming convention."""

    metadata = MetaData(
        schema=SCHEMA,
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        },
    )


class Order(Base):
    """An order that waits for its payment."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]
    note: Mapped[str | None]


def start(connection: Connection) -> None:
    """Make the table of the timers, or bring it up to date: every process of the shop does so when it starts."""
    migrate.upgrade(connection)
    migrate.check(connection)


def place_order(connection: Connection, customer: str) -> None:
    """An order and its reminder, in one transaction."""
    with Session(connection) as session:
        session.add(order := Order(id=uuid4(), customer=customer))
        TimerRepository(session).schedule(order.id, "payment-reminder", datetime.now(UTC) + timedelta(days=3))
        session.flush()
        for name, timer_id in session.execute(
            select(Order.customer, Timer.timer_id).join(Timer, Timer.workflow_id == Order.id)
        ):
            print(f"{name}: {timer_id.value}")
        session.commit()


def run() -> None:
    """Start the shop on a sync driver."""
    engine = create_engine(URL).execution_options(schema_translate_map={None: SCHEMA})
    with engine.begin() as connection:
        start(connection)
    with engine.begin() as connection:
        place_order(connection, "Ann")


async def run_async() -> None:
    """The same on an async driver."""
    engine = create_async_engine(URL).execution_options(schema_translate_map={None: SCHEMA})
    async with engine.begin() as connection:
        await connection.run_sync(start)
    async with engine.begin() as connection:
        await connection.run_sync(place_order, "Ann")
    await engine.dispose()


if __name__ == "__main__":
    if URL.get_dialect().is_async:
        asyncio.run(run_async())
    else:
        run()
