"""Copy all timers from one database to another, in the order of their keys, and compare them row by row.

A pass reads a chunk, looks what stands under its keys at the target, and inserts what is missing there, in one
transaction. So a copy that was killed goes on when it is run again: what is there already is compared and passed over.
A second pass compares everything that is to be at the target. Memory holds one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from aion_timers import inventory, statements
from aion_timers.engine import explained
from aion_timers.schema import POSTGRESQL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from aion_timers.inventory import Foreign, Record
    from aion_timers.statements import Name
    from aion_timers.values import TimerId

CHUNK: Final = 2000

OnConflict: TypeAlias = Literal["refuse", "keep", "replace"]
"""What becomes of another timer under the same key at the target: reported, left, or replaced by the copy."""

Key: TypeAlias = "tuple[UUID, TimerId]"
Stored: TypeAlias = tuple[object, ...]


@dataclass(slots=True)
class Report:
    """What a copy did.

    Attributes:
        copied: rows that were inserted, or put in the place of others.
        same: rows that were at the target already.
        kept: rows under whose key the target has another timer, which was left because that was said.
        rounded: rows whose instant, finer than a microsecond, was rounded up for PostgreSQL.
        verified: rows that were found the same on both sides in the end.
        foreign: rows that were not copied, since another program wrote them in a form of its own.
        different: keys under which the target has another timer.
        missing: keys that the target lost, or never got, until the end.
    """

    copied: int = 0
    same: int = 0
    kept: int = 0
    rounded: int = 0
    verified: int = 0
    foreign: list[Foreign] = field(default_factory=list)
    different: list[Key] = field(default_factory=list)
    missing: list[Key] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every timer of the source is at the target as it should be."""
        return not (self.foreign or self.different or self.missing)


class Copying:
    """One copy from a database to another.

    Args:
        source: where the timers are. It is only read.
        target: where they go; migrated, and able to hold other timers.
        on_conflict: what becomes of another timer under the same key.
        progress: called with how many rows a pass has seen since it was called last.
    """

    def __init__(
        self, source: Engine, target: Engine, on_conflict: OnConflict, progress: Callable[[int], object]
    ) -> None:
        self._source = source
        self._target = target
        self._to: Name = statements.dialect_name(target.dialect)
        self._on_conflict = on_conflict
        self.progress = progress
        self.report = Report()

    def copy(self) -> None:
        """The first pass: bring over what is missing."""
        report = self.report
        with self._target.connect() as target, self._source.connect() as source:
            report.foreign += inventory.strange(source)
            source.rollback()
            for page in _pages(source):
                report.foreign += page.foreign
                if page.records:
                    with target.begin():
                        self._bring(target, page.records)
                self.progress(len(page.records) + len(page.foreign))

    def _bring(self, target: Connection, records: list[Record]) -> None:
        report = self.report
        there = self._there(target, records)
        missing, others = [], []
        for record in records:
            found = there.get(_key(record))
            if found is None:
                missing.append(record)
            elif found == self._stored(record):
                report.same += 1
            else:
                others.append(record)
        if self._on_conflict == "replace":
            missing += others
            if others:
                with explained():
                    # not an update, whose trigger on a file restarts the attempts
                    target.execute(statements.delete_keys(self._to), statements.keys(self._to, map(_key, others)))
        elif self._on_conflict == "keep":
            report.kept += len(others)
        else:
            report.different += map(_key, others)
        if missing:
            with explained():
                result = target.execute(statements.insert_whole(self._to), statements.whole_rows(self._to, missing))
            report.copied += result.rowcount
            if self._to == POSTGRESQL:
                report.rounded += sum(not record.timer.stored_instant.endswith("000Z") for record in missing)

    def verify(self) -> None:
        """The second pass: compare every row of the source with the target's."""
        report = self.report
        known = set(report.different)
        with self._target.connect() as target, self._source.connect() as source:
            for page in _pages(source):
                there = self._there(target, page.records)
                target.rollback()
                for record in page.records:
                    found = there.get(key := _key(record))
                    if found is None:
                        report.missing.append(key)
                    elif found == self._stored(record):
                        report.verified += 1
                    elif self._on_conflict != "keep" and key not in known:
                        report.different.append(key)
                self.progress(len(page.records) + len(page.foreign))

    def _there(self, target: Connection, records: list[Record]) -> dict[Key, Stored]:
        if not records:
            return {}
        found, foreign = inventory.of_keys(target, map(_key, records))
        there: dict[Key, Stored] = {_key(record): self._stored(record) for record in found}
        # its key is in canonical form, since it was found by one; what is not stands in the other columns
        foreign_keys = {(row.workflow_id, row.timer_id) for row in foreign}
        if foreign_keys:
            from_texts = {_texts(record): _key(record) for record in records}
            there |= {from_texts[texts]: ("foreign",) for texts in foreign_keys}
        return there

    def _stored(self, record: Record) -> Stored:
        """The row as it is, or would be, stored at the target."""
        timer = record.timer
        instant = timer.fire_at if self._to == POSTGRESQL else timer.stored_instant
        return instant, record.token, record.until, record.attempts


def _key(record: Record) -> Key:
    return record.timer.workflow_id, record.timer.timer_id


def _texts(record: Record) -> tuple[str, str]:
    # as the SQLite family stores its key, which alone can have foreign rows
    ours = statements.key("sqlite", *_key(record))
    return ours["workflow"], ours["timer"]


def _pages(source: Connection) -> Iterator[inventory.Page]:
    after = None
    while True:
        page = inventory.page(source, "key", limit=CHUNK, after=after)
        # a short transaction a page: a long one keeps both kinds of database from tidying up
        source.rollback()
        yield page
        if (after := page.after) is None:
            return
