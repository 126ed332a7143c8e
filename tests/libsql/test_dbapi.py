import datetime as dt
import enum
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from aion_timers.libsql import (
    ClosedError,
    DataError,
    DisconnectError,
    IntegrityError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    dbapi,
)


class Number(enum.IntEnum):
    """A subclass of int."""

    BIG = 2**40


class Text(enum.StrEnum):
    """A subclass of str."""

    HELLO = "hello"


@pytest.fixture
def connection(database: Any) -> Iterator[dbapi.Connection]:
    connection = database.connect(timeout=0.2)
    yield connection
    connection.close()


def test_module() -> None:
    assert (dbapi.apilevel, dbapi.threadsafety, dbapi.paramstyle) == ("2.0", 1, "qmark")
    assert issubclass(dbapi.BusyError, dbapi.OperationalError)
    assert issubclass(dbapi.SnapshotError, dbapi.OperationalError)
    assert issubclass(dbapi.DisconnectError, dbapi.OperationalError)


@pytest.mark.parametrize(
    "value",
    [0, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**53 + 1, 2**62 + 1, 2**63 - 1, -(2**63), 1.5, "ü", b"\0\xff", None],
)
def test_values_come_back(connection: dbapi.Connection, value: object) -> None:
    (row,) = connection.execute("SELECT ?, typeof(?)", (value, value)).fetchall()
    kinds = {int: "integer", float: "real", str: "text", bytes: "blob", type(None): "null"}
    assert row == (value, kinds[type(value)])
    connection.execute("UPDATE items SET data = ? WHERE id = 1", (value,))
    assert connection.execute("SELECT data FROM items WHERE data IS ?", (value,)).fetchone() == (value,)


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (True, 1),
        (Number.BIG, 2**40),
        (Text.HELLO, "hello"),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
    ],
)
def test_values_that_are_converted(connection: dbapi.Connection, value: object, stored: object) -> None:
    assert connection.execute("SELECT ?, ?", (value, "x")).fetchall() == [(stored, "x")]


@pytest.mark.parametrize("value", ["a\0b", "\ud800", 2**63, -(2**63) - 1])
def test_values_that_do_not_fit(connection: dbapi.Connection, value: object) -> None:
    with pytest.raises(DataError):
        connection.execute("SELECT ?", (value,))


@pytest.mark.parametrize("value", [dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.date(2026, 1, 1), Decimal(1), object()])
def test_types_that_are_unknown(connection: dbapi.Connection, value: object) -> None:
    with pytest.raises(ProgrammingError, match=type(value).__name__):
        connection.execute("SELECT ?", (value,))


