"""When a transaction begins, and when it may go on after others have written; on the sync and the async dialect."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session

from aion_timers.libsql import BusyError, ProgrammingError, SnapshotError

READS = [
    "SELECT * FROM items",
    "VALUES (1)",
    "EXPLAIN UPDATE items SET n = 1",
    "WITH q AS (SELECT n FROM items) SELECT * FROM q",
]
WRITES = [
    "UPDATE items SET n = 1",
    "INSERT INTO items (n) VALUES (1) RETURNING id",
    "REPLACE INTO items (id, n) VALUES (1, 1)",
    "WITH q AS (SELECT 1) DELETE FROM items WHERE id = 99",
    "CREATE TABLE other (a)",
    "DROP TABLE IF EXISTS other",
]
NEITHER = ["PRAGMA user_version", "PRAGMA cache_size = -4000", "ATTACH ':memory:' AS m", "VACUUM"]


def snapshot_error(error: OperationalError) -> bool:
    return isinstance(error.orig, SnapshotError) and not error.connection_invalidated


# -- the first statement decides -------------------------------------------------------------------


@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"])
@pytest.mark.parametrize("sql", READS)
def test_first_statement_reads(world: Any, database: Any, level: str, sql: str) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql(sql).all()
        assert database.locked == (level == "IMMEDIATE")
        before = connection.exec_driver_sql("SELECT sum(n) FROM items").scalar()
        if level != "IMMEDIATE":
            database.run("UPDATE items SET n = n + 1")
            after = connection.exec_driver_sql("SELECT sum(n) FROM items").scalar()
            assert (before == after) == (level == "SERIALIZABLE")  # a snapshot
        connection.rollback()
        assert not database.locked

    world.connection(body, isolation_level=level)


@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"])
@pytest.mark.parametrize("sql", WRITES)
def test_first_statement_writes(world: Any, database: Any, level: str, sql: str) -> None:
    def body(connection: sa.Connection) -> None:
        before = database.run("SELECT * FROM items"), database.run("SELECT name FROM sqlite_master")
        connection.exec_driver_sql(sql)
        assert database.locked == (level != "AUTOCOMMIT")
        connection.rollback()
        assert not database.locked
        if level != "AUTOCOMMIT":
            assert before == (database.run("SELECT * FROM items"), database.run("SELECT name FROM sqlite_master"))

    world.connection(body, isolation_level=level)


@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"])
@pytest.mark.parametrize("sql", NEITHER)
def test_first_statement_begins_nothing(world: Any, database: Any, level: str, sql: str) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql(sql)
        assert not database.locked
        database.run("UPDATE items SET n = 5")
        assert connection.exec_driver_sql("SELECT max(n) FROM items").scalar() == 5  # no snapshot was taken before
        connection.commit()

    world.connection(body, isolation_level=level)


@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE"])
def test_savepoint_is_held_back(world: Any, database: Any, level: str) -> None:
    def body(connection: sa.Connection) -> None:
        with connection.begin_nested():
            assert not database.locked
            connection.exec_driver_sql("SELECT 1")
            assert database.locked == (level == "IMMEDIATE")
            connection.exec_driver_sql("UPDATE items SET n = 1")
            assert database.locked
        connection.rollback()
        assert database.run("SELECT max(n) FROM items") == [(0,)]

    world.connection(body, isolation_level=level)


def test_nothing_is_begun_by_begin(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        with connection.begin():
            assert connection.in_transaction()
            assert not database.locked
        connection.commit()
        connection.rollback()

    for level in ("SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"):
        world.connection(body, isolation_level=level)


def test_levels_of_engine_connection_and_session(make_world: Any, database: Any) -> None:
    def locks(bind: Any) -> bool:
        bind.execute(sa.text("SELECT 1"))
        locked: bool = database.locked
        bind.rollback()
        return locked

    immediate = make_world(database.path, isolation_level="IMMEDIATE", pool_size=1, max_overflow=0)
    assert immediate.connection(locks)
    assert immediate.session(locks)
    assert not immediate.connection(locks, isolation_level="SERIALIZABLE")
    assert immediate.connection(locks)
    assert immediate.connection(lambda c: (c.get_isolation_level(), c.default_isolation_level)) == ("IMMEDIATE",) * 2

    default = make_world(database.path, pool_size=1, max_overflow=0)
    assert not default.connection(locks)
    assert default.connection(locks, isolation_level="IMMEDIATE")
    assert default.session(locks, isolation_level="IMMEDIATE")
    assert not default.session(locks)
    assert default.connection(lambda c: c.get_isolation_level()) == "SERIALIZABLE"

    def one_transaction(session: Session) -> bool:
        session.connection(execution_options={"isolation_level": "IMMEDIATE"})
        return locks(session) and not locks(session)

    assert default.session(one_transaction)
    with pytest.raises(sa.exc.ArgumentError, match="REPEATABLE READ"):
        default.connection(locks, isolation_level="REPEATABLE READ")

    def in_a_transaction(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT 1"))
        connection.execution_options(isolation_level="IMMEDIATE")

    with pytest.raises(InvalidRequestError):
        default.connection(in_a_transaction)
    assert make_world(f"{database.path}?isolation_level=IMMEDIATE").connection(locks)
    with pytest.raises(sa.exc.ArgumentError, match="SERIALIZABLE, IMMEDIATE, AUTOCOMMIT, not 'NONE'"):
        make_world(f"{database.path}?isolation_level=NONE")


# -- reading, then writing -------------------------------------------------------------------------


def test_a_session_that_reads_holds_no_lock(world: Any, database: Any, model: Any) -> None:
    def body(session: Session) -> None:
        item = session.get(model, 1)
        assert not database.locked
        item.n = 5
        session.flush()
        assert database.locked
        session.commit()
        assert not database.locked
        assert item.n == 5

    world.session(body)


def test_another_row_was_written(world: Any, database: Any, model: Any) -> None:
    def body(session: Session) -> None:
        item = session.get(model, 1)
        assert session.scalars(sa.select(model.n).where(model.id == 1)).all() == [0]
        database.run("UPDATE items SET n = 7 WHERE id = 2")
        item.n = 5
        session.flush()
        assert session.scalars(sa.select(model.n).order_by(model.id)).all() == [5, 7]
        session.commit()

    world.session(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(5,), (7,)]


def test_the_same_row_was_written(world: Any, database: Any, model: Any) -> None:
    def body(session: Session) -> None:
        item = session.get(model, 1)
        database.run("UPDATE items SET n = n + 1")
        item.n += 10
        with pytest.raises(OperationalError, match="roll back and run it again") as raised:
            session.flush()
        assert snapshot_error(raised.value)
        with pytest.raises(PendingRollbackError):
            session.execute(sa.text("SELECT 1"))
        session.rollback()
        item = session.get(model, 1)
        assert item.n == 1
        item.n += 10
        session.commit()

    world.session(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(11,), (1,)]


def test_after_a_snapshot_error_only_rollback_is_left(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT * FROM items").all()
        database.run("UPDATE items SET n = n + 1")
        with pytest.raises(OperationalError) as raised:
            connection.exec_driver_sql("UPDATE items SET n = 9")
        assert snapshot_error(raised.value)
        for sql in ("SELECT 1", "UPDATE items SET n = 9", "PRAGMA user_version", "SAVEPOINT a", "RELEASE a"):
            with pytest.raises(OperationalError, match="call rollback"):
                connection.exec_driver_sql(sql)
        connection.exec_driver_sql("ROLLBACK TO a")
        with pytest.raises(OperationalError, match="nothing was committed"):
            connection.commit()
        connection.rollback()
        connection.exec_driver_sql("UPDATE items SET n = 9")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items") == [(9,), (9,)]


def test_the_pool_resets_a_lost_transaction(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_size=1, max_overflow=0)

    def lose(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT * FROM items").all()
        database.run("UPDATE items SET n = n + 1")
        connection.exec_driver_sql("UPDATE items SET n = 9")

    with pytest.raises(OperationalError) as raised:
        world.connection(lose)
    assert snapshot_error(raised.value)
    assert world.connection(lambda c: c.exec_driver_sql("UPDATE items SET n = 3").rowcount) == 2


UNREPEATABLE: dict[str, Callable[[sa.Connection], object]] = {
    "phantom": lambda c: c.exec_driver_sql("SELECT count(*) FROM items WHERE n > 5").all(),
    "random": lambda c: c.exec_driver_sql("SELECT random()").all(),
    "too many rows": lambda c: c.exec_driver_sql(
        "WITH RECURSIVE q(a) AS (SELECT 1 UNION ALL SELECT a + 1 FROM q WHERE a < 1001) SELECT a FROM q"
    ).all(),
    "too many statements": lambda c: [c.exec_driver_sql("SELECT 1").all() for _ in range(501)],
    "temporary table": lambda c: c.exec_driver_sql("CREATE TEMP TABLE scratch AS SELECT 1"),
    "setting": lambda c: c.exec_driver_sql("PRAGMA cache_size = -4000"),
    "type": lambda c: c.exec_driver_sql("SELECT data FROM items WHERE id = 2").all(),
}


@pytest.mark.parametrize("what", UNREPEATABLE)
def test_what_cannot_be_repeated_is_a_snapshot_error(world: Any, database: Any, what: str) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT id FROM items WHERE id = 1").all()
        UNREPEATABLE[what](connection)
        database.run("UPDATE items SET n = 7, data = 1.0 WHERE id = 2")
        with pytest.raises(OperationalError) as raised:
            connection.exec_driver_sql("UPDATE items SET n = 9 WHERE id = 1")
        assert snapshot_error(raised.value)
        connection.rollback()

    database.run("UPDATE items SET data = 1 WHERE id = 2")  # 1 == 1.0, but not to SQLite
    world.connection(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(0,), (7,)]


def test_a_failed_read_cannot_be_repeated(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT id FROM items").all()
        with pytest.raises(OperationalError, match="no such table"):
            connection.exec_driver_sql("SELECT * FROM later")
        database.run("CREATE TABLE later (a)")
        with pytest.raises(OperationalError) as raised:
            connection.exec_driver_sql("UPDATE items SET n = 9")
        assert snapshot_error(raised.value)

    world.connection(body)


@pytest.mark.parametrize("what", ["random", "too many rows", "too many statements"])
def test_without_a_foreign_commit_there_is_nothing_to_repeat(world: Any, database: Any, what: str) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT id FROM items").all()
        UNREPEATABLE[what](connection)
        with database.writer(0.1, commit=False):
            connection.exec_driver_sql("UPDATE items SET n = 9 WHERE id = 1")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(9,), (0,)]


def test_reads_up_to_the_limit_are_repeated(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        rows = "WITH RECURSIVE q(a) AS (SELECT 1 UNION ALL SELECT a + 1 FROM q WHERE a < 900) SELECT a FROM q"
        connection.exec_driver_sql(rows).all()
        connection.execute(sa.text("SELECT id, :big FROM items WHERE id = :id"), {"id": 1, "big": 2**60}).all()
        sa.inspect(connection).get_columns("items")
        database.run("UPDATE items SET n = 7 WHERE id = 2")
        connection.exec_driver_sql("UPDATE items SET n = 9 WHERE id = 1")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(9,), (7,)]


def test_large_results_are_compared(world: Any, database: Any) -> None:
    database.run("UPDATE items SET data = ?", (b"x" * 3_000_000,))

    def body(connection: sa.Connection, other: bytes) -> None:
        assert len(connection.exec_driver_sql("SELECT data FROM items WHERE id = 1").scalar_one()) == 3_000_000
        database.run("UPDATE items SET n = n + 1, data = ? WHERE id = 1", (other,))
        connection.exec_driver_sql("UPDATE items SET n = n + 10 WHERE id = 1")
        connection.commit()

    world.connection(lambda c: body(c, b"x" * 3_000_000))
    with pytest.raises(OperationalError) as raised:
        world.connection(lambda c: body(c, b"x" * 2_999_999 + b"y"))
    assert snapshot_error(raised.value)
    assert database.run("SELECT n FROM items ORDER BY id") == [(12,), (0,)]


def test_savepoints_survive_the_restart(world: Any, database: Any, model: Any) -> None:
    def body(session: Session) -> None:
        assert session.get(model, 1)
        with session.begin_nested(), session.begin_nested():
            session.scalars(sa.select(model.id)).all()
        with session.begin_nested():
            database.run("UPDATE items SET n = 7 WHERE id = 2")
            session.add(model(name="kept", n=0))
            session.flush()
            with session.begin_nested() as inner:
                session.add(model(name="dropped", n=0))
                session.flush()
                inner.rollback()
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(model(name="kept", n=0))
        session.commit()

    world.session(body)
    assert database.run("SELECT name FROM items WHERE id > 2") == [("kept",)]


def test_stale_inside_a_savepoint(world: Any, database: Any, model: Any) -> None:
    def body(session: Session) -> None:
        item = session.get(model, 1)
        database.run("UPDATE items SET n = n + 1")
        with pytest.raises(OperationalError) as raised, session.begin_nested():
            item.n = 99
        assert snapshot_error(raised.value)
        with pytest.raises(OperationalError, match="call rollback"):
            session.execute(sa.text("SELECT 1"))
        session.rollback()
        session.get(model, 1).n = 99
        session.commit()

    world.session(body)
    assert database.run("SELECT n FROM items WHERE id = 1") == [(99,)]


def test_savepoints_before_anything_else(world: Any, database: Any, model: Any) -> None:
    def body(session: Session) -> None:
        with session.begin_nested():
            session.add(model(name="a", n=0))
        session.rollback()
        with session.begin_nested():
            pass
        session.commit()
        with session.begin_nested():
            session.add(model(name="b", n=0))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(model(name="b", n=0))
        session.commit()

    world.session(body)
    assert database.run("SELECT name FROM items WHERE id > 2") == [("b",)]


def test_a_savepoint_that_was_held_back_ends_with_its_transaction(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_size=1, max_overflow=0)

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SAVEPOINT held")
        connection.rollback()
        connection.exec_driver_sql("UPDATE items SET n = 1")
        with pytest.raises(OperationalError, match="no such savepoint: held"):
            connection.exec_driver_sql("RELEASE held")
        connection.rollback()
        connection.exec_driver_sql("SAVEPOINT held")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql("RELEASE held")
        assert database.locked

    world.connection(body)
    assert not database.locked


def test_files_that_are_attached_are_locked_and_compared_too(world: Any, database: Any, tmp_path: Any) -> None:
    other = type(database)(tmp_path / "other.db")
    other.run("CREATE TABLE notes (a)")

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"ATTACH '{other.path}' AS other")
        for change, fails in (("SELECT 1", False), ("INSERT INTO notes VALUES (1)", True)):
            assert connection.exec_driver_sql("SELECT count(*) FROM notes").scalar() == 0
            assert not other.locked
            other.run(change)
            if fails:
                with pytest.raises(OperationalError) as raised:
                    connection.exec_driver_sql("UPDATE items SET n = n + 1")
                assert snapshot_error(raised.value)
            else:
                connection.exec_driver_sql("UPDATE items SET n = n + 1")
                assert other.locked
                with pytest.raises(sa.exc.ProgrammingError, match="ATTACH inside a transaction"):
                    connection.exec_driver_sql("ATTACH ':memory:' AS more")
                connection.commit()
        connection.rollback()
        connection.exec_driver_sql("DETACH other")

    world.connection(body)
    assert database.run("SELECT n FROM items") == [(1,), (1,)]


# -- waiting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", [True, False], ids=["commits", "rolls back"])
def test_a_first_write_waits_for_the_writer(world: Any, database: Any, commit: bool) -> None:
    def body(connection: sa.Connection) -> None:
        with database.writer(0.2, commit=commit):
            connection.exec_driver_sql("UPDATE items SET n = n + 10")
        connection.commit()

    world.connection(body)
    world.connection(body, isolation_level="AUTOCOMMIT")
    assert database.run("SELECT n FROM items WHERE id = 1") == [(22 if commit else 20,)]


def test_a_write_after_reads_waits_for_the_writer(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").all()
        with database.writer(0.2, sql="UPDATE items SET n = n + 1 WHERE id = 2"):
            connection.exec_driver_sql("UPDATE items SET n = n + 10")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(10,), (11,)]


def test_a_stale_transaction_does_not_wait(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT n FROM items").all()
        database.run("UPDATE items SET n = n + 1")
        with database.held(), pytest.raises(OperationalError) as raised:
            connection.exec_driver_sql("UPDATE items SET n = n + 10")
        assert snapshot_error(raised.value)

    world.connection(body)


@pytest.mark.parametrize("read_first", [False, True], ids=["writes", "reads and writes"])
def test_timeout(make_world: Any, database: Any, read_first: bool) -> None:
    world = make_world(f"{database.path}?timeout=0.2")

    def body(connection: sa.Connection) -> None:
        with database.held():
            if read_first:
                connection.exec_driver_sql("SELECT n FROM items").all()
            begun = time.monotonic()
            with pytest.raises(OperationalError, match=r"longer than 0\.2 s") as raised:
                connection.exec_driver_sql("UPDATE items SET n = 6")
            assert isinstance(raised.value.orig, BusyError)
            assert time.monotonic() - begun >= 0.2
        connection.rollback()
        connection.exec_driver_sql("UPDATE items SET n = 7")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items") == [(7,), (7,)]


@pytest.mark.parametrize(
    "sql", ["PRAGMA busy_timeout = 200", "pragma main.busy_timeout(200);", "PRAGMA busy_timeout='200'"]
)
def test_busy_timeout_does_not_stop_other_threads(world: Any, database: Any, sql: str) -> None:
    """SQLite would wait with the interpreter's lock, which the other thread needs to commit."""

    def body(connection: sa.Connection) -> None:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 2000
        assert connection.exec_driver_sql(sql).all() == [(200,)]
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 200
        with database.held(), pytest.raises(OperationalError, match=r"longer than 0\.2 s"):
            connection.exec_driver_sql("UPDATE items SET n = 6")
        connection.rollback()
        connection.exec_driver_sql("PRAGMA busy_timeout = 60000")
        with database.writer(0.1):
            connection.exec_driver_sql("UPDATE items SET n = n + 10")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items") == [(11,), (11,)]


