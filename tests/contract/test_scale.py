"""What a dispatcher asks again and again costs what it finds, whatever else the table holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from tests.contract.test_plans import plans
from tests.store import Store

LEASE = timedelta(seconds=30)
LIMIT = 100
DUE = 6 * LIMIT  # as much as all calls together claim
LOOKED_AT = 8 + 64 + 512
"""How many of the first timers `next_wake` looks at, at most, in three steps."""

SERIES = {
    True: "(WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) SELECT i FROM n)",
    False: "(SELECT i FROM generate_series(1, {count}) AS i)",
}
KEY = {
    True: "'\"00000000-0000-4000-{kind}-' || printf('%012x', i) || '\"'",
    False: "CAST('00000000-0000-4000-{kind}-' || lpad(to_hex(i), 12, '0') AS uuid)",
}
HOLDER = {
    True: "'00000000-0000-4000-8000-000000000001'",
    False: "CAST('00000000-0000-4000-8000-000000000001' AS uuid)",
}
LATER = {
    True: "strftime('%Y-%m-%dT%H\\:%M\\:%f', 'now', '{seconds} seconds', '+' || i || ' seconds') || '000000Z'",
    False: "now() + interval '{seconds} seconds' + i * interval '1 second'",
}
# every third one has a name that no call asks for
NAME = 'CASE i % 3 WHEN 0 THEN \'{{"Named"\\:"a"}}\' WHEN 1 THEN \'{{"Named"\\:"b1"}}\' ELSE \'{{"Named"\\:"c"}}\' END'


@dataclass
class Size:
    """How many timers are not due, and how many are in flight."""

    future: int
    held: int


SMALL = Size(2_000, 1_000)
SIZES = {
    "large": pytest.param(Size(50_000, 1_000), id="large"),
    "huge": pytest.param(Size(1_000_000, 10_000), id="huge", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
}


def insert(store: Store, kind: str, count: int, seconds: int, *, held: bool = False) -> None:
    """Timers a second apart, from so many seconds from now on."""
    lite = store.is_sqlite
    columns, lease = "workflow_id, timer_id, fire_at", ""
    if held:
        columns += ", lease_token, lease_until, attempts"
        lease = f", {HOLDER[lite]}, {LATER[lite].format(seconds=3600)}, 1"
    values = f"{KEY[lite].format(kind=kind)}, {NAME.format()}, {LATER[lite].format(seconds=seconds)}{lease}"
    store.sql(f"INSERT INTO timers ({columns}) SELECT {values} FROM {SERIES[lite].format(count=count)} AS series")


def fill(store: Store, size: Size) -> None:
    """First those in flight, then those that are due, then the future."""
    insert(store, "a001", size.held, -size.held - 100_000, held=True)
    insert(store, "a002", DUE, -10_000)
    insert(store, "a003", size.future, 100_000)


def finish(store: Store, *, statistics: bool) -> None:
    """Let the planner know what there is, or nothing of it."""
    if statistics:
        with store.connection(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE" if store.is_sqlite else "VACUUM ANALYZE timers")


def settle(timers: Any) -> None:
    """Complete claims of which one is lost, so that it has to be looked for."""
    claims = timers.claim(limit=LIMIT, lease=LEASE)
    first = claims[0].timer
    timers.cancel(first.workflow_id, first.timer_id)
    assert timers.complete(*claims).lost == (claims[0],)


CALLS: dict[str, tuple[Callable[[Any], Any], Callable[[Size], int]]] = {
    # each with how many rows it may read: those that it passes over, and those that it changes some times more
    "claim": (lambda t: t.claim(limit=LIMIT, lease=LEASE), lambda size: size.held + 3 * LIMIT),
    "claim of names": (
        lambda t: t.claim(limit=LIMIT, lease=LEASE, names=["a", "b*"]),
        lambda size: size.held + DUE + LIMIT,
    ),
    "take": (lambda t: t.take(limit=LIMIT), lambda size: size.held + 3 * LIMIT),
    "next_wake": (lambda t: t.next_wake(), lambda _: LOOKED_AT),
    "claim and complete": (settle, lambda size: size.held + 6 * LIMIT),
}
every_call = pytest.mark.parametrize(("call", "most"), CALLS.values(), ids=CALLS.keys())


@pytest.fixture(params=[True, False], ids=["with statistics", "without statistics"])
def statistics(request: pytest.FixtureRequest) -> bool:
    """Whether the planner has statistics."""
    return bool(request.param)


@pytest.mark.parametrize("backend", ["psycopg"], indirect=True)
@pytest.mark.parametrize("size", SIZES.values())
def test_no_more_rows_are_read_than_are_found_or_in_flight(store: Store, size: Size, statistics: bool) -> None:
    # which would gather statistics at some moment
    store.sql("ALTER TABLE timers SET (autovacuum_enabled = off)")
    fill(store, size)
    finish(store, statistics=statistics)
    # of this session since it last told the server, which may be longer than the transaction
    read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'timers'"
    # as a statement is planned while it is new, and once the server has prepared it, when it knows no values
    for mode in ("force_custom_plan", "force_generic_plan"):
        for name, (call, most) in CALLS.items():
            with store.connection() as connection:
                connection.exec_driver_sql(f"SET LOCAL plan_cache_mode = {mode}")
                before = connection.exec_driver_sql(read).one()
                call(store.repository(connection))
                scanned, fetched = (
                    now - then for now, then in zip(connection.exec_driver_sql(read).one(), before, strict=True)
                )
                connection.rollback()
            assert scanned == 0, (mode, name)
            assert 0 < fetched <= most(size), (mode, name)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize("size", SIZES.values())
def test_timers_that_are_not_due_cost_no_steps(store: Store, size: Size, statistics: bool) -> None:
    def steps(call: Callable[[Any], Any]) -> int:
        taken = 0

        def step() -> int:
            nonlocal taken
            taken += 1
            return 0

        with store.connection() as connection:
            driver = connection.connection.driver_connection
            driver.set_progress_handler(step, 1)
            try:
                call(store.repository(connection))
            finally:
                driver.set_progress_handler(None, 0)
            connection.rollback()
        return taken

    fill(store, Size(SMALL.future, size.held))
    finish(store, statistics=statistics)
    before = {name: steps(call) for name, (call, _) in CALLS.items()}
    store.sql("DELETE FROM timers")
    fill(store, size)
    finish(store, statistics=statistics)
    for name, (call, _) in CALLS.items():
        # a row that is passed over takes some ten steps
        assert steps(call) < 1.1 * before[name] + 1000, name


@pytest.mark.parametrize("backend", ["libsql", "sqlite"], indirect=True)
@pytest.mark.parametrize("size", SIZES.values())
def test_a_large_file_is_searched_by_its_index(store: Store, size: Size, statistics: bool) -> None:
    fill(store, size)
    finish(store, statistics=statistics)
    for name, (call, _) in CALLS.items():
        for plan in plans(store, call):
            assert "SCAN timers" not in plan or "USING INDEX idx_timers_fire_at" in plan, (name, plan)
            assert "TEMP B-TREE FOR ORDER BY" not in plan, (name, plan)
