"""Subscriptions with a free trial: a small application whose timers remind, charge, and try again.

A trial lasts 14 days and is announced to end after 11. Then the subscription is renewed every 30 days, until it is
cancelled or the card is declined four days in a row. ``tests/examples/test_subscription.py`` tests it, months in
milliseconds. The application takes its time from the timers' clock, so that a test can set it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Protocol
from uuid import UUID, uuid4

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aion_timers import Delivery, Dispatcher, TimerRepository

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

DAY = timedelta(days=1)
TRIAL = 14 * DAY
PERIOD = 30 * DAY
ATTEMPTS = 4


class Base(DeclarativeBase):
    """The application's tables."""


class Subscription(Base):
    """A subscription: on trial until it is first paid for."""

    __tablename__ = "subscriptions"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    email: Mapped[str]
    periods_paid: Mapped[int] = mapped_column(default=0)
    ended: Mapped[bool] = mapped_column(default=False)


class Mail(Base):
    """A mail that is to be sent: written in the transaction of what it tells."""

    __tablename__ = "mails"
    number: Mapped[int] = mapped_column(primary_key=True)
    subscription_id: Mapped[UUID] = mapped_column(ForeignKey(Subscription.id))
    subject: Mapped[str]


class CardDeclinedError(Exception):
    """The bank does not pay."""


class Bank(Protocol):
    """Takes payments; one with a key that it has seen is not taken a second time."""

    def charge(self, email: str, key: str) -> None:
        """Take the price of a period, or raise CardDeclinedError."""


class Subscriptions:
    """Starts and cancels subscriptions, and keeps them going.

    Args:
        sessions: makes the sessions.
        bank: takes the payments.
        clock: what time it is, in tests; otherwise the database knows.
    """

    def __init__(
        self, sessions: sessionmaker[Session], bank: Bank, clock: Callable[[], datetime] | None = None
    ) -> None:
        self.sessions = sessions
        self.bank = bank
        self.clock = clock

    def start(self, email: str) -> UUID:
        """Begin a trial."""
        with self.sessions.begin() as session:
            session.add(subscription := Subscription(id=uuid4(), email=email))
            timers = TimerRepository(session, clock=self.clock)
            now = timers.now()
            timers.schedule(subscription.id, "trial-reminder", now + TRIAL - 3 * DAY)
            timers.schedule(subscription.id, "renewal", now + TRIAL)
            return subscription.id

    def cancel(self, subscription_id: UUID) -> None:
        """End it: nothing is sent or charged any more."""
        with self.sessions.begin() as session:
            session.get_one(Subscription, subscription_id).ended = True
            TimerRepository(session, clock=self.clock).cancel_workflow(subscription_id)

    def dispatcher(self) -> Dispatcher:
        """What a worker runs."""
        handlers = {"trial-reminder": self.remind, "renewal": self.renew}
        return Dispatcher(self.sessions, handlers, retry=lambda _, __: DAY, clock=self.clock)

    def remind(self, delivery: Delivery) -> None:
        """Write the mail and settle the timer, both or neither."""
        with delivery.transaction() as session:
            session.add(Mail(subscription_id=delivery.timer.workflow_id, subject="Your trial ends in 3 days"))

    def renew(self, delivery: Delivery) -> None:
        """Take the payment, then enter it and schedule the next one in one transaction."""
        with self.sessions() as session:
            subscription = session.get_one(Subscription, delivery.timer.workflow_id)
        try:
            # slow, so not in the transaction; the key makes a second try after a crash harmless
            self.bank.charge(subscription.email, f"{subscription.id}/{subscription.periods_paid + 1}")
        except CardDeclinedError:
            if delivery.attempt < ATTEMPTS:
                raise
            with delivery.transaction() as session:
                session.get_one(Subscription, subscription.id).ended = True
                session.add(Mail(subscription_id=subscription.id, subject="Your subscription has ended"))
            return
        with delivery.transaction() as session:
            session.get_one(Subscription, subscription.id).periods_paid += 1
            timers = TimerRepository(session, clock=self.clock)
            timers.schedule(subscription.id, "renewal", timers.now() + PERIOD)
