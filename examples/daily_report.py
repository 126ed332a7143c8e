"""A recurring timer in calendar time: a report at nine in the morning, wherever its reader lives.

The handler schedules the next one in the transaction that writes the report, so there is always exactly one timer. Days
are counted on the reader's wall clock: when the clocks change, a day has 23 or 25 hours, and nine stays nine.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aion_timers import Delivery, TimerRepository

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "daily-report"
AT = time(9)


class Base(DeclarativeBase):
    """The application's tables."""


class Reader(Base):
    """Somebody who wants a report each day."""

    __tablename__ = "readers"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    zone: Mapped[str]


class Report(Base):
    """A report, for a day of the reader's calendar."""

    __tablename__ = "reports"
    reader_id: Mapped[UUID] = mapped_column(ForeignKey(Reader.id), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    written_at: Mapped[str]


def at_nine(day: date, zone: ZoneInfo) -> datetime:
    """Nine o'clock of that day in that zone; in UTC, since two aware datetimes of one zone are compared by the wall."""
    return datetime.combine(day, AT, zone).astimezone(UTC)


class DailyReports:
    """Writes reports.

    Args:
        clock: what time it is, in tests; otherwise the database knows.
    """

    def __init__(self, clock: Callable[[], datetime] | None = None) -> None:
        self.clock = clock

    def subscribe(self, session: Session, reader: Reader) -> None:
        """Schedule the first report."""
        timers = TimerRepository(session, clock=self.clock)
        zone = ZoneInfo(reader.zone)
        today = timers.now().astimezone(zone).date()
        first = at_nine(today, zone)
        timers.schedule(reader.id, NAME, first if first > timers.now() else at_nine(today + timedelta(days=1), zone))

    def write(self, delivery: Delivery) -> None:
        """Write the report, and schedule the next one.

        After an outage of days one report is written, and the next one is tomorrow's.
        """
        with delivery.transaction() as session:
            timers = TimerRepository(session, clock=self.clock)
            reader = session.get_one(Reader, delivery.timer.workflow_id)
            now = timers.now().astimezone(ZoneInfo(reader.zone))
            session.add(Report(reader_id=reader.id, day=now.date(), written_at=now.isoformat(timespec="minutes")))
            timers.schedule(reader.id, NAME, at_nine(now.date() + timedelta(days=1), ZoneInfo(reader.zone)))
