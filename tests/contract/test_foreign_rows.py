"""Rows that another program wrote into a SQLite file in a form of its own: left alone, and in nobody's way."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from aion_timers import ForeignRowError, InvalidInputError, Timer, TimerEntry
from tests.conftest import DATA
from tests.store import SERVERS, Store

pytestmark = pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite", *SERVERS], indirect=True)

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
ALPHA = UUID("6f9619ff-8b86-d011-b42d-00cf4fc964ff")
OTHER = UUID("00000000-0000-4000-8000-00000000000a")
GOOD = [TimerEntry(OTHER, number, NOW + timedelta(days=number - 2)) for number in range(5)]
LATE = NOW + timedelta(days=1000)

WORKFLOW = "'\"6f9619ff-8b86-d011-b42d-00cf4fc964ff\"'"
TIMER = '\'{"Named":"wake-up"}\''
INSTANT = "'2026-06-03T02:30:00.000000000Z'"


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "aion-decode.jsonl").read_text().splitlines()]


def is_canonical(line: dict[str, Any]) -> bool:
    if line["outcome"] != "read":
        return False
    timer_id = {"Named" if line["kind"] == "named" else "Anonymous": line["value"]}
    texts = (
        f'"{line["workflow_id"]}"',
        json.dumps(timer_id, ensure_ascii=False, separators=(",", ":")),
        line["fire_at"],
    )
    return [f"'{text}'" for text in texts] == line["literals"]


NOT_UTF8 = [
    ["CAST(x'22ff22' AS TEXT)", TIMER, INSTANT],
    [WORKFLOW, "CAST(x'7b224e616d6564223a22ff227d' AS TEXT)", INSTANT],
    [WORKFLOW, TIMER, "CAST(x'323032362d30362d3033ff' AS TEXT)"],
    # a good instant, and more after a NUL
    [WORKFLOW, TIMER, f"CAST(x'{b'2026-06-03T02:30:00.000000000Z'.hex()}006a' AS TEXT)"],
]
FOREIGN = [line["literals"] for line in lines() if not is_canonical(line)] + NOT_UTF8


def insert(store: Store, literals: list[str]) -> None:
    with store.connection() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES ({', '.join(literals)})"
        )


def foreign_row(store: Store) -> list[tuple[Any, ...]]:
    return store.sql(
        "SELECT typeof(workflow_id), hex(workflow_id), typeof(timer_id), hex(timer_id), typeof(fire_at), hex(fire_at)"
        f" FROM timers WHERE workflow_id <> '\"{OTHER}\"'"
    )


def test_foreign_rows_are_passed_over_and_stay(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(FOREIGN) > 30
    for literals in FOREIGN:
        caplog.clear()
        monkeypatch.setattr("aion_timers.repository._reported", set())  # as in a process that has just begun
        store.sql("DELETE FROM timers")
        with store.timers() as timers:
            timers.schedule_many(GOOD)
        insert(store, literals)
        before = foreign_row(store)
        assert len(before) == 1, literals
        with store.timers() as timers:
            assert timers.expired(LATE) == GOOD, literals
            assert timers.expired(LATE, limit=3) == GOOD[:3]
            assert timers.expired(LATE, limit=3, after=GOOD[1]) == GOOD[2:]
            assert timers.next_fire_at() == GOOD[0].fire_at
            assert timers.next_wake() < timedelta(0)
            assert timers.list_workflow(ALPHA) == []
            assert timers.get(ALPHA, "wake-up") is None
            assert timers.cancel(ALPHA, "wake-up") is False
            assert timers.cancel_workflow(ALPHA) == 0
            # it was seen by some of these, at the latest by its key, unless its key is another one
            assert len(caplog.records) <= 1
            assert timers.take(LATE, limit=3) == GOOD[:3]
            claims = timers.claim(LATE, limit=3, lease=timedelta(minutes=1))
            assert [claim.timer for claim in claims] == GOOD[3:]
            assert timers.complete(*claims).done == tuple(claims)
            assert timers.claim(LATE, limit=3, lease=timedelta(minutes=1)) == []
            assert timers.next_wake() is None
        assert foreign_row(store) == before, literals
        instant = (
            store.sql(f"SELECT fire_at FROM timers WHERE workflow_id <> '\"{OTHER}\"'")
            if "CAST" not in literals[2]
            else []
        )
        due = bool(instant) and isinstance(instant[0][0], str) and "0001" <= instant[0][0] <= f"{LATE:%Y-%m-%d}"
        assert len(caplog.records) == 1 or not due, literals


def test_canonical_rows_of_the_other_program_are_ours(store: Store) -> None:
    ours = [line for line in lines() if is_canonical(line)]
    assert ours
    for line in ours:
        store.sql("DELETE FROM timers")
        insert(store, line["literals"])
        with store.timers() as timers:
            (taken,) = timers.take(datetime.max.replace(tzinfo=UTC), limit=10)
        assert (str(taken.workflow_id), taken.timer_id.value) == (line["workflow_id"], line["value"])


def test_many_foreign_rows_do_not_hide_the_good_ones(store: Store) -> None:
    for number in range(40):
        insert(store, [f"'\"bad {number}\"'", TIMER, "'2026-06-01T00:00:00.000000000Z'"])
    with store.timers() as timers:
        timers.schedule_many(GOOD)
        assert timers.expired(LATE, limit=2) == GOOD[:2]
        assert timers.take(LATE, limit=2) == GOOD[:2]
        assert timers.take(LATE, limit=100) == GOOD[2:]
        assert timers.next_fire_at() is None
    assert store.sql("SELECT count(*) FROM timers") == [(40,)]


def test_a_foreign_row_is_logged_once(
    store: Store, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    insert(store, [f"'\"once {request.node.name}\"'", TIMER, INSTANT])
    with caplog.at_level(logging.WARNING, "aion_timers"):
        for _ in range(3):
            with store.timers() as timers:
                timers.expired(LATE)
                timers.take(LATE, limit=10)
    assert [record.name for record in caplog.records] == ["aion_timers.repository"]
    assert "once" in caplog.text


@pytest.mark.parametrize("if_exists", ["replace", "keep", "earliest", "latest"])
@pytest.mark.parametrize(
    "instant",
    [
        "2026-06-03T02:30:00Z",
        "+10000-01-01T00:00:00.000000000Z",
        "2026-02-30T00:00:00.000000000Z",
        "0000-06-03T00:00:00.000000000Z",
    ],
)
def test_a_foreign_instant_under_the_same_key_is_refused_not_moved(store: Store, if_exists: Any, instant: str) -> None:
    insert(store, [WORKFLOW, TIMER, f"'{instant}'"])
    before = foreign_row(store)
    with pytest.raises(ForeignRowError, match="wake-up"), store.timers() as timers:
        timers.schedule(ALPHA, "wake-up", NOW, if_exists=if_exists)
    with store.timers() as timers, pytest.raises(ForeignRowError, match="wake-up"):
        timers.schedule_many([*GOOD, TimerEntry(ALPHA, "wake-up", NOW)], if_exists=if_exists)
    assert foreign_row(store) == before
    assert store.sql("SELECT count(*) FROM timers") == [(1,)]


def test_a_refused_row_undoes_its_own_statement_alone(store: Store) -> None:
    insert(store, [WORKFLOW, TIMER, "'2026-06-03T02:30:00Z'"])
    with store.timers() as timers:
        timers.schedule(OTHER, 1, NOW)
        with pytest.raises(ForeignRowError, match="wake-up"):
            timers.schedule_many([*GOOD, TimerEntry(ALPHA, "wake-up", NOW)])
        timers.schedule(OTHER, 2, NOW)
    with store.timers() as timers:
        assert timers.expired(LATE) == [TimerEntry(OTHER, 1, NOW), TimerEntry(OTHER, 2, NOW)]


def test_a_constraint_of_the_hosts_that_a_timer_breaks_is_told_as_it_is(store: Store) -> None:
    store.sql("CREATE TABLE letters (number INTEGER PRIMARY KEY)")
    store.sql("CREATE TRIGGER write AFTER INSERT ON timers BEGIN INSERT INTO letters VALUES (1); END")
    with store.timers() as timers:
        timers.schedule(OTHER, 1, NOW)
        with pytest.raises(IntegrityError, match=r"letters\.number"):
            timers.schedule(OTHER, 2, NOW)
        with pytest.raises(IntegrityError, match=r"letters\.number"):
            timers.schedule_many(GOOD)
    assert store.sql("SELECT count(*) FROM timers") == [(1,)]


def test_the_model_says_which_row_it_cannot_load(store: Store) -> None:
    insert(store, [WORKFLOW, TIMER, "'2026-06-03T02:30:00Z'"])
    with pytest.raises(ForeignRowError, match="2026-06-03T02:30:00Z"), store.session() as session:
        session.scalars(select(Timer)).all()


def test_an_empty_name_and_a_long_one_are_read_taken_and_cancelled(store: Store) -> None:
    long = "x" * 5000
    for name in ("", long):
        for workflow in (ALPHA, OTHER):
            insert(store, [f"'\"{workflow}\"'", f'\'{{"Named":"{name}"}}\'', INSTANT])
    with store.timers() as timers:
        found = timers.list_workflow(ALPHA)
        assert [entry.timer_id.value for entry in found] == ["", long]
        with pytest.raises(InvalidInputError, match="bytes"):
            timers.schedule(ALPHA, long, NOW)
        assert timers.cancel(ALPHA, found[0].timer_id) is True
        assert timers.cancel(ALPHA, long) is True
        assert [entry.timer_id.value for entry in timers.take(NOW, limit=10)] == ["", long]
    assert store.sql("SELECT count(*) FROM timers") == [(0,)]


def test_nanosecond_neighbours_are_paged_and_moved_by_their_stored_instant(store: Store) -> None:
    for number in range(10):
        insert(store, [WORKFLOW, f"'{{\"Anonymous\":{9 - number}}}'", f"'2026-06-03T02:30:00.00000010{number}Z'"])
    with store.timers() as timers:
        found: list[TimerEntry] = []
        while page := timers.expired(LATE, limit=3, after=found[-1] if found else None):
            found += page
        assert [entry.timer_id.value for entry in found] == list(range(9, -1, -1))
        assert {entry.fire_at.microsecond for entry in found[:1]} == {1}
        exact, *later = (timers.get(ALPHA, number).fire_at.microsecond for number in range(9, -1, -1))
        assert timers.expired(NOW, limit=1) == []
        assert (exact, set(later)) == (1, {1})
        assert timers.schedule(ALPHA, 0, NOW, if_exists="earliest") is True
        assert timers.schedule(ALPHA, 1, NOW + timedelta(microseconds=1), if_exists="latest") is True
        assert timers.schedule(ALPHA, 2, NOW, if_exists="latest") is False
