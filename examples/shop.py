"""The application of the demo: a shop that reminds its customers to pay, with timers beside its own orders."""

from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import ForeignKey, select
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from aion_timers import TimerEntry, TimerRepository

REMINDER = "payment-reminder"


class Base(MappedAsDataclass, DeclarativeBase):
    """The application's own tables; the timers' table belongs to the library, in a metadata of its own."""


class Order(Base):
    """An order that waits for its payment."""

    __tablename__ = "orders"

    # a default_factory gives the id at once, a default only at the flush: the timer needs it before
    id: Mapped[UUID] = mapped_column(primary_key=True, default_factory=uuid4, init=False)
    customer: Mapped[str]
    paid: Mapped[bool] = mapped_column(default=False)
    reminded: Mapped[bool] = mapped_column(default=False)


class Letter(Base):
    """A reminder that was sent. Nothing keeps an order from having two: the timers do."""

    __tablename__ = "letters"

    number: Mapped[int] = mapped_column(primary_key=True, init=False)
    order_id: Mapped[UUID] = mapped_column(ForeignKey(Order.id))
    reminder: Mapped[str]
    late_ms: Mapped[float]
    attempt: Mapped[int]
    worker: Mapped[int]


def place_order(session: Session, customer: str, remind_at: datetime) -> Order:
    """An order and its reminder: when the caller commits, both are there; else neither."""
    order = Order(customer)
    session.add(order)
    TimerRepository(session).schedule(order.id, REMINDER, remind_at)
    return order


def receive_payment(session: Session, order_id: UUID) -> None:
    """Who has paid is not reminded."""
    session.get_one(Order, order_id).paid = True
    TimerRepository(session).cancel(order_id, REMINDER)


def give_more_time(session: Session, order_id: UUID, remind_at: datetime) -> None:
    """An order has one timer of this name: to schedule it again is to move it."""
    TimerRepository(session).schedule(order_id, REMINDER, remind_at)


def send_reminders(session: Session, limit: int) -> list[TimerEntry]:
    """Take due reminders and mark their orders, in one transaction: a crash neither loses nor repeats one."""
    due = TimerRepository(session).take(limit=limit, names=[REMINDER])
    for order in session.scalars(select(Order).where(Order.id.in_([timer.workflow_id for timer in due]))):
        order.reminded = True
    return due