def test_busy_timeout_in_a_transaction(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT n FROM items").all()
        connection.exec_driver_sql("PRAGMA busy_timeout = -1")
        database.run("INSERT INTO items (n) VALUES (0)")
        with pytest.raises(OperationalError) as raised:
            connection.exec_driver_sql("UPDATE items SET n = 5")
        assert snapshot_error(raised.value)  # a transaction that has only read still compares its reads
        connection.rollback()
        with pytest.raises(sa.exc.ProgrammingError, match="a number of milliseconds"):
            connection.exec_driver_sql("PRAGMA busy_timeout = soon")

    world.connection(body)


def test_reads_do_not_wait(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> int:
        with database.held():
            return connection.exec_driver_sql("SELECT max(n) FROM items").scalar_one()

    assert world.connection(body) == 0


# -- ends ------------------------------------------------------------------------------------------


def test_sqlite_rolls_back_by_itself(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("INSERT INTO items (id, n) VALUES (3, 0)")
        with pytest.raises(IntegrityError):
            connection.exec_driver_sql("INSERT OR ROLLBACK INTO items (id, n) VALUES (1, 0)")
        with pytest.raises(OperationalError, match="call rollback"):
            connection.exec_driver_sql("INSERT INTO items (id, n) VALUES (4, 0)")
        with pytest.raises(OperationalError, match="nothing was committed"):
            connection.commit()
        connection.rollback()
        connection.exec_driver_sql("INSERT INTO items (id, n) VALUES (5, 0)")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT id FROM items") == [(1,), (2,), (5,)]


def test_a_commit_that_fails_is_over(world: Any, database: Any) -> None:
    database.run("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    database.run("CREATE TABLE child (parent REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("INSERT INTO child VALUES (9)")
        with pytest.raises(IntegrityError):
            connection.commit()
        assert not database.locked
        connection.rollback()
        connection.exec_driver_sql("INSERT INTO parent VALUES (1)")
        connection.exec_driver_sql("INSERT INTO child VALUES (1)")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT * FROM child") == [(1,)]


def test_deferred_foreign_keys_survive_a_first_read(world: Any, database: Any) -> None:
    database.run("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    database.run("CREATE TABLE child (parent REFERENCES parent (id))")

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        connection.exec_driver_sql("SELECT * FROM parent").all()
        connection.exec_driver_sql("INSERT INTO child VALUES (1)")
        connection.exec_driver_sql("INSERT INTO parent VALUES (1)")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT * FROM child") == [(1,)]


def test_results_that_are_not_read_do_not_block(world: Any, database: Any) -> None:
    kept = []

    def body(connection: sa.Connection) -> None:
        result = connection.exec_driver_sql("UPDATE items SET n = 5 RETURNING id")
        kept.append(result)
        assert result.fetchone() == (1,)
        kept.append(connection.exec_driver_sql("SELECT * FROM items"))
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items") == [(5,), (5,)]
    assert database.run("PRAGMA wal_checkpoint(TRUNCATE)") == [(0, 0, 0)]


def test_a_result_half_read_at_autocommit_holds_nothing(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
    kept = []

    def read_half(connection: sa.Connection) -> None:
        kept.append(connection.exec_driver_sql("SELECT n FROM items"))
        assert kept[0].fetchone() == (0,)

    world.connection(read_half)
    database.run("UPDATE items SET n = 1")
    assert database.run("PRAGMA wal_checkpoint(TRUNCATE)") == [(0, 0, 0)]
    world.connection(lambda connection: connection.exec_driver_sql("UPDATE items SET n = n + 1"))
    assert database.run("SELECT n FROM items") == [(2,), (2,)]


def test_schema_changes_are_transactional(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE halfway (a)")
        connection.exec_driver_sql("ALTER TABLE items ADD COLUMN more")
        connection.rollback()
        assert "halfway" not in sa.inspect(connection).get_table_names()

    world.connection(body)
    assert len(database.run("PRAGMA table_info(items)")) == 4


def test_foreign_keys_pragma_inside_a_transaction(world: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sa.exc.ProgrammingError) as raised:
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        assert isinstance(raised.value.orig, ProgrammingError)

    world.connection(body)


def test_begin_in_sql(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        assert database.locked
        connection.exec_driver_sql("UPDATE items SET n = 3")
        connection.exec_driver_sql("COMMIT")
        assert not database.locked
        connection.rollback()

    world.connection(body)
    world.connection(body, isolation_level="AUTOCOMMIT")
    assert database.run("SELECT n FROM items") == [(3,), (3,)]
