"""A database that is not what it is said to be is refused, with the statement that mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection

from aion_timers import MigrationError, NotMigratedError, migrate
from tests.migrations.conftest import HEAD, Database


def cure(error: MigrationError) -> list[str]:
    """The statements that a cure names, without what is to be done by Alembic."""
    return error.cure.removeprefix("run ").partition("; then")[0].replace(":", "\\:").split("; ")


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("DROP TABLE timers", "it is missing"),
        ("DROP INDEX idx_timers_fire_at", "index idx_timers_fire_at is missing"),
        ("ALTER TABLE timers DROP COLUMN attempts", "column attempts is missing"),
    ],
)
def test_a_part_is_missing(broken: str, what: str, database: Database) -> None:
    database.run(migrate.upgrade)
    first = ["DROP TRIGGER timers_moved"] if database.is_sqlite and "attempts" in broken else []
    database.sql(*first, broken)
    before = database.snapshot()
    for run in (database.run, database.run_on_engine):
        upgrade: Any = run
        with pytest.raises(NotMigratedError, match=f"half migrated.*{HEAD}.*{what}.*; run ") as raised:
            upgrade(migrate.upgrade)
    assert database.snapshot() == before
    mends = [raised.value.cure.removeprefix("run ")] if first else cure(raised.value)
    for statement in split(mends):
        database.sql(statement)
    database.run(migrate.upgrade)
    database.run(migrate.check)


def split(mends: list[str]) -> list[str]:
    """Statements, of which that of a trigger holds a semicolon itself."""
    found: list[str] = []
    for mend in mends:
        head, create, trigger = mend.partition("CREATE TRIGGER")
        found += [part for part in head.split("; ") if part.strip()]
        if create:
            found.append(create + trigger.partition("END")[0] + "END")
    return found


def test_what_is_different_but_there_does_not_stop_a_start(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("DROP INDEX idx_timers_fire_at", "CREATE INDEX idx_timers_fire_at ON timers (fire_at)")
    database.run(migrate.upgrade)
    database.run_on_engine(migrate.upgrade)
    with pytest.raises(MigrationError, match="index idx_timers_fire_at is"):
        database.run(migrate.check)


def test_two_revisions_at_once(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("INSERT INTO aion_timers_version VALUES ('aion0001')")
    for work in (migrate.upgrade, migrate.downgrade, migrate.check):
        with pytest.raises(MigrationError, match="revision aion0001 and aion0002 at once; run DELETE") as raised:
            database.run(work)
    database.sql(*cure(raised.value))
    database.run(migrate.upgrade)
    database.run(migrate.check)
    assert database.run(migrate.current) == HEAD


@pytest.mark.parametrize("backend", ["psycopg", "asyncpg"])
def test_the_columns_are_there_and_their_revision_is_not(backend: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    database.run(migrate.upgrade)
    database.sql("UPDATE aion_timers_version SET version_num = 'aion0001'")
    with pytest.raises(MigrationError, match=r"already has a column 'lease_token'.*`alembic stamp aion0002`"):
        database.run(migrate.upgrade)
    database.sql("DELETE FROM aion_timers_version")
    with pytest.raises(MigrationError, match=r"already a relation 'timers'.*`alembic stamp`"):
        database.run(migrate.upgrade)


# -- the lock, for an env.py ------------------------------------------------------------------------------------------


def test_a_locked_transaction_is_committed_as_a_whole(database: Database) -> None:
    def work(connection: Connection) -> None:
        connection.rollback()
        with migrate.locked(connection):
            connection.exec_driver_sql("CREATE TABLE orders (id INTEGER)")
            migrate.upgrade(connection)
        with pytest.raises(ConnectionError):
            fail(connection)
        with migrate.locked(connection):
            connection.exec_driver_sql("INSERT INTO orders VALUES (1)")

    def fail(connection: Connection) -> None:
        with migrate.locked(connection):
            connection.exec_driver_sql("DROP TABLE orders")
            raise ConnectionError

    def outside(engine: Any) -> None:
        with engine.connect() as connection:
            work(connection)

    database.run_on_engine(outside)
    assert database.sql("SELECT id FROM orders") == [(1,)]
    database.run(migrate.check)


def test_a_lock_in_a_transaction_of_the_caller_belongs_to_the_caller(database: Database) -> None:
    def work(connection: Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE orders (id INTEGER)")
        with migrate.locked(connection):
            migrate.upgrade(connection)
        connection.rollback()

    database.run(work)
    assert database.snapshot() == []


@pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg"])
def test_a_lock_that_another_holds_for_too_long(backend: str, new_database: Callable[..., Database]) -> None:
    options = {"timeout": 0.1} if backend != "psycopg" else {"options": "-c lock_timeout=100ms"}
    database = new_database(backend, connect_args=options)
    with database.engine.connect() as first, migrate.locked(first):
        for refused in (lambda: database.run(migrate.upgrade), lambda: lock_and_leave(database)):
            with pytest.raises(MigrationError, match=r"a lock could not be had: .*; another program migrates"):
                refused()
    database.run(migrate.upgrade)


def lock_and_leave(database: Database) -> None:
    with database.engine.connect() as second, migrate.locked(second):
        pytest.fail("two held the lock")
