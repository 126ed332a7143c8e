"""A shop whose Alembic runs the migrations of aion_timers among its own.

``SHOP_URL`` is its database, by default a libSQL file beside this one; ``SHOP_SCHEMA`` is a schema on PostgreSQL. Run
``alembic upgrade heads`` before it starts.
"""

import asyncio
import os
from datetime import datetime
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import MetaData, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, foreign, mapped_column, relationship, selectinload

from aion_timers import AsyncTimerRepository, Timer, migrate

URL = make_url(os.environ.get("SHOP_URL") or f"sqlite+aiolibsql:///{Path(__file__).parent / 'shop.db'}")
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
    pay_until: Mapped[datetime | None]

    timers: Mapped[list[Timer]] = relationship(
        Timer,
        primaryjoin=lambda: foreign(Timer.workflow_id) == Order.id,
        order_by=Timer.fire_at,
        viewonly=True,
    )


async def main() -> None:
    """Place an order with its reminder, and show all orders with their timers."""
    engine = create_async_engine(URL).execution_options(schema_translate_map={None: SCHEMA})
    async with engine.connect() as connection:
        await connection.run_sync(migrate.check)
    async with AsyncSession(engine) as session, session.begin():
        timers = AsyncTimerRepository(session)
        session.add(order := Order(id=uuid4(), customer="Ann"))
        await timers.schedule(order.id, "payment-reminder", await timers.now())
    async with AsyncSession(engine) as session:
        orders = await session.scalars(
            select(Order).options(selectinload(Order.timers)).order_by(func.lower(Order.customer))
        )
        for order in orders:
            print(f"{order.customer}: {', '.join(str(timer.timer_id.value) for timer in order.timers)}")
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
