"""A shop whose tables somebody else makes, before it starts: ``aion-timers migrate``, or a tool that runs SQL.

``AION_TIMERS_URL`` is its database, the same variable that the command line reads. ``python shop.py --create`` makes
the shop's own table, and ``python shop.py`` places an order.
"""

import os
import sys
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import Engine, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aion_timers import MigrationError, Timer, TimerRepository, migrate


class Base(DeclarativeBase):
    """The shop's own tables."""


class Order(Base):
    """An order that waits for its payment."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]


def require_tables(engine: Engine) -> None:
    """Start only if the deployment has done its part: this user of the database need not own the tables."""
    try:
        migrate.check(engine)
    except MigrationError as error:
        sys.exit(f"not deployed: {error}")


def place_order(engine: Engine, customer: str) -> list[str]:
    """An order and its reminder, in one transaction; then whose reminders wait."""
    with Session(engine) as session, session.begin():
        session.add(order := Order(id=uuid4(), customer=customer))
        TimerRepository(session).schedule(order.id, "payment-reminder", datetime.now(UTC) + timedelta(days=3))
        session.flush()
        return list(session.scalars(select(Order.customer).join(Timer, Timer.workflow_id == Order.id)))


if __name__ == "__main__":
    database = create_engine(os.environ.get("AION_TIMERS_URL") or "sqlite+libsql:///shop.db")
    if "--create" in sys.argv[1:]:
        Base.metadata.create_all(database)
    else:
        require_tables(database)
        print("waiting for payment:", *place_order(database, "Ann"))
    database.dispose()
