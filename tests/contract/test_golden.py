"""Files that Aion's crate wrote: read to the nanosecond rounded up, and written with the same bytes."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL

from aion_timers import TimerEntry, migrate
from tests.conftest import DATA, open_engine
from tests.dispatching import Dispatchers
from tests.store import Store

pytestmark = pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime.max.replace(tzinfo=UTC)
UPSERT = (
    "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (?, ?, ?)"
    " ON CONFLICT(workflow_id, timer_id) DO UPDATE SET fire_at = excluded.fire_at"
)
EXPIRED = "SELECT workflow_id, timer_id, fire_at FROM timers WHERE fire_at <= ? ORDER BY fire_at, workflow_id, timer_id"


def manifest(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


Facts = tuple[datetime, UUID, str | int]


def facts(entries: list[TimerEntry]) -> list[Facts]:
    return [(entry.fire_at, entry.workflow_id, entry.timer_id.value) for entry in entries]


def meaning(line: dict[str, Any]) -> Facts | None:
    """The timer of a line, its instant rounded up to the microsecond; None if that is no datetime."""
    seconds, nanoseconds = line["unix_seconds"], line["nanosecond"]
    if nanoseconds >= 10**9:
        return None
    try:
        instant = EPOCH + timedelta(seconds=seconds)
        instant += timedelta(microseconds=min(-(-nanoseconds // 1000), 999_999 if instant.year == 9999 else 10**6))
    except OverflowError:
        return None
    return instant, UUID(line["workflow_id"]), line["value"]


@pytest.fixture
def adopted(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store on a migrated copy of a file of the crate, named by the parameter of the test."""
    path = tmp_path / "aion.db"
    shutil.copy(DATA / request.param, path)
    url = URL.create("sqlite" if backend == "sqlite" else f"sqlite+{backend}", database=str(path))
    with asyncio.Runner() as runner:
        store = Store(backend, open_engine(url), runner)
        with store.connection() as connection:
            if store.is_async:
                connection.run_sync(migrate.upgrade)
            else:
                migrate.upgrade(connection)
        yield store
        store.close()


@pytest.mark.parametrize("adopted", ["aion-0.1.0.db"], indirect=True)
def test_every_row_is_read_as_its_manifest_says(adopted: Store) -> None:
    lines = manifest("aion-0.1.0.jsonl")
    expected = [entry for line in lines if (entry := meaning(line)) is not None]
    assert len(expected) >= 119  # one may be in year 0, which is no datetime
    with adopted.timers() as timers:
        assert facts(timers.expired(LATEST)) == expected
        for instant, workflow_id, value in expected:
            assert timers.get(workflow_id, value).fire_at == instant
        pages: list[TimerEntry] = []
        while page := timers.expired(LATEST, limit=1, after=pages[-1] if pages else None):
            pages += page
        assert facts(pages) == expected  # among them neighbours that differ by a nanosecond
        assert facts(timers.take(LATEST, limit=1000)) == expected


@pytest.mark.parametrize("adopted", ["aion-0.1.0-beyond.db"], indirect=True)
def test_rows_beyond_every_datetime_are_left_alone(adopted: Store) -> None:
    lines = manifest("aion-0.1.0-beyond.jsonl")
    ours = [entry for line in lines if (entry := meaning(line)) is not None and len(line["stored"][2]) == 30]
    before = adopted.sql("SELECT count(*) FROM timers")
    assert before == [(len(lines),)]
    with adopted.timers() as timers:
        assert facts(timers.expired(LATEST)) == ours
        assert facts(timers.take(LATEST, limit=100)) == ours
    assert adopted.sql("SELECT count(*) FROM timers") == [(len(lines) - len(ours),)]


