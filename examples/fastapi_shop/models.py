"""The application's tables."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REMINDER = "payment-reminder"
AGAIN = timedelta(days=7)


class Base(DeclarativeBase):
    """The application's tables."""


class Order(Base):
    """An order that waits for its payment."""

    __tablename__ = "orders"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    customer: Mapped[str]
    paid: Mapped[bool] = mapped_column(default=False)
    reminders: Mapped[int] = mapped_column(default=0)
