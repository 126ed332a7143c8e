"""A saga: a trip whose flight and hotel are each to be confirmed in time, or the whole trip is called off.

Every deadline is a timer of the trip. When one has passed, `cancel_workflow` ends the others in the transaction that
calls the trip off. A confirmation and a deadline that meet wait for each other at the row of the trip, and the second
one finds it decided.

Every transaction locks the trip first and its timers after it, so no two of them wait for each other. That is why the
handler does not use `delivery.transaction()`, which locks the timer first: it cancels its own timer with the others, in
the transaction that decides, and a second run would find the trip decided.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aion_timers import Delivery, TimerRepository

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINES = {"flight": timedelta(minutes=15), "hotel": timedelta(hours=2)}


class Base(DeclarativeBase):
    """The application's tables."""


class Trip(Base):
    """A trip: pending, booked or called off."""

    __tablename__ = "trips"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    state: Mapped[str] = mapped_column(default="pending")
    flight_confirmed: Mapped[bool] = mapped_column(default=False)
    hotel_confirmed: Mapped[bool] = mapped_column(default=False)
    refunds: Mapped[int] = mapped_column(default=0)


class Trips:
    """Books trips.

    Args:
        sessions: makes the sessions. A libSQL file knows no SELECT FOR UPDATE: there they are those of an engine at
            isolation level IMMEDIATE, where a transaction that reads has the lock as well.
        clock: what time it is, in tests; otherwise the database knows.
    """

    def __init__(self, sessions: sessionmaker[Session], clock: Callable[[], datetime] | None = None) -> None:
        self.sessions = sessions
        self.clock = clock

    def begin(self) -> UUID:
        """Ask for everything at once, each with its own deadline."""
        with self.sessions.begin() as session:
            session.add(trip := Trip(id=uuid4()))
            timers = TimerRepository(session, clock=self.clock)
            for part, allowed in DEADLINES.items():
                timers.schedule(trip.id, f"deadline-{part}", timers.now() + allowed)
            return trip.id

    def confirm(self, trip_id: UUID, part: str) -> str:
        """Enter a confirmation; the state of the trip, which may have been called off before."""
        with self.sessions.begin() as session:
            trip = session.get_one(Trip, trip_id, with_for_update=True)
            if trip.state == "pending":
                setattr(trip, f"{part}_confirmed", True)
                TimerRepository(session, clock=self.clock).cancel(trip_id, f"deadline-{part}")
                if trip.flight_confirmed and trip.hotel_confirmed:
                    trip.state = "booked"
            return trip.state

    def call_off(self, delivery: Delivery) -> None:
        """A deadline has passed: undo what was confirmed, and forget all deadlines."""
        with self.sessions.begin() as session:
            trip = session.get_one(Trip, delivery.timer.workflow_id, with_for_update=True)
            if trip.state == "pending":
                trip.state = "called off"
                trip.refunds = trip.flight_confirmed + trip.hotel_confirmed
                TimerRepository(session, clock=self.clock).cancel_workflow(trip.id)