def test_what_we_write_has_the_bytes_that_the_crate_writes(store: Store) -> None:
    written = 0
    with store.connection() as connection:
        timers = store.repository(connection)
        for line in manifest("aion-0.1.0.jsonl"):
            if (found := meaning(line)) is None:
                continue
            fire_at, workflow, value = found
            if len(line["stored"][1].encode()) > 1024:  # read, but not written
                continue
            timers.schedule(workflow, value, fire_at)
            one = connection.exec_driver_sql("SELECT workflow_id, timer_id, fire_at FROM timers").all()
            timers.cancel_workflow(workflow)
            timers.schedule_many([TimerEntry(workflow, value, fire_at)])
            many = connection.exec_driver_sql("SELECT workflow_id, timer_id, fire_at FROM timers").all()
            timers.cancel_workflow(workflow)
            assert one == many
            ((workflow_id, timer_id, instant),) = one
            assert [workflow_id, timer_id] == line["stored"][:2]
            if line["nanosecond"] % 1000 == 0:
                assert instant == line["stored"][2]
            written += 1
    assert written > 100


@pytest.mark.parametrize("adopted", ["aion-0.1.0.db", "aion-0.1.0-empty.db"], indirect=True)
def test_the_crates_own_statements_and_ours_serve_one_file(adopted: Store) -> None:
    alpha = UUID("00000000-0000-4000-8000-00000000000a")
    now = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
    with adopted.timers() as timers:
        timers.take(LATEST, limit=1000)
        timers.schedule(alpha, "ours", now)
        assert timers.adopted() is True
    stored = [f'"{alpha}"', '{"Named":"theirs"}', "2026-06-03T02:30:00.000000001Z"]
    with adopted.connection() as connection:
        connection.exec_driver_sql("CREATE INDEX IF NOT EXISTS idx_timers_fire_at ON timers (fire_at)")
        connection.exec_driver_sql(UPSERT, tuple(stored))
        connection.exec_driver_sql(UPSERT, (stored[0], '{"Named":"ours"}', "2026-06-03T02:29:59.999999999Z"))
        rows = connection.exec_driver_sql(EXPIRED, ("2027-01-01T00:00:00.000000000Z",)).all()
        assert [row[1] for row in rows if row[0] == stored[0]] == ['{"Named":"ours"}', '{"Named":"theirs"}']
    with adopted.timers() as timers:
        assert timers.list_workflow(alpha) == [
            TimerEntry(alpha, "ours", now),
            TimerEntry(alpha, "theirs", now + timedelta(microseconds=1)),
        ]
        assert timers.schedule(alpha, "theirs", now, if_exists="earliest") is True
        assert timers.cancel_workflow(alpha) == 2
    assert adopted.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("adopted", ["aion-0.1.0.db"], indirect=True)
def test_the_crate_finds_all_that_we_have_not_fired(adopted: Store, backend: str) -> None:
    lines = {(line["workflow_id"], line["value"]): tuple(line["stored"]) for line in manifest("aion-0.1.0.jsonl")}
    with adopted.timers() as timers:
        claims = timers.claim(LATEST, limit=40, lease=timedelta(hours=1))
    # while we hold some, and when they were given back, the crate reads what it wrote
    assert len(claims) == 40
    assert every_row(adopted) == set(lines.values())
    with adopted.timers() as timers:
        assert timers.release(*claims[3:]).done == tuple(claims[3:])
    assert every_row(adopted) == set(lines.values())
    with adopted.timers() as timers:
        assert timers.complete(*claims[:3]).done == tuple(claims[:3])
    fired: list[TimerEntry] = []
    handlers = {f"{letter}*": lambda delivery: fired.append(delivery.timer) for letter in "abcdefghijklmnopqrstuvwxyz"}
    Dispatchers(backend, adopted.sync_engine.url).run_due(handlers)
    assert fired
    gone = {(str(entry.workflow_id), entry.timer_id.value) for entry in [*fired, *(one.timer for one in claims[:3])]}
    assert every_row(adopted) == {stored for key, stored in lines.items() if key not in gone}
    assert adopted.sql("PRAGMA integrity_check") == [("ok",)]


def every_row(store: Store) -> set[tuple[str, ...]]:
    """The rows as the crate's own query gives them."""
    with store.connection() as connection:
        return {tuple(row) for row in connection.exec_driver_sql(EXPIRED, ("9999-12-31T23:59:59.999999999Z",))}
