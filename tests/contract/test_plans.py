"""The index is part of the contract: hot statements read no more rows than they return."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, event

from aion_timers import Claim, TimerEntry, TimerRepository, prepare_sqlite
from tests.conftest import Databases
from tests.store import Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
DUE = TimerEntry(ALPHA, 1, NOW)
LEASE = timedelta(seconds=30)

# one backend of each planner: the others send the same statements
pytestmark = [
    pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg"], indirect=True),
    pytest.mark.usefixtures("statistics"),
]

CALLS: dict[str, Any] = {
    "expired": lambda t: t.expired(NOW, limit=10),
    "expired now": lambda t: t.expired(limit=10),
    "expired, next page": lambda t: t.expired(NOW + timedelta(days=9), limit=10, after=DUE),
    "take": lambda t: t.take(NOW, limit=10),
    "take now": lambda t: t.take(limit=10),
    "take of names": lambda t: t.take(NOW, limit=10, names=["a", "b*"]),
    "next_fire_at": lambda t: t.next_fire_at(),
    "next_wake": lambda t: t.next_wake(),
    "next_wake of names": lambda t: t.next_wake(["a", "b*"]),
    "claim": lambda t: t.claim(NOW, limit=10, lease=LEASE),
    "claim now": lambda t: t.claim(limit=10, lease=LEASE),
    "claim of names": lambda t: t.claim(NOW, limit=10, lease=LEASE, names=["a", "b*"]),
}
CLAIM = Claim(DUE, UUID(int=1), 1)
KEYED: dict[str, Any] = {
    "confirm": lambda t: t.confirm(t.claim(limit=1, lease=LEASE)[0]),
    "complete": lambda t: t.complete(CLAIM, Claim(TimerEntry(ALPHA, 2, NOW), UUID(int=2), 1)),
    "release": lambda t: t.release(CLAIM),
    "extend": lambda t: t.extend(CLAIM, lease=LEASE),
    "schedule": lambda t: t.schedule(ALPHA, 1, NOW),
    "get": lambda t: t.get(ALPHA, 1),
    "list_workflow": lambda t: t.list_workflow(ALPHA),
    "cancel": lambda t: t.cancel(ALPHA, 1),
    "cancel_workflow": lambda t: t.cancel_workflow(ALPHA),
}


@contextmanager
def executed(store: Store) -> Iterator[list[tuple[str, Any]]]:
    """The statements that reach the driver."""
    seen: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        seen.append((statement, parameters))

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(store.engine, "before_cursor_execute", note)


def plans(store: Store, call: Any) -> list[str]:
    """The plans of what a call executes, as text."""
    with executed(store) as seen, store.timers() as timers:
        call(timers)
    with store.connection() as connection:
        if not store.is_sqlite:
            # what the server uses once the driver has prepared the statement, which knows no values
            connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
        found = []
        for statement, parameters in seen:
            if statement == "BEGIN" or statement.endswith("WHERE 0 = 1"):
                continue  # they take the lock of the file and read nothing
            prefix = "EXPLAIN QUERY PLAN " if store.is_sqlite else "EXPLAIN (FORMAT JSON) "
            rows = connection.exec_driver_sql(prefix + statement, parameters).all()
            found.append("\n".join(row[-1] if store.is_sqlite else json.dumps(row[0]) for row in rows))
    return found


@pytest.fixture(scope="module", params=["with statistics", "without statistics"])
def statistics(request: pytest.FixtureRequest) -> bool:
    """Whether the planner knows the table."""
    return str(request.param) == "with statistics"


@pytest.fixture(scope="module")
def postgres_template(postgres_template: str, databases: Databases, statistics: bool) -> Iterator[str]:
    """A database with many future timers, to be copied."""
    url = databases.create(template=postgres_template)
    fill(create_engine(url.set(drivername="postgresql+psycopg")), "VACUUM ANALYZE" if statistics else None)
    yield str(url.database)
    databases.drop(url)


@pytest.fixture(scope="module")
def libsql_template(libsql_template: Path, tmp_path_factory: pytest.TempPathFactory, statistics: bool) -> Path:
    """A file with many future timers, to be copied."""
    path = Path(shutil.copy(libsql_template, tmp_path_factory.mktemp("filled")))
    fill(create_engine(f"sqlite+libsql:///{path}"), "ANALYZE" if statistics else None)
    return path


@pytest.fixture(scope="module")
def sqlite_template(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory, statistics: bool) -> Path:
    """The same, made by sqlite3."""
    path = Path(shutil.copy(sqlite_template, tmp_path_factory.mktemp("filled")))
    engine = create_engine(f"sqlite:///{path}")
    prepare_sqlite(engine)
    fill(engine, "ANALYZE" if statistics else None)
    return path


def fill(engine: Engine, analyze: str | None) -> None:
    with engine.begin() as connection:
        timers = TimerRepository(connection)
        timers.schedule_many(
            TimerEntry(UUID(int=number), number % 7, NOW + timedelta(hours=1 + number)) for number in range(20_000)
        )
        timers.schedule(ALPHA, 1, NOW)
    if analyze is not None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(analyze)
    engine.dispose()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_is_due_is_found_by_the_index_and_not_sorted(store: Store, call: Any) -> None:
    found = plans(store, call)
    assert "idx_timers_fire_at" in found[0]
    for plan in found:
        assert "Seq Scan" not in plan
        assert "SCAN timers" not in plan or "USING COVERING INDEX idx_timers_fire_at" in plan
        assert "TEMP B-TREE FOR ORDER BY" not in plan
        assert '"Sort"' not in plan


@pytest.mark.parametrize("call", KEYED.values(), ids=KEYED.keys())
def test_what_has_a_key_is_found_by_it(store: Store, call: Any) -> None:
    for plan in plans(store, call):
        assert "Seq Scan" not in plan
        assert "SCAN timers" not in plan
