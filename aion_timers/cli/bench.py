"""A quick benchmark of a database, in a schema or a file of its own that is removed in the end."""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateSchema, DropSchema

from aion_timers import migrate
from aion_timers.cli.database import CONFIG, CommandError, Database
from aion_timers.dispatcher import Dispatcher
from aion_timers.repository import TimerRepository
from aion_timers.values import TimerEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

_SINGLE = 200
_HANDLERS = 4


class Figure(NamedTuple):
    """How fast one thing went."""

    what: str
    number: int
    seconds: float

    @property
    def rate(self) -> float:
        """How many a second."""
        return self.number / max(self.seconds, 1e-9)


def bench(database: Database, number: int) -> Iterator[Figure]:
    """Schedule, read and fire so many timers in a place apart; each figure as it is known.

    Raises:
        CommandError: not every timer was fired once.
    """
    with _apart(database) as engine:
        migrate.upgrade(engine)
        due = datetime.now(UTC) - timedelta(hours=1)
        entries = [TimerEntry(UUID(int=at), "bench", due + timedelta(milliseconds=at)) for at in range(number)]

        began = time.perf_counter()
        with Session(engine) as session, session.begin():
            TimerRepository(session).schedule_many(entries)
        yield Figure("scheduled by schedule_many, one transaction", number, time.perf_counter() - began)

        began = time.perf_counter()
        with Session(engine) as session:
            found = len(TimerRepository(session).expired(limit=number))
        yield Figure("read by expired()", found, time.perf_counter() - began)

        fired: list[UUID] = []
        dispatcher = Dispatcher(
            engine, lambda delivery: fired.append(delivery.timer.workflow_id), concurrency=_HANDLERS
        )
        began = time.perf_counter()
        handled = dispatcher.run_due()
        yield Figure(
            f"fired by one dispatcher with {_HANDLERS} handlers that do nothing", handled, time.perf_counter() - began
        )
        if sorted(fired) != [entry.workflow_id for entry in entries]:
            raise CommandError(f"{len(set(fired)):,} of {number:,} timers were fired; run `aion-timers doctor`", CONFIG)

        began = time.perf_counter()
        for at in range(_SINGLE):
            with Session(engine) as session, session.begin():
                TimerRepository(session).schedule(UUID(int=at), "single", due + timedelta(days=9))
        yield Figure("scheduled one by one, a commit each", _SINGLE, time.perf_counter() - began)


@contextmanager
def _apart(database: Database) -> Iterator[Engine]:
    name = f"aion_timers_bench_{secrets.token_hex(4)}"
    pool = {"poolclass": None, "pool_size": _HANDLERS + 2}
    if not database.is_sqlite:
        place = Database(database.url.render_as_string(hide_password=False), name)
        engine = place.engine(**pool)
        try:
            with engine.begin() as connection:
                connection.execute(CreateSchema(name))
            try:
                yield engine
            finally:
                with engine.begin() as connection:
                    connection.execute(DropSchema(name, cascade=True))
        finally:
            engine.dispose()
        return
    path = database.path
    if path is None:
        raise CommandError(f"{database}: only a file can be measured; name one by its path", CONFIG)
    # beside the database, so that it is the same disk
    scratch = path.with_name(f"{path.name}.{name}")
    place = Database(database.url.set(database=str(scratch)).render_as_string(hide_password=False), new=True)
    engine = place.engine(**pool)
    try:
        yield engine
    finally:
        engine.dispose()
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{scratch}{suffix}").unlink(missing_ok=True)
