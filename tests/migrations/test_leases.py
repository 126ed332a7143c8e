"""Revision 2: what a lease is stored in, and what becomes of it when the other program moves a timer that is held."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from alembic import command
from sqlalchemy import Connection, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from aion_timers import ForeignRowError, MigrationError, NotMigratedError, Timer, migrate
from aion_timers.schema import metadata, timers
from tests.migrations.conftest import HEAD, Database, Snapshot, in_process
from tests.migrations.test_adoption import CREATE_INDEX, CREATE_TABLE, SQLITE_BACKENDS, TIMERS, UPSERT
from tests.migrations.test_command_line import run_script
from tests.store import BACKENDS, SERVERS

BEFORE = "aion0001"
OURS = CREATE_TABLE.replace("IF NOT EXISTS ", "") + " WITHOUT ROWID"
TOKEN, OTHER_TOKEN = "11111111-2222-4333-8444-555555555555", "66666666-7777-4888-8999-aaaaaaaaaaaa"
UNTIL = "2026-06-03T02:31:00.000000000Z"
KEYS = [(f'"6f9619ff-8b86-4011-b42d-00cf4fc9{number:04x}"', '{"Named":"wake-up"}') for number in range(40)]
INSTANT, LATER = "2026-06-03T02:30:00.000000000Z", "2027-06-03T02:30:00.000000000Z"
LEASES = "SELECT workflow_id, fire_at, lease_token, lease_until, attempts FROM timers ORDER BY workflow_id"


def add_timers(database: Database, many: int = len(KEYS)) -> list[tuple[Any, ...]]:
    """Store timers by a statement that knows three columns; what is then in them."""

    def add(connection: Connection) -> None:
        rows: list[dict[str, object]] = [
            {"w": workflow_id, "t": timer_id, "f": INSTANT} for workflow_id, timer_id in KEYS[:many]
        ]
        if not database.is_sqlite:
            native = {"f": datetime.fromisoformat(INSTANT)}
            rows = [row | native | {"w": UUID(str(row["w"]).strip('"'))} for row in rows]
        connection.execute(text("INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (:w, :t, :f)"), rows)

    database.run(add)
    return database.sql(TIMERS)


def lease_all(database: Database, token: str = TOKEN, attempts: int = 1) -> None:
    until = UNTIL.replace(":", "\\:")
    database.sql(f"UPDATE timers SET lease_token = '{token}', lease_until = '{until}', attempts = {attempts}")


def unnumbered(snapshot: Snapshot) -> set[tuple[Any, ...]]:
    """A catalog without the numbers that PostgreSQL gives to columns, and never twice."""
    return {row if row[0] != "column" else (row[0], row[1], row[3]) for row in snapshot}


# -- up and down ------------------------------------------------------------------------------------------------------


def test_timers_outlive_the_way_up_and_the_way_down(database: Database) -> None:
    database.run(migrate.upgrade, BEFORE)
    at_first = database.snapshot()
    stored = add_timers(database)
    with pytest.raises(NotMigratedError, match=f"is at revision {BEFORE}, and this version works with {HEAD}"):
        database.run(migrate.check)

    database.run_on_engine(migrate.upgrade)
    database.run(migrate.check)
    at_head = database.snapshot()
    assert database.sql(TIMERS) == stored
    assert {row[2:] for row in database.sql(LEASES)} == {(None, None, 0)}
    lease_all(database)

    database.run_on_engine(migrate.downgrade, BEFORE)
    assert database.run(migrate.current) == BEFORE
    assert database.snapshot() == at_first
    assert database.sql(TIMERS) == stored

    database.run(migrate.upgrade)
    database.run(migrate.check)
    assert unnumbered(database.snapshot()) == unnumbered(at_head)
    assert database.sql(TIMERS) == stored
    assert {row[2:] for row in database.sql(LEASES)} == {(None, None, 0)}
    database.run(migrate.downgrade, BEFORE)
    database.sql("DELETE FROM timers")
    database.run(migrate.downgrade)
    assert database.snapshot() == []


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"])
def test_on_postgresql_the_rows_are_not_written_again(backend: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade, BEFORE)
    add_timers(database)
    where = "SELECT pg_relation_filenode('timers'), pg_relation_filenode('idx_timers_fire_at')"
    before = database.sql(where)
    for work in (migrate.upgrade, migrate.downgrade, migrate.upgrade):
        database.run(work, BEFORE if work is migrate.downgrade else HEAD)
        assert database.sql(where) == before


def test_a_way_down_that_is_refused_keeps_the_leases(database: Database) -> None:
    database.run(migrate.upgrade)
    add_timers(database, 3)
    lease_all(database)
    leases, migrated = database.sql(LEASES), database.snapshot()
    with pytest.raises(MigrationError, match="would drop 3 timers"):
        database.run_on_engine(migrate.downgrade)
    assert database.sql(LEASES) == leases
    assert database.snapshot() == migrated


@pytest.mark.parametrize("backend", SQLITE_BACKENDS)
@pytest.mark.parametrize("table", [CREATE_TABLE, OURS])
def test_what_a_host_has_hung_on_the_table_stays(
    backend: str, table: str, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    on_connect(database, "PRAGMA foreign_keys = ON")
    database.sql(
        table,
        "CREATE INDEX idx_timers_fire_at ON timers (fire_at, workflow_id, timer_id)",
        "CREATE TABLE notes (w TEXT, t TEXT,"
        " FOREIGN KEY (w, t) REFERENCES timers (workflow_id, timer_id) ON DELETE CASCADE ON UPDATE CASCADE)",
        "CREATE VIEW due AS SELECT workflow_id, fire_at FROM timers",
        "CREATE TABLE log (fire_at TEXT)",
        "CREATE TRIGGER logged AFTER UPDATE ON timers BEGIN INSERT INTO log VALUES (NEW.fire_at); END",
        "ALTER TABLE timers ADD COLUMN note TEXT DEFAULT 'of the host'",
    )
    stored = add_timers(database)
    database.sql("INSERT INTO notes SELECT workflow_id, timer_id FROM timers")
    assert database.sql("PRAGMA foreign_keys") == [(1,)]
    before = database.snapshot()

    database.run(migrate.upgrade)
    database.run(migrate.check)
    database.sql("ALTER TABLE timers ADD COLUMN memo TEXT DEFAULT 'of the host, too'")
    database.run(migrate.downgrade, BEFORE)
    assert database.sql(TIMERS) == stored
    counts = "SELECT (SELECT count(*) FROM notes), (SELECT count(*) FROM due), (SELECT count(*) FROM log)"
    assert database.sql(counts) == [(len(stored), len(stored), 0)]
    assert database.sql("SELECT DISTINCT note, memo FROM timers") == [("of the host", "of the host, too")]
    database.sql("ALTER TABLE timers DROP COLUMN memo")
    assert [row for row in database.snapshot() if "aion_timers_version" not in str(row)] == before
    assert database.sql("PRAGMA integrity_check") == [("ok",)]


def on_connect(database: Database, *statements: str) -> None:
    """Have every connection begin with these."""
    engine = database.engine.sync_engine if database.is_async else database.engine

    @event.listens_for(engine, "connect")
    def run(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()


# -- what is there already --------------------------------------------------------------------------------------------


def test_columns_of_the_host_are_not_taken_over(database: Database) -> None:
    database.run(migrate.upgrade, BEFORE)
    database.sql("ALTER TABLE timers ADD COLUMN attempts INTEGER", "ALTER TABLE timers ADD COLUMN lease_until TEXT")
    before = database.snapshot()
    with pytest.raises(MigrationError, match=r"has a column 'lease_until' and a column 'attempts', .*; rename or"):
        database.run_on_engine(migrate.upgrade)
    assert database.snapshot() == before


@pytest.mark.parametrize("backend", SQLITE_BACKENDS)
@pytest.mark.parametrize(
    "trigger",
    [
        "CREATE TRIGGER timers_moved AFTER UPDATE OF fire_at ON timers BEGIN SELECT 1;\nEND",
        "CREATE TRIGGER Timers_Moved AFTER INSERT ON other BEGIN SELECT 1;\nEND",
    ],
)
def test_a_trigger_of_the_host_is_not_taken_over(
    backend: str, trigger: str, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade, BEFORE)
    database.sql("CREATE TABLE other (x)", trigger)
    before = database.snapshot()
    with pytest.raises(MigrationError, match=r"already has a trigger 'timers_moved', which .*; rename or drop"):
        database.run_on_engine(migrate.upgrade)
    assert database.snapshot() == before


@pytest.mark.parametrize("backend", SQLITE_BACKENDS)
@pytest.mark.parametrize("drift", [None, "DROP TRIGGER timers_moved"])
def test_a_table_made_from_the_metadata_is_ours(
    backend: str, drift: str | None, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.run(metadata.create_all)
    if drift:
        database.sql(drift)
    database.run(migrate.upgrade)
    database.run(migrate.check)
    database.run(migrate.downgrade)
    assert database.snapshot() == []


# a libSQL server attaches no files
@pytest.mark.parametrize("backend", [one for one in BACKENDS if one not in SERVERS])
def test_the_metadata_makes_a_table_in_the_schema_that_a_host_translates_to(database: Database, tmp_path: Path) -> None:
    before = database.snapshot()

    def make(connection: Connection) -> None:
        connection.exec_driver_sql(
            f"ATTACH DATABASE '{tmp_path / 'tenant.db'}' AS tenant" if database.is_sqlite else "CREATE SCHEMA tenant"
        )
        tenant = connection.execution_options(schema_translate_map={None: "tenant"})
        metadata.create_all(tenant)
        if database.is_sqlite:
            migrate.upgrade(tenant)
            migrate.check(tenant)

    database.run(make)
    assert database.snapshot() == before


# -- SQL for somebody else to run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["libsql", "sqlite"])
@pytest.mark.parametrize("table", [CREATE_TABLE, OURS])
def test_sql_for_a_file(backend: str, table: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    database.sql(table)
    database.run(migrate.upgrade, BEFORE)
    stored = add_timers(database)
    before = database.snapshot()
    x = [f"url={database.url}"]
    up = in_process(command.upgrade, f"{BEFORE}:{HEAD}", sql=True, x=x)
    down = in_process(command.downgrade, f"{HEAD}:{BEFORE}", sql=True, x=x)
    path = Path(str(database.url.database))

    for _ in range(2):
        run_script(backend, path, up)
        database.run(migrate.check)
        lease_all(database)
        run_script(backend, path, down)
        assert database.run(migrate.current) == BEFORE
        assert database.snapshot() == before
        assert database.sql(TIMERS) == stored


def test_sql_for_postgresql(new_database: Callable[..., Database]) -> None:
    database = new_database("psycopg")
    database.run(migrate.upgrade, BEFORE)
    stored = add_timers(database)
    before = database.snapshot()
    x = [f"url={database.url}"]
    up = in_process(command.upgrade, f"{BEFORE}:{HEAD}", sql=True, x=x)
    down = in_process(command.downgrade, f"{HEAD}:{BEFORE}", sql=True, x=x)
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(2):
            connection.execute(up.encode())
            database.run(migrate.check)
            lease_all(database)
            connection.execute(down.encode())
            assert database.snapshot() == before
            assert database.sql(TIMERS) == stored


# -- the other program moves a timer ----------------------------------------------------------------------------------


@pytest.fixture(params=[CREATE_TABLE, OURS], ids=["adopted", "ours"])
def shared(
    request: pytest.FixtureRequest, new_database: Callable[..., Database], backend: str, recursive_triggers: str
) -> Database:
    """A migrated file whose table either program made, with timers."""
    database = new_database(backend)
    on_connect(database, f"PRAGMA recursive_triggers = {recursive_triggers}")
    database.sql(request.param)
    add_timers(database, 3)
    database.run(migrate.upgrade)
    database.run(migrate.check)
    return database


def move(database: Database, fire_at: str, number: int = 1) -> None:
    workflow_id, timer_id = KEYS[number]
    database.sql(UPSERT, workflow_id=workflow_id, timer_id=timer_id, fire_at=fire_at)


on_each_file = pytest.mark.parametrize(
    ("backend", "recursive_triggers"), [(its, on) for its in ("libsql", "sqlite") for on in ("ON", "OFF")]
)


@on_each_file
def test_a_timer_of_the_same_workflow_stays_held(shared: Database) -> None:
    shared.sql("UPDATE timers SET workflow_id = :w, timer_id = timer_id || workflow_id", w=KEYS[1][0])
    lease_all(shared)
    shared.sql("UPDATE timers SET fire_at = :later WHERE timer_id = (SELECT min(timer_id) FROM timers)", later=LATER)
    assert sorted(row[1:] for row in shared.sql(LEASES) if row[2]) == [(INSTANT, TOKEN, UNTIL, 1)] * 2


@on_each_file
@pytest.mark.parametrize("fire_at", [LATER, INSTANT, "1000-01-01T00:00:00.000000001Z", "not even an instant"])
def test_a_held_timer_that_is_moved_is_held_no_more(shared: Database, fire_at: str) -> None:
    lease_all(shared, attempts=3)
    move(shared, fire_at)
    held = (TOKEN, UNTIL, 3)
    assert [row[1:] for row in shared.sql(LEASES)] == [(INSTANT, *held), (fire_at, None, None, 0), (INSTANT, *held)]
    assert shared.sql(f"DELETE FROM timers WHERE lease_token = '{TOKEN}' RETURNING 1") == [(1,), (1,)]
    assert [row[0] for row in shared.sql(LEASES)] == [KEYS[1][0]]
    assert shared.sql("PRAGMA integrity_check") == [("ok",)]


@on_each_file
def test_a_lease_without_an_attempt_ends_as_well(shared: Database) -> None:
    lease_all(shared, attempts=0)
    move(shared, LATER)
    assert shared.sql(LEASES)[1][1:] == (LATER, None, None, 0)


@on_each_file
def test_many_that_one_statement_moves(shared: Database) -> None:
    lease_all(shared)
    shared.sql("UPDATE timers SET fire_at = :later WHERE workflow_id > :first", later=LATER, first=KEYS[0][0])
    assert [row[1:] for row in shared.sql(LEASES)] == [(INSTANT, TOKEN, UNTIL, 1), *[(LATER, None, None, 0)] * 2]


@on_each_file
def test_a_timer_that_nobody_holds_is_only_moved(shared: Database) -> None:
    lease_all(shared)
    shared.sql(f"UPDATE timers SET lease_token = NULL, attempts = 0 WHERE workflow_id = '{KEYS[1][0]}'")
    # it is no lease, and would be gone if the row had been touched
    assert shared.sql(LEASES)[1][2:] == (None, UNTIL, 0)
    move(shared, LATER)
    assert shared.sql(LEASES)[1][1:] == (LATER, None, UNTIL, 0)


@on_each_file
def test_the_attempts_of_one_that_waits_for_a_retry_begin_anew(shared: Database) -> None:
    shared.sql("UPDATE timers SET attempts = 2")
    move(shared, LATER)
    assert [row[1:] for row in shared.sql(LEASES)] == [
        (INSTANT, None, None, 2),
        (LATER, None, None, 0),
        (INSTANT, None, None, 2),
    ]


@on_each_file
@pytest.mark.parametrize(
    ("statement", "outcome"),
    [
        ("UPDATE timers SET fire_at = :later, lease_token = :other", (LATER, OTHER_TOKEN, UNTIL, 2)),
        (
            "UPDATE timers SET fire_at = :later, lease_token = NULL, lease_until = NULL",
            (LATER, None, None, 2),
        ),
        ("UPDATE timers SET lease_until = :later", (INSTANT, TOKEN, LATER, 2)),
        ("UPDATE timers SET lease_token = :other, attempts = attempts + 1", (INSTANT, OTHER_TOKEN, UNTIL, 3)),
    ],
)
def test_a_statement_of_ours_does_what_it_says(shared: Database, statement: str, outcome: tuple[Any, ...]) -> None:
    lease_all(shared, attempts=2)
    given = {"later": LATER, "other": OTHER_TOKEN}
    shared.sql(statement, **{name: value for name, value in given.items() if f":{name}" in statement})
    assert [row[1:] for row in shared.sql(LEASES)] == [outcome] * 3


@on_each_file
def test_a_claim_of_one_that_nobody_holds_may_move_it(shared: Database) -> None:
    shared.sql("UPDATE timers SET fire_at = :f, lease_token = :t, attempts = 1", f=LATER, t=TOKEN)
    assert {row[1:] for row in shared.sql(LEASES)} == {(LATER, TOKEN, None, 1)}


# -- both programs at once --------------------------------------------------------------------------------------------

OTHER_PROGRAM = """
import sqlite3, sys, time
path, create_table, create_index, upsert = sys.argv[1:]
connection = sqlite3.connect(path, timeout=30, isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute(create_table)
connection.execute(create_index)
print("ready", flush=True)
number = 0
while True:
    timer = {
        "workflow_id": f'"6f9619ff-8b86-4011-b42d-00cf4fc9{number % 997:04x}"',
        "timer_id": '{"Named":"wake-up"}',
        "fire_at": f"2026-06-03T02:30:{number // 997 % 60:02}.{number % 997:09}Z",
    }
    connection.execute(upsert, timer)
    print(timer["workflow_id"], timer["fire_at"], flush=True)
    number += 1
    time.sleep(0.001)  # who writes without a pause starves everybody else
"""


@pytest.mark.parametrize("backend", ["libsql", "sqlite"])
def test_the_other_program_goes_on_while_it_is_migrated(
    backend: str, new_database: Callable[..., Database], tmp_path: Path
) -> None:
    path = tmp_path / "shared.db"
    acknowledged = tmp_path / "acknowledged"
    with acknowledged.open("wb") as output:
        other = subprocess.Popen(
            [sys.executable, "-c", OTHER_PROGRAM, str(path), CREATE_TABLE, CREATE_INDEX, UPSERT],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    claimed: dict[tuple[str, str], str] = {}
    try:
        while not acknowledged.read_bytes().startswith(b"ready"):
            assert other.poll() is None, other.communicate()[1]
            time.sleep(0.01)
        database = new_database(backend, path, connect_args={"timeout": 30})
        for turn in range(12):
            database.run_on_engine(migrate.upgrade)
            database.run(migrate.check)
            for number in range(5):
                token = str(UUID(int=turn * 100 + number))
                claim = (
                    f"UPDATE timers SET lease_token = '{token}', lease_until = '2027', attempts = attempts + 1"
                    " WHERE workflow_id IN (SELECT workflow_id FROM timers WHERE lease_token IS NULL LIMIT 100)"
                    " RETURNING workflow_id, fire_at"
                )
                claimed |= {(token, workflow_id): fire_at for workflow_id, fire_at in database.sql(claim)}
                time.sleep(0.02)
            if turn < 11:
                database.run_on_engine(migrate.downgrade, (BEFORE, "base")[turn % 2])
        assert other.poll() is None, other.communicate()[1]
    finally:
        other.kill()
        other.communicate()

    lines = acknowledged.read_text().splitlines()[1:]
    last = dict(line.split(" ") for line in lines if line.endswith("Z"))
    stored = {workflow_id: fire_at for workflow_id, _, fire_at in database.sql(TIMERS)}
    # one may be stored that was killed before it could be told
    assert sum(stored[workflow_id] != fire_at for workflow_id, fire_at in last.items()) <= 1
    assert len(stored) - len(last) in (0, 1)
    leases = database.sql("SELECT workflow_id, fire_at, lease_token, attempts FROM timers")
    held = [row for row in leases if row[2] is not None]
    assert all(claimed[token, workflow_id] == fire_at for workflow_id, fire_at, token, _ in held)
    assert len(lines) > 100
    assert database.sql("PRAGMA integrity_check") == [("ok",)]
    database.run(migrate.check)


# -- what the columns take, and give ----------------------------------------------------------------------------------


def test_the_model_reads_and_writes_leases(database: Database) -> None:
    database.run(migrate.upgrade)
    values = {
        "workflow_id": UUID(KEYS[0][0].strip('"')),
        "timer_id": "wake-up",
        "fire_at": datetime.fromisoformat(INSTANT),
        "lease_token": UUID(TOKEN.upper()),
        "lease_until": datetime.fromisoformat(UNTIL),
        "attempts": 3,
    }

    def work(connection: Connection) -> None:
        connection.execute(insert(timers), [values])
        with Session(connection) as session:
            session.add(Timer(workflow_id=UUID(int=1), timer_id=2, fire_at=values["fire_at"]))
            session.commit()
            new, held = session.scalars(select(Timer).order_by(Timer.workflow_id)).all()
            assert (new.lease_token, new.lease_until, new.attempts) == (None, None, 0)
            assert (held.lease_token, held.lease_until, held.attempts) == (
                UUID(TOKEN),
                datetime(2026, 6, 3, 2, 31, tzinfo=UTC),
                3,
            )
            assert session.scalar(select(Timer.attempts).where(Timer.lease_token == UUID(TOKEN))) == 3
            held.lease_token = held.lease_until = None
            session.commit()
            assert session.scalars(select(Timer.lease_token)).all() == [None, None]

    database.run(work)
    if database.is_sqlite:
        database.run(lambda connection: connection.execute(insert(timers), [values | {"timer_id": "other"}]))
        stored = database.sql("SELECT lease_token, lease_until, attempts FROM timers WHERE lease_token IS NOT NULL")
        assert stored == [(TOKEN, UNTIL, 3)]


@pytest.mark.parametrize("backend", SQLITE_BACKENDS)
@pytest.mark.parametrize(
    ("column", "stored", "problem"),
    [
        ("lease_token", f"'{OTHER_TOKEN.upper()}'", "its lease token is not in canonical form"),
        ("lease_token", "'held'", "its lease token is no UUID"),
        ("lease_token", "x'ff'", "its lease token is no UUID"),
        ("lease_token", "CAST(x'ff' AS TEXT)", "its lease token is no UUID"),
        ("lease_until", "''", "its instant is not in canonical form"),
        ("lease_until", "x''", "its instant is not in canonical form"),
    ],
)
def test_a_lease_that_we_did_not_write(
    backend: str, column: str, stored: str, problem: str, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade)
    add_timers(database, 1)
    database.sql(f"UPDATE timers SET {column} = {stored}")

    def read(connection: Connection) -> None:
        with Session(connection) as session, pytest.raises(ForeignRowError, match=problem):
            session.scalars(select(Timer)).all()

    database.run(read)


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"])
@pytest.mark.parametrize(
    ("values", "constraint"),
    [
        (f"lease_token = '{TOKEN}'", "ck_timers_lease"),
        (f"lease_until = '{UNTIL}'", "ck_timers_lease"),
        (f"lease_token = '{TOKEN}', lease_until = 'infinity'", "ck_timers_lease_until"),
        (f"lease_token = '{TOKEN}', lease_until = '-infinity'", "ck_timers_lease_until"),
        (f"lease_token = '{TOKEN}', lease_until = '10000-01-01 00:00:00+00'", "ck_timers_lease_until"),
        (f"lease_token = '{TOKEN}', lease_until = '0001-12-31 00:00:00+00 BC'", "ck_timers_lease_until"),
        ("attempts = -1", "ck_timers_attempts"),
        ("attempts = NULL", "attempts"),
    ],
)
def test_nonsense_is_kept_out_of_postgresql(
    backend: str, values: str, constraint: str, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade)
    add_timers(database, 1)
    with pytest.raises(IntegrityError, match=rf'"{constraint}"'):
        database.sql("UPDATE timers SET " + values.replace(":", "\\:"))


def test_the_edges_of_a_lease_are_taken(database: Database) -> None:
    database.run(migrate.upgrade)
    add_timers(database, 1)
    # asyncpg writes the very first and the very last datetime as infinite
    inside = timedelta(microseconds=database.backend == "asyncpg")
    edges = datetime.min.replace(tzinfo=UTC) + inside, datetime.max.replace(tzinfo=UTC) - inside

    def hold(connection: Connection, *values: Any) -> None:
        columns = [timers.c.lease_token, timers.c.lease_until, timers.c.attempts]
        connection.execute(timers.update().values(dict(zip(columns, values, strict=True))))
        assert connection.execute(select(*columns)).one() == values

    for edge in edges:
        database.run(hold, UUID(int=0), edge, 2**31 - 1)