def test_parameters_must_match(connection: dbapi.Connection) -> None:
    for parameters in ((), (1,), (1, 2, 3)):
        with pytest.raises(ProgrammingError, match="2 parameters"):
            connection.execute("SELECT ?, ?", parameters)
    assert connection.execute("SELECT ?, ?", [1, 2]).fetchall() == [(1, 2)]
    for wrong in ({"a": 1}, "ab"):
        with pytest.raises(NotSupportedError, match="sequence"):
            connection.execute("SELECT ?, ?", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("INSERT INTO items (id, n) VALUES (1, 0)", IntegrityError),
        ("INSERT INTO items (id) VALUES (3)", IntegrityError),
        ("INSERT INTO items (id, n) VALUES (1, 0) RETURNING id", IntegrityError),
        ("INSERT INTO items (id, n) VALUES ('x', 0)", IntegrityError),
        ("selct 1", OperationalError),
        ("SELECT * FROM nothing", OperationalError),
        ("SELECT json('{')", OperationalError),
        ("SELECT abs(-9223372036854775808)", OperationalError),
        ("SELECT zeroblob(2000000000)", DataError),
        ("-- nothing", ProgrammingError),
        ("", ProgrammingError),
    ],
)
def test_errors_are_raised_in_execute(connection: dbapi.Connection, sql: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        connection.execute(sql)
    assert type(raised.value) is error


def test_a_failed_statement_leaves_the_transaction_open(connection: dbapi.Connection, database: Any) -> None:
    connection.execute("UPDATE items SET n = 5 WHERE id = 1")
    with pytest.raises(IntegrityError):
        connection.execute("UPDATE items SET id = 1 WHERE id = 2 RETURNING id")
    connection.commit()
    assert database.run("SELECT n FROM items ORDER BY id") == [(5,), (0,)]


def test_fetching(connection: dbapi.Connection) -> None:
    cursor = connection.cursor()
    cursor.execute("VALUES (1), (2), (3), (4), (5), (6)")
    assert [column[0] for column in cursor.description or ()] == ["column1"]
    assert cursor.fetchone() == (1,)
    assert cursor.fetchmany() == [(2,)]
    assert cursor.fetchmany(2) == [(3,), (4,)]
    assert next(iter(cursor)) == (5,)
    assert cursor.fetchall() == [(6,)]
    assert [cursor.fetchone(), cursor.fetchone()] == [None, None]
    assert cursor.fetchmany(3) == cursor.fetchall() == []
    cursor.execute("SELECT 7")
    assert cursor.fetchmany(3) == [(7,)]
    cursor.execute("UPDATE items SET n = 1")
    assert cursor.description is None
    with pytest.raises(ProgrammingError, match="no rows"):
        cursor.fetchall()


def test_rowcount_and_lastrowid(connection: dbapi.Connection) -> None:
    cursor = connection.cursor()
    assert cursor.rowcount == -1
    assert cursor.execute("UPDATE items SET n = 7").rowcount == 2
    assert cursor.execute("UPDATE items SET n = 8 RETURNING id").rowcount == 2
    assert cursor.execute("SELECT 1").rowcount == -1
    assert cursor.execute("CREATE TABLE other (a)").rowcount == -1
    assert cursor.execute("DELETE FROM items WHERE id = 99").rowcount == 0
    assert (
        cursor.execute("WITH q AS (SELECT 2 AS v) UPDATE items SET n = 9 WHERE id IN (SELECT v FROM q)").rowcount == 1
    )
    assert cursor.execute("INSERT INTO items (id, n) VALUES (41, 0)").lastrowid == 41


def test_executemany(connection: dbapi.Connection) -> None:
    cursor = connection.cursor()
    cursor.executemany("INSERT INTO items (id, n) VALUES (?, ?)", ((i, 2**40) for i in range(10, 15)))
    assert cursor.rowcount == 5
    assert connection.execute("SELECT count(*) FROM items WHERE n = ?", (2**40,)).fetchone() == (5,)
    with pytest.raises(ProgrammingError, match="executemany"):
        cursor.executemany("SELECT ?", [(1,)])


def test_what_is_closed(connection: dbapi.Connection) -> None:
    cursor = connection.execute("SELECT 1")
    cursor.close()
    with pytest.raises(ProgrammingError, match="the cursor is closed"):
        cursor.fetchone()
    with pytest.raises(ProgrammingError, match="the cursor is closed"):
        cursor.execute("SELECT 1")
    other = connection.cursor()
    connection.close()
    connection.close()
    for use in (connection.commit, connection.rollback, connection.ping, lambda: other.execute("SELECT 1")):
        with pytest.raises(ClosedError, match="connection"):
            use()


def test_closing_rolls_back_and_frees_the_lock(database: Any) -> None:
    connection = database.connect()
    kept = connection.execute("UPDATE items SET n = 5 RETURNING id")
    connection.close()
    assert not database.locked
    assert database.run("SELECT max(n) FROM items") == [(0,)]
    assert len(kept.fetchall()) == 2


def test_a_panic_frees_the_lock(database: Any) -> None:
    connection = database.connect()
    connection.execute("UPDATE items SET n = 5")
    with pytest.raises(DisconnectError, match="BLOB"):
        connection.execute("SELECT CAST(x'ff41' AS TEXT)")
    assert not database.locked
    with pytest.raises(ClosedError):
        connection.execute("SELECT 1")
    connection.close()


def test_control_in_sql(connection: dbapi.Connection, database: Any) -> None:
    connection.execute("BEGIN IMMEDIATE")
    assert database.locked
    connection.execute("UPDATE items SET n = 1")
    connection.execute("COMMIT")
    assert not database.locked
    connection.execute("UPDATE items SET n = 2")
    connection.execute("ROLLBACK")
    connection.execute("END")
    assert not connection.in_transaction
    assert database.run("SELECT n FROM items") == [(1,), (1,)]
    connection.execute("BEGIN")
    assert connection.in_transaction
    assert not database.locked
    with pytest.raises(OperationalError, match="within a transaction"):
        connection.execute("BEGIN")


def test_savepoints_at_autocommit(database: Any) -> None:
    connection = database.connect(isolation_level="AUTOCOMMIT")
    connection.execute("SAVEPOINT a")
    connection.execute("UPDATE items SET n = 1")
    connection.execute("ROLLBACK TO a")
    connection.execute("UPDATE items SET n = n + 2")
    assert database.run("SELECT n FROM items WHERE id = 1") == [(0,)]
    connection.execute("RELEASE a")
    assert database.run("SELECT n FROM items WHERE id = 1") == [(2,)]
    assert not connection.in_transaction
    connection.close()


def test_unknown_savepoints(connection: dbapi.Connection) -> None:
    for first in (None, "SELECT 1", "UPDATE items SET n = 1"):
        if first:
            connection.execute(first)
        connection.execute("SAVEPOINT a")
        connection.execute('RELEASE "A"')
        for sql in ("RELEASE a", "ROLLBACK TO a"):
            with pytest.raises(OperationalError, match="no such savepoint"):
                connection.execute(sql)
        connection.rollback()


def test_level_can_change_between_transactions_only(connection: dbapi.Connection) -> None:
    connection.execute("SELECT 1")
    with pytest.raises(ProgrammingError, match="isolation level"):
        connection.isolation_level = "IMMEDIATE"
    connection.commit()
    connection.isolation_level = "IMMEDIATE"
    with pytest.raises(ProgrammingError, match="SERIALIZABLE, IMMEDIATE, AUTOCOMMIT"):
        connection.isolation_level = "READ COMMITTED"
    connection.isolation_level = None
    assert connection.isolation_level == "AUTOCOMMIT"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "5", None, True])
