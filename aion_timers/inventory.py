"""All timers of a database as they stand, with their leases: to list them page by page, to count and to copy them.

It reads what other programs wrote, too, and says so: a page holds the timers, and apart from them the rows that are in
a form of another program's own.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aion_timers import statements
from aion_timers.engine import explained, require_dependable
from aion_timers.errors import InvalidInputError, shown
from aion_timers.schema import SQLITE
from aion_timers.values import NotCanonicalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

    from aion_timers.statements import By, Name, Row
    from aion_timers.values import TimerEntry, TimerId

_MOST_STRANGE: Final = 10_000


class Record(NamedTuple):
    """A timer with its lease.

    Attributes:
        timer: the timer.
        token: whose claim holds it, or held it last; None if nobody's.
        until: when that lease ends or ended.
        attempts: how often it has been claimed since it was scheduled.
    """

    timer: TimerEntry
    token: UUID | None
    until: datetime | None
    attempts: int


class Foreign(NamedTuple):
    """A row that another program wrote in a form of its own: what is stored, as far as it can be shown."""

    workflow_id: str
    timer_id: str
    fire_at: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page ends, so that the next one begins there."""

    instant: str
    workflow_id: str
    timer_id: str

    def __str__(self) -> str:
        texts = json.dumps([self.instant, self.workflow_id, self.timer_id])
        return base64.urlsafe_b64encode(texts.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place that its text names.

        Raises:
            InvalidInputError: the text is none of a place.
        """
        try:
            parts = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        except ValueError:
            parts = None
        match parts:
            case [str(instant), str(workflow_id), str(timer_id)]:
                return cls(instant, workflow_id, timer_id)
            case _:
                raise InvalidInputError("after", text, "no place in a list", "pass one that a page ended with")


@dataclass(frozen=True, slots=True)
class Criteria:
    """Which timers are listed; all of them by default.

    Attributes:
        workflow_id: those of one workflow.
        names: those of these names; one that ends with ``*`` stands for every name that begins so.
        since: those that are due at this instant or later.
        before: those that are due before this instant.
        until: those that are due at this instant or before.
        held: those that a claim holds now, or those that none does.
    """

    workflow_id: UUID | None = None
    names: Sequence[str] | None = None
    since: datetime | None = None
    before: datetime | None = None
    until: datetime | None = None
    held: bool | None = None


class Page(NamedTuple):
    """A page of timers.

    Attributes:
        records: the timers, in order.
        foreign: the rows among them that another program wrote in a form of its own.
        after: where the next page begins, None if this is the last.
    """

    records: list[Record]
    foreign: list[Foreign]
    after: Place | None


ALL: Final = Criteria()


def page(
    connection: Connection, by: By = "instant", criteria: Criteria = ALL, *, limit: int, after: Place | None = None
) -> Page:
    """One page of timers, in the order of their instants, or of their keys, which is the same on every database.

    On the SQLite family it passes over rows whose key or instant is not even text, which are in `strange`, and in the
    order of instants over those outside the years 1 to 9999.
    """
    require_dependable(connection)
    dialect = statements.dialect_name(connection.dialect)
    its = criteria
    statement = statements.records(
        dialect,
        by,
        paged=after is not None,
        of_workflow=its.workflow_id is not None,
        with_names=its.names is not None,
        since=its.since is not None,
        before=its.before is not None,
        until=its.until is not None,
        held=its.held,
    )
    parameters: dict[str, Any] = {"limit": limit, **statements.span(dialect, its.since, its.before, its.until)}
    if its.workflow_id is not None:
        parameters |= statements.workflow(dialect, its.workflow_id)
    if its.names is not None:
        parameters |= statements.named(dialect, its.names)
    if after is not None:
        given = statements.place(dialect, after.instant, after.workflow_id, after.timer_id)
        parameters |= given if by == "instant" else {name: of for name, of in given.items() if name != "at_instant"}
    with explained():
        rows = connection.execute(statement, parameters).all()
    records, foreign = _decoded(dialect, rows)
    last = Place(*statements.place_of(dialect, rows[-1])) if len(rows) == limit else None
    return Page(records, foreign, last)


def of_keys(connection: Connection, keys: Iterable[tuple[UUID, TimerId]]) -> tuple[list[Record], list[Foreign]]:
    """What stands under these keys: the timers, in no order, and rows in a form of another program's own."""
    dialect = statements.dialect_name(connection.dialect)
    with explained():
        rows = connection.execute(statements.records_of(dialect), statements.keys(dialect, keys)).all()
    return _decoded(dialect, rows)


def strange(connection: Connection) -> list[Foreign]:
    """Rows of the SQLite family that no page holds: their key or their instant is not text."""
    dialect = statements.dialect_name(connection.dialect)
    if dialect != SQLITE:
        return []
    with explained():
        rows = connection.execute(statements.not_text(), {"limit": _MOST_STRANGE}).all()
    return [_foreign(row) for row in rows]


def foreign_rows(connection: Connection, *, chunk: int = 5000) -> Iterator[Foreign]:
    """Every row that another program wrote in a form of its own; all rows are read for it.

    PostgreSQL has none: its constraints refuse them.
    """
    if statements.dialect_name(connection.dialect) != SQLITE:
        return
    yield from strange(connection)
    after = None
    while True:
        found = page(connection, "key", limit=chunk, after=after)
        yield from found.foreign
        if (after := found.after) is None:
            return


def count(connection: Connection) -> int:
    """How many rows there are, in whatever form."""
    with explained():
        return int(connection.execute(statements.count()).scalar_one())


def count_held(connection: Connection) -> int:
    """How many timers a claim holds now."""
    with explained():
        found = connection.execute(statements.held(statements.dialect_name(connection.dialect)))
        return int(found.scalar_one())


class Tally(NamedTuple):
    """How many timers there are up to an instant.

    Attributes:
        due: those that are due and that nobody holds.
        held: those that a claim holds.
        all: all of them, those to come as well.
    """

    due: int
    held: int
    all: int


def tally(connection: Connection, now: datetime, horizon: datetime) -> Tally:
    """Count the timers up to ``horizon``, as of ``now``."""
    statement = statements.tally(statements.dialect_name(connection.dialect))
    with explained():
        return Tally(*connection.execute(statement, statements.tallied(now, horizon)).one())


def _decoded(dialect: Name, rows: Iterable[Row]) -> tuple[list[Record], list[Foreign]]:
    records, foreign = [], []
    for row in rows:
        try:
            records.append(Record(statements.decode(dialect, row), *statements.decode_lease(dialect, row)))
        except NotCanonicalError:
            foreign.append(_foreign(row))
    return records, foreign


def _foreign(row: Row) -> Foreign:
    return Foreign(*(_readable(value) for value in row[:3]))


def _readable(value: object) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def shown_row(row: Foreign) -> str:
    """A foreign row as messages show it."""
    return ", ".join(f"{name} {shown(text)}" for name, text in row._asdict().items())
