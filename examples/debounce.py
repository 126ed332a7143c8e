"""Debounce: a document is indexed once nobody has edited it for two seconds, however many edits there were.

Each edit moves the one timer of the document further away. ``if_exists="latest"`` never moves it nearer, so edits that
are committed out of order do no harm. An edit made while the document is being indexed is a new timer: none goes
unnoticed.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aion_timers import Delivery, TimerRepository

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "index"
QUIET = timedelta(seconds=2)


class Base(DeclarativeBase):
    """The application's tables."""


class Document(Base):
    """A document, and what the index knows of it."""

    __tablename__ = "documents"
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    text: Mapped[str]
    indexed: Mapped[str | None]
    times_indexed: Mapped[int] = mapped_column(default=0)


class Documents:
    """Edits and indexes documents.

    Args:
        clock: what time it is, in tests; otherwise the database knows.
    """

    def __init__(self, clock: Callable[[], datetime] | None = None) -> None:
        self.clock = clock

    def edit(self, session: Session, document: Document, text: str) -> None:
        """Change the text, and put off the indexing."""
        document.text = text
        timers = TimerRepository(session, clock=self.clock)
        timers.schedule(document.id, NAME, timers.now() + QUIET, if_exists="latest")

    def index(self, delivery: Delivery) -> None:
        """Enter the text as it is now."""
        with delivery.transaction() as session:
            document = session.get_one(Document, delivery.timer.workflow_id)
            document.indexed = document.text
            document.times_indexed += 1