def test_timeout_is_checked(database: Any, timeout: object) -> None:
    with pytest.raises(ProgrammingError, match="timeout is a number of seconds"):
        database.connect(timeout=timeout)


def test_foreign_keys_pragma_inside_a_transaction(connection: dbapi.Connection) -> None:
    connection.execute("PRAGMA foreign_keys=OFF")
    assert connection.execute("PRAGMA foreign_keys").fetchall() == [(0,)]
    connection.execute("SELECT 1")
    for sql in ("PRAGMA foreign_keys=ON", "pragma main.foreign_keys(1)"):
        with pytest.raises(ProgrammingError, match="ignores"):
            connection.execute(sql)
    connection.execute("PRAGMA foreign_keys")
    connection.commit()
    connection.execute("PRAGMA foreign_keys=ON")
    assert connection.execute("PRAGMA foreign_keys").fetchall() == [(1,)]


def test_repr_shows_no_secret(tmp_path: Any) -> None:
    connection = dbapi.connect(str(tmp_path / "secret.db"), encryption_key="hunter2")
    assert "hunter2" not in repr(connection)
    assert "hunter2" not in repr(vars(connection)) + repr(connection._transaction.source)  # noqa: SLF001
    connection.execute("CREATE TABLE t (a)")
    connection.commit()
    connection.close()
    with pytest.raises(dbapi.DatabaseError, match=r"secret\.db") as raised:
        dbapi.connect(str(tmp_path / "secret.db"), encryption_key="hunter3")
    assert "hunter" not in str(raised.value)
    with pytest.raises(ProgrammingError, match="nonsense"):
        dbapi.connect(str(tmp_path / "secret.db"), encryption_key="hunter3", nonsense="x")


def test_what_names_a_database(database: Any) -> None:
    connection = dbapi.connect(database.path)
    assert connection.execute("SELECT count(*) FROM items").fetchone() == (2,)
    connection.close()
    for wrong in (None, b"app.db", 5):
        with pytest.raises(ProgrammingError, match="a str or a path"):
            dbapi.connect(wrong)  # type: ignore[arg-type]


def test_data_version_tells_when_somebody_else_has_committed(database: Any, connection: dbapi.Connection) -> None:
    before = connection.data_version()
    connection.execute("UPDATE items SET n = 1 WHERE id = 1")
    connection.commit()
    assert connection.data_version() == before
    other = database.connect()
    other.execute("UPDATE items SET n = 2 WHERE id = 1")
    assert connection.data_version() == before
    other.commit()
    other.close()
    assert connection.data_version() != before
    assert not connection.in_transaction
    connection.close()
    with pytest.raises(ClosedError):
        connection.data_version()
