"""A file that Aion's crate made: adopted, served to both programs, and given back as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aion_timers import MigrationError, NotMigratedError, migrate
from tests.conftest import DATA
from tests.migrations.conftest import Database

SQLITE_BACKENDS = ["libsql", "aiolibsql", "sqlite", "aiosqlite"]
FILES = ["aion-0.1.0", "aion-0.1.0-empty", "aion-0.1.0-beyond"]
OTHER_TABLES = ["events", "visibility"]
TIMERS = "SELECT workflow_id, timer_id, fire_at FROM timers ORDER BY fire_at, workflow_id, timer_id"

# what the crate says to the file, as it says it
CREATE_TABLE = """CREATE TABLE IF NOT EXISTS timers (
    workflow_id TEXT NOT NULL,
    timer_id TEXT NOT NULL,
    fire_at TEXT NOT NULL,
    PRIMARY KEY (workflow_id, timer_id)
)"""
CREATE_INDEX = "CREATE INDEX IF NOT EXISTS idx_timers_fire_at\nON timers (fire_at)"
UPSERT = (
    "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (:workflow_id, :timer_id, :fire_at)"
    " ON CONFLICT(workflow_id, timer_id) DO UPDATE SET fire_at = excluded.fire_at"
)
DUE = (
    "SELECT workflow_id, timer_id, fire_at FROM timers WHERE fire_at <= :as_of ORDER BY fire_at, workflow_id, timer_id"
)


@pytest.fixture
def open_file(new_database: Callable[..., Database], tmp_path: Path) -> Callable[[str, str], Database]:
    """Opens a copy of a file that the crate wrote."""

    def open_copy(backend: str, name: str) -> Database:
        return new_database(backend, Path(shutil.copyfile(DATA / f"{name}.db", tmp_path / "aion.db")))

    return open_copy


def rows_of_others(database: Database) -> list[Any]:
    return [database.sql(f"SELECT * FROM {table} ORDER BY 1, 2") for table in OTHER_TABLES]


@pytest.mark.parametrize("backend", SQLITE_BACKENDS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_adopted_and_given_back(backend: str, name: str, open_file: Callable[[str, str], Database]) -> None:
    database = open_file(backend, name)
    if name == "aion-0.1.0":
        database.sql("INSERT INTO visibility VALUES ('w', 'r', 't', 's', '1', NULL, '{}')")
        database.sql("INSERT INTO events VALUES ('w', 1, x'00ff', '1', 'k', 0, NULL, NULL)")
    before, timers, others = database.snapshot(), database.sql(TIMERS), rows_of_others(database)
    manifest = DATA / f"{name}.jsonl"
    if manifest.exists():
        assert [list(row) for row in timers] == [
            json.loads(line)["stored"] for line in manifest.read_bytes().splitlines()
        ]

    database.run_on_engine(migrate.upgrade)
    database.run(migrate.check)
    assert database.sql(TIMERS) == timers
    assert rows_of_others(database) == others
    adopted = database.snapshot()
    changed = {row[1] for row in set(before) ^ set(adopted)}
    assert changed == {
        "timers",
        "timers_moved",
        "idx_timers_fire_at",
        "aion_timers_version",
        "sqlite_autoindex_aion_timers_version_1",
    }

    database.run_on_engine(migrate.downgrade)
    assert database.snapshot() == before
    assert database.sql(TIMERS) == timers
    assert rows_of_others(database) == others
    with pytest.raises(NotMigratedError):
        database.run(migrate.check)

    database.run(migrate.upgrade)
    assert database.snapshot() == adopted
    database.run(migrate.downgrade, force=True)
    assert database.snapshot() == before
    assert database.sql(TIMERS) == timers
    assert database.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("backend", SQLITE_BACKENDS)
@pytest.mark.parametrize("name", ["aion-0.1.0", None])
def test_a_migrated_file_serves_the_statements_of_the_crate(
    backend: str,
    name: str | None,
    open_file: Callable[[str, str], Database],
    new_database: Callable[..., Database],
) -> None:
    database = open_file(backend, name) if name else new_database(backend)
    database.run(migrate.upgrade)
    catalog, timers = database.snapshot(), database.sql(TIMERS)

    database.sql(CREATE_TABLE, CREATE_INDEX)
    assert database.snapshot() == catalog
    timer = {"workflow_id": '"6f9619ff-8b86-4011-b42d-00cf4fc900ff"', "timer_id": '{"Named":"wake-up"}'}
    early, late = "1000-06-03T02:30:00.000000001Z", "2026-06-03T02:30:00.000000002Z"
    database.sql(UPSERT, **timer, fire_at=late)
    assert len(database.sql(TIMERS)) == len(timers) + 1
    database.sql(UPSERT, **timer, fire_at=early)
    assert len(database.sql(TIMERS)) == len(timers) + 1
    due = database.sql(DUE, as_of="1000-06-03T02:30:00.000000002Z")
    assert (*timer.values(), early) in due
    assert due == [row for row in database.sql(TIMERS) if row[2] <= "1000-06-03T02:30:00.000000002Z"]
    (plan,) = database.sql("EXPLAIN QUERY PLAN " + DUE, as_of=early)
    assert "COVERING INDEX idx_timers_fire_at (fire_at<?)" in plan[3]
    assert database.sql("PRAGMA integrity_check") == [("ok",)]
    database.run(migrate.check)


KEY = "PRIMARY KEY (workflow_id, timer_id)"
TEXTS = "workflow_id TEXT NOT NULL, timer_id TEXT NOT NULL, fire_at TEXT NOT NULL"


@pytest.mark.parametrize(
    "ddl",
    [
        f"CREATE TABLE timers ({TEXTS}, {KEY})",
        f"create table timers (workflow_id text not null, timer_id text not null, fire_at text not null, {KEY})",
        f"CREATE TABLE timers (fire_at TEXT NOT NULL, timer_id TEXT NOT NULL, workflow_id TEXT NOT NULL, {KEY}) STRICT",
        f"CREATE TABLE timers ({TEXTS}, note TEXT, tries INTEGER NOT NULL DEFAULT 0, {KEY})",
        f"CREATE TABLE timers ({TEXTS}, note TEXT NOT NULL AS (fire_at) STORED, {KEY})",
        f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE INDEX note ON timers (fire_at) WHERE timer_id > 'a'",
        CREATE_TABLE,
        f'CREATE TABLE "timers"({TEXTS}\t, -- the key, next\n /* of both */ {KEY}\n-- no more\n)',
        f"CREATE TABLE [timers] ({TEXTS}, note TEXT DEFAULT ',)''é', {KEY}, CHECK (note <> '('), UNIQUE (note))",
        f"CREATE TABLE timers ({TEXTS} -- ü, last\n, UNIQUE (fire_at,timer_id), CONSTRAINT k\n{KEY})",
    ],
)
def test_tables_of_the_same_shape_are_adopted(ddl: str, new_database: Callable[..., Database]) -> None:
    database = new_database("libsql")
    database.sql(*ddl.split("; "))
    database.add_timer()
    before = database.snapshot()
    database.run(migrate.upgrade)
    database.run(migrate.check)
    database.run(migrate.downgrade)
    after = [row for row in database.snapshot() if row[1] != "idx_timers_fire_at"]
    assert after == before
    assert database.sql("SELECT count(*) FROM timers") == [(1,)]


def test_a_table_of_ours_without_a_version_is_ours(new_database: Callable[..., Database]) -> None:
    database = new_database("libsql")
    database.sql(f"CREATE TABLE timers ({TEXTS}, {KEY}) WITHOUT ROWID")
    database.run(migrate.upgrade)
    database.run(migrate.check)
    database.run(migrate.downgrade)
    assert database.snapshot() == []


STRANGERS = [
    ("CREATE TABLE timers (id INTEGER PRIMARY KEY)", "has no column 'fire_at'.*has no column 'workflow_id'"),
    (f"CREATE TABLE timers ({TEXTS.replace('fire_at', 'due_at')}, {KEY})", "no column 'fire_at'.*'due_at' is NOT NULL"),
    (f"CREATE TABLE timers ({TEXTS}, note TEXT NOT NULL, {KEY})", "'note' is NOT NULL and has no default"),
    (f"CREATE TABLE timers ({TEXTS.replace('fire_at TEXT', 'fire_at REAL')}, {KEY})", "'fire_at' is REAL NOT NULL"),
    (
        f"CREATE TABLE timers ({TEXTS.replace('fire_at TEXT NOT NULL', 'fire_at TEXT')}, {KEY})",
        "'fire_at' is TEXT, not",
    ),
    (f"CREATE TABLE timers ({TEXTS})", r"primary key is \(\), not"),
    (f"CREATE TABLE timers ({TEXTS}, PRIMARY KEY (timer_id, workflow_id))", r"\(timer_id, workflow_id\), not"),
    (f"CREATE TABLE timers ({TEXTS.replace('timer_id TEXT', 'timer_id TEXT COLLATE NOCASE')}, {KEY})", "NOCASE"),
    (f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE UNIQUE INDEX idx_timers_fire_at ON timers (fire_at)", "another"),
    (f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE INDEX idx_timers_fire_at ON timers (timer_id)", "another one"),
    (f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE INDEX idx_timers_fire_at ON timers (fire_at DESC)", "another one"),
    (
        f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE INDEX idx_timers_fire_at ON timers (lower(fire_at))",
        "another one",
    ),
    ("CREATE TABLE x (y TEXT); CREATE INDEX idx_timers_fire_at ON x (y)", "'idx_timers_fire_at' is taken by 'x'"),
    ("CREATE TABLE x (y TEXT); CREATE INDEX timers ON x (y)", "it is no table but index"),
    (f"CREATE TABLE Timers ({TEXTS}, {KEY})", "its name is 'Timers'"),
    (f"CREATE TABLE timers ({TEXTS.replace('fire_at', 'Fire_At')}, {KEY})", "has no column 'fire_at'"),
    ("CREATE VIEW timers AS SELECT 1", "it is no table but view"),
    ("CREATE VIRTUAL TABLE timers USING fts5(workflow_id, timer_id, fire_at)", "it is a virtual table"),
]


@pytest.mark.parametrize("backend", ["libsql", "sqlite"])
@pytest.mark.parametrize(("ddl", "message"), STRANGERS)
def test_another_table_is_refused(backend: str, ddl: str, message: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    database.sql(*ddl.split("; "))
    before = database.snapshot()
    with pytest.raises(MigrationError, match=f"{message}.*; rename or drop it"):
        database.run_on_engine(migrate.upgrade)
    with pytest.raises(MigrationError, match="nothing was changed"):
        database.run(migrate.upgrade)
    assert database.snapshot() == before


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"])
@pytest.mark.parametrize(
    ("ddl", "name"),
    [
        ("CREATE TABLE timers (id integer)", "timers"),
        ("CREATE VIEW timers AS SELECT 1", "timers"),
        ("CREATE SEQUENCE idx_timers_fire_at", "idx_timers_fire_at"),
    ],
)
def test_on_postgresql_a_table_of_that_name_is_refused(
    backend: str, ddl: str, name: str, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.sql(ddl)
    before = database.snapshot()
    with pytest.raises(MigrationError, match=f"already a relation '{name}', .*; rename or drop it"):
        database.run_on_engine(migrate.upgrade)
    assert database.snapshot() == before
