"""`migrate.check` sees every difference that matters and names the statement that mends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection

from aion_timers import MigrationError, NotMigratedError, migrate
from tests.migrations.conftest import Database

DROP_CHECK = "ALTER TABLE timers DROP CONSTRAINT ck_timers_fire_at"
ADD_CHECK = "ALTER TABLE timers ADD CONSTRAINT ck_timers_fire_at CHECK"
YEARS = "fire_at >= '0001-01-01 00:00:00+00' AND fire_at <= '9999-12-31 23:59:59.999999+00'"
ON_POSTGRESQL = [
    ("DROP INDEX idx_timers_fire_at", "index idx_timers_fire_at is missing", True),
    (
        "DROP INDEX idx_timers_fire_at; CREATE INDEX idx_timers_fire_at ON timers (fire_at)",
        r"index idx_timers_fire_at is \(fire_at\), not \(fire_at, workflow_id, timer_id\)",
        False,
    ),
    (
        "DROP INDEX idx_timers_fire_at; CREATE INDEX idx_timers_fire_at ON timers (fire_at DESC) WHERE timer_id > 'a'",
        "index idx_timers_fire_at is .*DESC.*WHERE",
        False,
    ),
    ("ALTER TABLE timers DROP CONSTRAINT ck_timers_timer_id", "CHECK ck_timers_timer_id is missing", True),
    ("ALTER TABLE timers DROP CONSTRAINT ck_timers_fire_at", "CHECK ck_timers_fire_at is missing", True),
    (
        f"{DROP_CHECK}; {ADD_CHECK} (fire_at >= '0001-01-01 00:00:00+01')",
        "CHECK ck_timers_fire_at is another one",
        False,
    ),
    (
        f"{DROP_CHECK}; {ADD_CHECK} ({YEARS}) NOT VALID",
        "CHECK ck_timers_fire_at is another one",
        False,
    ),
    ("ALTER TABLE timers ADD CONSTRAINT few CHECK (timer_id <> 'x')", "CHECK few does not belong there", False),
    (
        'ALTER TABLE timers ALTER COLUMN timer_id TYPE text COLLATE "POSIX"',
        'column timer_id is text COLLATE "POSIX" NOT NULL, not text COLLATE "C" NOT NULL',
        False,
    ),
    ("ALTER TABLE timers ALTER COLUMN timer_id TYPE text", "column timer_id is text COLLATE .*|text NOT NULL", False),
    ("ALTER TABLE timers ALTER COLUMN fire_at DROP NOT NULL", "column fire_at is .*, not .* NOT NULL", False),
    ("ALTER TABLE timers ALTER COLUMN fire_at SET DEFAULT now()", r"column fire_at is .*DEFAULT now\(\)", False),
    (
        "ALTER TABLE timers ALTER COLUMN workflow_id TYPE text",
        "column workflow_id is text NOT NULL, not uuid NOT NULL",
        False,
    ),
    ("ALTER TABLE timers ADD COLUMN note text NOT NULL", "column note does not belong there", False),
    ("ALTER TABLE timers DROP CONSTRAINT timers_pkey", "primary key is missing", True),
    ("ALTER TABLE timers SET (fillfactor = 55)", "storage is .*fillfactor=55, not .*fillfactor=50;", False),
    ("ALTER TABLE timers SET (fillfactor = 55, parallel_workers = 2)", "storage is .*parallel_workers=2, not ", False),
    (
        "ALTER TABLE timers RESET (fillfactor, autovacuum_vacuum_threshold)",
        "storage is autovacuum_vacuum_scale_factor=0.01, not .*_threshold=1000, fillfactor=50;",
        False,
    ),
    (
        "ALTER TABLE timers RESET (fillfactor, autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold)",
        "storage is as usual, not autovacuum_vacuum_scale_factor=0.01, ",
        False,
    ),
    ("ALTER TABLE timers DROP CONSTRAINT ck_timers_lease", "CHECK ck_timers_lease is missing", True),
    ("ALTER TABLE timers DROP CONSTRAINT ck_timers_lease_until", "CHECK ck_timers_lease_until is missing", True),
    ("ALTER TABLE timers DROP CONSTRAINT ck_timers_attempts", "CHECK ck_timers_attempts is missing", True),
    (
        "ALTER TABLE timers DROP COLUMN lease_token",
        "column lease_token is missing; CHECK ck_timers_lease is missing",
        True,
    ),
    ("ALTER TABLE timers DROP COLUMN lease_until", "column lease_until is missing; .*ck_timers_lease_until", True),
    ("ALTER TABLE timers DROP COLUMN attempts", "column attempts is missing", True),
    ("ALTER TABLE timers ALTER COLUMN attempts DROP DEFAULT", "is integer NOT NULL, not .* DEFAULT 0;", False),
    ("ALTER TABLE timers ALTER COLUMN attempts SET DEFAULT 1", "NOT NULL DEFAULT 1, not .* DEFAULT 0;", False),
    ("ALTER TABLE timers ALTER COLUMN attempts DROP NOT NULL", "attempts is integer DEFAULT 0, not ", False),
    ("ALTER TABLE timers ALTER COLUMN attempts TYPE bigint", "attempts is bigint NOT NULL DEFAULT .*, not ", False),
    ("ALTER TABLE timers ALTER COLUMN lease_until SET DEFAULT now()", r"lease_until is .*DEFAULT now\(\), not ", False),
    ("ALTER TABLE timers ALTER COLUMN lease_until SET NOT NULL", "lease_until is .* NOT NULL, not ", False),
    ("ALTER TABLE timers ALTER COLUMN lease_token TYPE text", "lease_token is text, not uuid;", False),
    ("ALTER TABLE timers SET UNLOGGED", "storage is UNLOGGED or temporary, not ", False),
]


@pytest.mark.parametrize(("drift", "message", "is_missing"), ON_POSTGRESQL)
def test_on_postgresql(
    drift: str,
    message: str,
    is_missing: bool,
    new_database: Callable[..., Database],
) -> None:
    database = new_database("psycopg")
    database.run(migrate.upgrade)
    migrated = {row for row in database.snapshot() if row[0] != "column"}
    database.sql(*drift.split("; "))
    with pytest.raises(MigrationError, match=message) as raised:
        database.run(migrate.check)
    assert isinstance(raised.value, NotMigratedError) is is_missing
    database.sql(*raised.value.cure.removeprefix("run ").replace(":", "\\:").split("; "))
    database.run(migrate.check)
    assert {row for row in database.snapshot() if row[0] != "column"} == migrated


def test_everything_is_told_at_once(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("DROP INDEX idx_timers_fire_at")
    if database.is_sqlite:
        database.sql("ALTER TABLE timers RENAME COLUMN fire_at TO due_at")
    else:
        database.sql("ALTER TABLE timers ALTER COLUMN timer_id TYPE varchar(80)")
    with pytest.raises(NotMigratedError) as raised:
        database.run(migrate.check)
    cure = "`alembic upgrade head`" if database.is_sqlite else "CREATE INDEX idx_timers_fire_at ON timers"
    for part in ("index idx_timers_fire_at is missing", "column ", cure):
        assert part in str(raised.value)
    database.sql("DROP TABLE timers")
    with pytest.raises(NotMigratedError, match="it is missing; run DROP TABLE aion_timers_version; then `alembic"):
        database.run(migrate.check)
    database.sql("DROP TABLE aion_timers_version")
    database.run(migrate.upgrade)
    database.run(migrate.check)


@pytest.mark.parametrize("backend", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York", "UTC"])
def test_the_session_of_the_host_does_not_matter(
    backend: str, zone: str, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade)

    def check_in_zone(connection: Connection) -> None:
        connection.exec_driver_sql(f"SET LOCAL timezone = '{zone}'")
        connection.exec_driver_sql("SET LOCAL datestyle = 'SQL, DMY'")
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        migrate.check(connection)
        assert connection.exec_driver_sql("SHOW timezone").scalar() == zone

    database.run(check_in_zone)


def test_what_a_host_adds_is_left_alone(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql(
        "ALTER TABLE timers ADD COLUMN note TEXT",
        "ALTER TABLE timers ADD COLUMN tries INTEGER DEFAULT 0 NOT NULL",
        "CREATE INDEX by_note ON timers (note)",
    )
    if not database.is_sqlite:
        database.sql("ALTER TABLE timers SET (autovacuum_vacuum_scale_factor = 0.2, autovacuum_enabled = off)")
    database.run(migrate.check)


KEY = "PRIMARY KEY (workflow_id, timer_id)"
TEXTS = "workflow_id TEXT NOT NULL, timer_id TEXT NOT NULL, fire_at TEXT NOT NULL"
INDEX = "CREATE INDEX idx_timers_fire_at ON timers (fire_at, workflow_id, timer_id)"
ON_SQLITE = [
    (f"CREATE TABLE timers ({TEXTS}, {KEY}) WITHOUT ROWID", "index idx_timers_fire_at is missing", True),
    (
        f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE INDEX idx_timers_fire_at ON timers (fire_at)",
        r"index idx_timers_fire_at is \(fire_at\), not",
        True,
    ),
    (
        f"CREATE TABLE timers ({TEXTS}, {KEY}); CREATE UNIQUE INDEX idx_timers_fire_at ON timers (fire_at DESC)",
        r"is UNIQUE \(fire_at DESC\), not",
        True,
    ),
    (
        f"CREATE TABLE timers ({TEXTS}, {KEY}, CHECK (fire_at > '2')) WITHOUT ROWID; {INDEX}",
        "CHECK fire_at > '2' does not belong there",
        False,
    ),
    (
        f"CREATE TABLE timers ({TEXTS.replace('fire_at TEXT', 'fire_at TEXT COLLATE NOCASE')}, {KEY}); {INDEX}",
        "column fire_at is TEXT COLLATE NOCASE NOT NULL",
        False,
    ),
    (
        f"CREATE TABLE timers ({TEXTS.replace('workflow_id TEXT', 'workflow_id BLOB')}, {KEY}); {INDEX}",
        "column workflow_id is BLOB NOT NULL, not TEXT NOT NULL",
        False,
    ),
    (f"CREATE TABLE timers ({TEXTS}, PRIMARY KEY (timer_id)); {INDEX}", r"primary key is \(timer_id\), not", False),
    (f"CREATE TABLE timers ({TEXTS}, note TEXT NOT NULL, {KEY}); {INDEX}", "column note does not belong there", False),
    ("CREATE VIEW timers AS SELECT 1 AS x", "storage is no table with a key", False),
]


@pytest.mark.parametrize("backend", ["libsql", "sqlite"])
@pytest.mark.parametrize(("ddl", "message", "index_mends"), ON_SQLITE)
def test_on_sqlite(
    backend: str,
    ddl: str,
    message: str,
    index_mends: bool,
    new_database: Callable[..., Database],
) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade)
    database.sql("DROP TABLE timers", *ddl.split("; "))
    with pytest.raises(MigrationError, match=message) as raised:
        database.run(migrate.check)
    cure = raised.value.cure.removeprefix("run ").replace("; then `alembic upgrade head`, and copy the rows over", "")
    if ddl.startswith("CREATE VIEW"):
        return
    database.sql(*cure.split("; "))
    if not index_mends:
        database.run(migrate.upgrade)
    database.run(migrate.check)


MOVED = "CREATE TRIGGER timers_moved AFTER UPDATE OF fire_at ON timers"
DROPPED = "DROP TRIGGER timers_moved; ALTER TABLE timers DROP COLUMN {}"
LEASES_ON_SQLITE = [
    ("DROP TRIGGER timers_moved", "trigger timers_moved is missing", True),
    (
        f"DROP TRIGGER timers_moved; {MOVED} BEGIN UPDATE timers SET lease_token = NULL, lease_until = NULL; END",
        "trigger timers_moved is another one",
        False,
    ),
    (DROPPED.format("attempts"), "column attempts is missing; trigger", True),
    (
        f"{DROPPED.format('lease_token')}; ALTER TABLE timers DROP COLUMN attempts",
        "column attempts is missing; column lease_token is missing; trigger",
        True,
    ),
    (
        f"{DROPPED.format('attempts')}; ALTER TABLE timers ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1",
        "column attempts is INTEGER NOT NULL DEFAULT 1, not INTEGER NOT NULL DEFAULT 0; trigger",
        True,
    ),
    (
        f"{DROPPED.format('lease_token')}; ALTER TABLE timers ADD COLUMN lease_token TEXT DEFAULT 'held'",
        "column lease_token is TEXT DEFAULT 'held', not TEXT; trigger",
        True,
    ),
    (
        f"{DROPPED.format('lease_until')}; ALTER TABLE timers ADD COLUMN lease_until REAL; {MOVED} BEGIN SELECT 1; END",
        "column lease_until is REAL, not TEXT; trigger timers_moved is another one",
        False,
    ),
]


@pytest.mark.parametrize("backend", ["libsql", "sqlite"])
@pytest.mark.parametrize("storage", ["", " WITHOUT ROWID"])
@pytest.mark.parametrize(("drift", "message", "is_missing"), LEASES_ON_SQLITE)
def test_what_belongs_to_leases_on_sqlite(
    backend: str, storage: str, drift: str, message: str, *, is_missing: bool, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    database.sql(f"CREATE TABLE timers ({TEXTS}, {KEY}){storage}")
    database.run(migrate.upgrade)
    database.add_timer()
    timers = database.sql("SELECT workflow_id, timer_id, fire_at FROM timers")
    database.sql(*drift.replace("; END", ";\nEND").split("; "))
    with pytest.raises(MigrationError, match=message) as raised:
        database.run(migrate.check)
    assert isinstance(raised.value, NotMigratedError) is is_missing
    database.sql(*raised.value.cure.removeprefix("run ").split("; "))
    database.run(migrate.check)
    assert database.sql("SELECT workflow_id, timer_id, fire_at FROM timers") == timers
    database.run(migrate.downgrade, force=True)
    assert {row[1] for row in database.snapshot()} <= {"timers", "idx_timers_fire_at", "sqlite_autoindex_timers_1"}


@pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg"])
@pytest.mark.parametrize("drift", ["DROP INDEX {0}", "DROP INDEX {0}; CREATE INDEX {1} (fire_at)"])
def test_a_cure_names_the_schema(
    backend: str, drift: str, new_database: Callable[..., Database], tmp_path: Path
) -> None:
    database = new_database(backend)
    names = ["tenant.idx_timers_fire_at", "tenant.idx_timers_fire_at ON timers"]
    prepare = f"ATTACH DATABASE '{tmp_path / 'tenant.db'}' AS tenant"
    if not database.is_sqlite:
        names[1] = "idx_timers_fire_at ON tenant.timers"
        prepare = "CREATE SCHEMA tenant"

    def mend(connection: Connection) -> None:
        connection.exec_driver_sql(prepare)
        tenant = connection.execution_options(schema_translate_map={None: "tenant"})
        migrate.upgrade(tenant)
        for statement in drift.format(*names).split("; "):
            tenant.exec_driver_sql(statement)
        if database.is_sqlite:
            tenant.exec_driver_sql("DROP TRIGGER tenant.timers_moved")
        tenant.exec_driver_sql("ALTER TABLE tenant.timers DROP COLUMN attempts")
        with pytest.raises(NotMigratedError) as raised:
            migrate.check(tenant)
        for statement in raised.value.cure.removeprefix("run ").split("; "):
            tenant.exec_driver_sql(statement)
        migrate.check(tenant)

    database.run(mend)
