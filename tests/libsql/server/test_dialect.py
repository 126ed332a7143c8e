"""The dialects of a server: values, results, errors, transactions, each sync and async."""

import asyncio
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from aion_timers import libsql
from aion_timers.libsql.hrana import dbapi
from tests.libsql.conftest import Item, World
from tests.proxy import Proxy

from .conftest import FAR, HeldEnds, ServerDatabase

MakeWorld = Callable[..., World]


def text(sql: str) -> Callable[[sa.Connection], list[Any]]:
    """A body that runs a statement and returns its rows."""

    def body(connection: sa.Connection) -> list[Any]:
        result = connection.exec_driver_sql(sql)
        return [tuple(row) for row in result] if result.returns_rows else []

    return body


def numbers(count: int) -> str:
    """The beginning of a statement: a table ``c`` of the numbers from 1."""
    return f"WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < {count})"


def committed(sql: str) -> Callable[[sa.Connection], None]:
    """A body that runs a statement and commits."""

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql(sql)
        connection.commit()

    return body


# -- URLs --------------------------------------------------------------------------------------------------------------


def test_a_host_makes_the_difference(world: World) -> None:
    assert libsql.is_sound(world.sync_engine.dialect)
    assert world.sync_engine.dialect.driver == world.driver
    assert world.sync_engine.dialect.name == "sqlite"
    assert world.connection(text("SELECT name FROM sqlite_master WHERE name = 'items'")) == [("items",)]
    assert world.sync_engine.dialect.server_version_info >= (3, 45)


def test_the_short_url_is_sync_or_async_as_its_engine_is(database: ServerDatabase) -> None:
    url = f"libsql://{database.address}?tls=0"
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()

    async def read() -> Any:
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            value = await connection.scalar(sa.text("SELECT 1"))
        await engine.dispose()
        return value

    assert asyncio.run(read()) == 1


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("sqlite+libsql://host:8080", "http://host:8080"),
        ("sqlite+libsql://host?secure=true", "https://host"),
        ("sqlite+libsql://[::1]:8080/dev/a?secure=no", "http://[::1]:8080/dev/a"),
        ("libsql://host", "https://host"),
        ("libsql://host?tls=0", "http://host"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    engine = sa.create_engine(url)
    assert engine.dialect.create_connect_args(engine.url)[0] == [address]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+libsql://localhost/?authToken=secret-token",
        "sqlite+libsql://user:secret-token@localhost",
        "libsql://:secret-token@host",
        "libsql://host?authToken=secret-token",
    ],
)
def test_a_token_in_the_url_is_hidden(url: str) -> None:
    engine = sa.create_engine(url)
    _, options = engine.dialect.create_connect_args(engine.url)
    assert options["auth_token"] == "secret-token"  # noqa: S105 - of this test
    assert "secret" not in f"{engine!r} {engine.url} {engine.url!r}"
    # an engine made of this one's URL has it, too
    again = sa.create_engine(engine.url.render_as_string(hide_password=False))
    assert again.dialect.create_connect_args(again.url)[1]["auth_token"] == "secret-token"  # noqa: S105 - of this test


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("sqlite+libsql://host?timeout=soon", "timeout"),
        ("sqlite+libsql://host?isolation_level=CHAOS", "isolation_level"),
        ("sqlite+libsql://host?secure=perhaps", "secure"),
        ("sqlite+libsql://host?mode=ro", "no option 'mode'"),
        ("sqlite+libsql://host?authToken=secret-token", "in the clear"),
        ("sqlite+libsql://:secret-token@host", "in the clear"),
    ],
)
def test_urls_that_are_refused(url: str, match: str) -> None:
    with pytest.raises(sa.exc.ArgumentError, match=match) as caught:
        sa.create_engine(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": -1},
        {"connect_timeout": 0},
        {"read_timeout": float("inf")},
        {"request_timeout": "1"},
        {"isolation_level": "CHAOS"},
        {"auth_token": "a b"},
    ],
)
def test_options_that_are_refused(database: ServerDatabase, options: dict[str, Any]) -> None:
    with pytest.raises(libsql.ProgrammingError, match=next(iter(options)).replace("isolation_", "")):
        database.connect(**options)


def test_options_of_the_url(make_world: MakeWorld, database: ServerDatabase) -> None:
    world = make_world(f"{database.address}?timeout=1.5&isolation_level=IMMEDIATE&read_timeout=20")

    def body(connection: sa.Connection) -> tuple[Any, Any]:
        raw: Any = connection.connection.dbapi_connection
        return raw.timeout, raw.isolation_level

    assert world.connection(body) == (1.5, "IMMEDIATE")


def test_without_httpx(run_python: Any) -> None:
    code = (
        "import sys; sys.modules['httpx'] = None; import aion_timers, sqlalchemy\n"
        "sqlalchemy.create_engine('sqlite+libsql:///:memory:')\n"
        "try: sqlalchemy.create_engine('sqlite+libsql://localhost')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert "aion-timers[server]" in run_python(code)


def test_without_the_driver(run_python: Any, database: ServerDatabase) -> None:
    code = (
        "import sys; sys.modules['libsql_experimental'] = sys.modules['sqlalchemy_libsql'] = None\n"
        "import aion_timers, sqlalchemy\n"
        f"engine = sqlalchemy.create_engine('sqlite+libsql://{database.address}')\n"
        "with engine.connect() as connection: print(connection.scalar(sqlalchemy.text('SELECT 42')))\n"
        "engine.dispose()"
    )
    assert run_python(code) == "42"


# -- values and results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        2**31,
        2**53 + 1,
        2**63 - 1,
        -(2**63),
        1.5,
        -0.0,
        1e300,
        "",
        "a\0b",
        "é😀",
        pytest.param(b"", id="no bytes"),
        b"\0\xff",
        pytest.param("x" * 10**6, id="long"),
    ],
)
def test_values_come_back(world: World, value: object) -> None:
    def body(connection: sa.Connection) -> Any:
        connection.exec_driver_sql("CREATE TABLE anything (value)")
        connection.exec_driver_sql("INSERT INTO anything VALUES (?)", (value,))
        return connection.exec_driver_sql("SELECT value, typeof(value) FROM anything").one()

    stored, kind = world.connection(body)
    assert (type(stored), stored) == (type(value), value)
    expected = {type(None): "null", int: "integer", float: "real", str: "text", bytes: "blob"}[type(value)]
    assert kind == expected


def test_an_infinite_number_can_be_neither_sent_nor_read(world: World) -> None:
    def body(connection: sa.Connection) -> list[Any]:
        connection.exec_driver_sql("UPDATE items SET n = 7 WHERE id = 1")
        with pytest.raises(sa.exc.DataError, match="JSON"):
            connection.exec_driver_sql("SELECT ?", (float("inf"),))
        with pytest.raises(sa.exc.DataError, match="CAST"):
            connection.exec_driver_sql("SELECT 9e999")
        # neither has cost the transaction
        connection.commit()
        return connection.exec_driver_sql("SELECT n, CAST(9e999 AS TEXT) FROM items WHERE id = 1").all()

    assert world.connection(body) == [(7, "Inf")]


def test_returns_rows_and_rowcount(world: World) -> None:
    def body(connection: sa.Connection) -> list[Any]:
        facts: list[Any] = []
        for sql in (
            "INSERT INTO items (id, n) VALUES (10, 0), (11, 0)",
            "UPDATE items SET n = 1 WHERE id >= 10 RETURNING id",
            "DELETE FROM items WHERE id = 99",
            "SELECT id FROM items WHERE id = 99",
            "CREATE INDEX by_n ON items (n)",
        ):
            result = connection.exec_driver_sql(sql)
            facts.append((result.returns_rows, result.rowcount, result.all() if result.returns_rows else None))
        return facts

    assert world.connection(body) == [
        (False, 2, None),
        (True, 2, [(10,), (11,)]),
        (False, 0, None),
        (True, -1, []),
        (False, -1, None),
    ]


def test_executemany_is_one_round_trip(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy) -> None:
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> int:
        before = proxy.requests
        result = connection.execute(
            sa.text("INSERT INTO items (id, n) VALUES (:id, :n)"), [{"id": 10 + one, "n": one} for one in range(400)]
        )
        assert proxy.requests - before == 1
        connection.commit()
        assert proxy.requests - before == 2
        return result.rowcount

    assert world.connection(body) == 400
    assert database.run("SELECT count(*), sum(n) FROM items WHERE id >= 10") == [(400, sum(range(400)))]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
def test_executemany_stops_at_an_error(world: World, database: ServerDatabase, level: str) -> None:
    def body(connection: sa.Connection) -> None:
        rows = [(one,) for one in (10, 11, 10, 12)]
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql("INSERT INTO items (id, n) VALUES (?, 0)", rows)
        connection.rollback()

    world.connection(body, isolation_level=level)
    expected = [(1,), (2,), (10,), (11,)] if level == "AUTOCOMMIT" else [(1,), (2,)]
    assert database.run("SELECT id FROM items ORDER BY id") == expected


def test_many_rows(world: World) -> None:
    numbers = (
        "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 100000) SELECT i, 'row ' || i FROM c"
    )
    rows = world.connection(text(numbers))
    assert len(rows) == 100_000
    assert rows[-1] == (100_000, "row 100000")


def test_a_result_that_is_too_large_says_what_to_do(world: World) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = 7 WHERE id = 1")
        with pytest.raises(sa.exc.OperationalError, match="--max-response-size") as caught:
            connection.exec_driver_sql(f"{numbers(40)} SELECT i, zeroblob(500000) FROM c")
        assert caught.value.orig is not None
        assert caught.value.orig.code == "RESPONSE_TOO_LARGE"  # type: ignore[attr-defined] # an error of ours
        connection.rollback()

    world.connection(body)
    assert world.connection(text("SELECT n FROM items WHERE id = 1")) == [(0,)]


def test_async_stream(database: ServerDatabase) -> None:
    async def read() -> list[Any]:
        engine = create_async_engine(f"sqlite+aiolibsql://{database.address}")
        async with engine.connect() as connection:
            result = await connection.stream(sa.text("SELECT id FROM items ORDER BY id"))
            rows = [tuple(row) async for row in result]
        await engine.dispose()
        return rows

    assert asyncio.run(read()) == [(1,), (2,)]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "error", "code"),
    [
        ("INSERT INTO items (id, n) VALUES (1, 0)", sa.exc.IntegrityError, "SQLITE_CONSTRAINT"),
        ("INSERT INTO items (id, n) VALUES (1, 0) RETURNING id", sa.exc.IntegrityError, "SQLITE_CONSTRAINT"),
        ("INSERT INTO items (id) VALUES (3)", sa.exc.IntegrityError, "SQLITE_CONSTRAINT"),
        ("INSERT INTO items (id, n) VALUES ('x', 0)", sa.exc.IntegrityError, "SQLITE_MISMATCH"),
        ("SELECT * FROM absent", sa.exc.OperationalError, "SQLITE_UNKNOWN"),
        ("SELEC 1", sa.exc.OperationalError, "SQL_PARSE_ERROR"),
        ("VACUUM", sa.exc.OperationalError, "SQL_PARSE_ERROR"),
        ("", sa.exc.ProgrammingError, "SQL_NO_STATEMENT"),
    ],
)
def test_errors_are_raised_in_execute_and_keep_their_code(world: World, sql: str, error: Any, code: str) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = 7 WHERE id = 1")
        with pytest.raises(error) as caught:
            connection.exec_driver_sql(sql)
        assert caught.value.orig.code == code
        # a statement that failed leaves the transaction open
        connection.commit()

    world.connection(body)
    assert world.connection(text("SELECT n FROM items WHERE id = 1")) == [(7,)]


@pytest.mark.parametrize("sql", ["SELECT 1; SELECT 2", "SELECT :a", "SELECT ?"])
def test_mistakes_do_not_reach_the_server(
    make_world: MakeWorld, database: ServerDatabase, proxy: Proxy, sql: str
) -> None:
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> None:
        before = proxy.requests
        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql(sql)
        assert proxy.requests == before

    world.connection(body)


def test_sqlite_rolls_back_by_itself(world: World, database: ServerDatabase) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = 7")
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql("INSERT OR ROLLBACK INTO items (id, n) VALUES (1, 0)")
        with pytest.raises(sa.exc.OperationalError, match="rolled back after an error"):
            connection.exec_driver_sql("UPDATE items SET n = 8")
        with pytest.raises(sa.exc.OperationalError, match="nothing was committed"):
            connection.commit()

    world.connection(body)
    assert database.run("SELECT DISTINCT n FROM items") == [(0,)]


def test_what_is_closed(database: ServerDatabase) -> None:
    connection = database.connect()
    cursor = connection.cursor()
    cursor.close()
    with pytest.raises(libsql.ProgrammingError, match="cursor is closed"):
        cursor.execute("SELECT 1")
    connection.close()
    connection.close()
    for use in (connection.commit, connection.rollback, connection.ping, lambda: connection.execute("SELECT 1")):
        with pytest.raises(libsql.ClosedError):
            use()


def test_two_phase_is_not_supported(world: World) -> None:
    with pytest.raises(NotImplementedError):
        world.connection(lambda connection: connection.begin_twophase())


def test_repr_shows_no_secret(database: ServerDatabase) -> None:
    connection = database.connect(auth_token="secret-token")  # noqa: S106 - of this test
    assert repr(connection) == f"<libSQL connection to http://{database.address}>"
    connection.close()


def test_a_server_is_not_synchronized(database: ServerDatabase) -> None:
    connection = database.connect()
    with pytest.raises(libsql.NotSupportedError, match="replica"):
        connection.sync()
    connection.close()


def test_a_listener_may_begin_a_transaction_before_sqlalchemy_looks_at_the_server(database: ServerDatabase) -> None:
    engine = sa.create_engine(f"sqlite+libsql://{database.address}")
    sa.event.listen(engine, "connect", lambda one, _: one.execute("SELECT 1"), insert=True)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM items").scalar() == 2
    engine.dispose()


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "statements", "trips"),
    [
        ("AUTOCOMMIT", ["SELECT 1"], [1, 0]),
        ("AUTOCOMMIT", ["UPDATE items SET n = 1", "SELECT 1"], [1, 1, 0]),
        ("AUTOCOMMIT", ["SAVEPOINT a", "UPDATE items SET n = 1", "RELEASE a"], [1, 1, 1, 0]),
        ("SERIALIZABLE", ["SELECT 1"], [1, 0]),
        ("SERIALIZABLE", ["SELECT 1", "SELECT 2"], [1, 1, 0]),
        ("SERIALIZABLE", ["UPDATE items SET n = 1"], [1, 1]),
        ("SERIALIZABLE", ["SELECT 1", "UPDATE items SET n = 1"], [1, 1, 1]),
        ("SERIALIZABLE", ["SAVEPOINT a", "UPDATE items SET n = 1", "RELEASE a"], [0, 1, 1, 1]),
        ("SERIALIZABLE", ["SAVEPOINT a", "RELEASE a"], [0, 0, 0]),
        ("IMMEDIATE", ["SELECT 1"], [1, 1]),
        ("IMMEDIATE", ["PRAGMA table_info(items)"], [1, 0]),
    ],
)
def test_round_trips(
    make_world: MakeWorld,
    database: ServerDatabase,
    proxy: Proxy,
    *,
    level: str,
    statements: list[str],
    trips: list[int],
) -> None:
    proxy.delay = FAR
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> list[int]:
        counts = [ends.others]
        for sql in statements:
            connection.exec_driver_sql(sql)
            counts.append(ends.others)
        connection.commit()
        counts.append(ends.others)
        return [after - before for before, after in pairwise(counts)]

    world.connection(lambda _: None)
    with HeldEnds(proxy) as ends:
        assert world.connection(body, isolation_level=level) == trips


def test_http_connections_are_reused_and_closed(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy) -> None:
    world = make_world(database.behind(proxy))
    for _ in range(5):
        world.connection(committed("UPDATE items SET n = n + 1"))
    assert proxy.connections == 1
    assert database.run("SELECT n FROM items WHERE id = 1") == [(5,)]


# -- transactions ------------------------------------------------------------------------------------------------------


def test_levels(make_world: MakeWorld, database: ServerDatabase) -> None:
    world = make_world(database.address, isolation_level="IMMEDIATE")

    def level(connection: sa.Connection) -> str:
        return str(connection.get_isolation_level())

    assert world.connection(level) == "IMMEDIATE"
    assert world.connection(level, isolation_level="AUTOCOMMIT") == "AUTOCOMMIT"
    assert world.connection(level) == "IMMEDIATE"

    def change_inside(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(libsql.ProgrammingError, match="inside a transaction"):
            connection.connection.dbapi_connection.isolation_level = "AUTOCOMMIT"  # type: ignore[union-attr] # ours

    world.connection(change_inside)


def test_a_transaction_reads_one_state(world: World, database: ServerDatabase) -> None:
    def body(connection: sa.Connection) -> list[Any]:
        before = text("SELECT n FROM items")(connection)
        database.run("UPDATE items SET n = 7")
        return before + text("SELECT n FROM items")(connection)

    assert world.connection(body) == [(0,)] * 4


def test_what_is_not_committed_is_rolled_back(world: World, database: ServerDatabase) -> None:
    world.connection(text("UPDATE items SET n = 7"))
    assert database.run("SELECT DISTINCT n FROM items") == [(0,)]
    world.connection(committed("UPDATE items SET n = 7"))
    assert database.run("SELECT DISTINCT n FROM items") == [(7,)]


def test_savepoints(world: World, database: ServerDatabase) -> None:
    def body(session: Session) -> None:
        with session.begin_nested():
            session.add(Item(id=10, n=0))
        with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
            session.execute(sa.insert(Item).values(id=1, n=0))
        with session.begin_nested() as nested:
            session.add(Item(id=11, n=0))
            nested.rollback()
        session.commit()
        with session.begin_nested():
            session.add(Item(id=12, n=0))
        session.rollback()

    world.session(body)
    assert database.run("SELECT id FROM items ORDER BY id") == [(1,), (2,), (10,)]


def test_savepoints_and_begin_in_sql_at_autocommit(database: ServerDatabase) -> None:
    connection = database.connect(isolation_level=None)
    connection.execute("SAVEPOINT a")
    connection.execute("UPDATE items SET n = 1")
    connection.execute("SAVEPOINT b")
    connection.execute("UPDATE items SET n = 2")
    connection.execute("ROLLBACK TO b")
    assert connection.in_transaction
    connection.execute("RELEASE a")
    assert not connection.in_transaction
    assert database.run("SELECT DISTINCT n FROM items") == [(1,)]
    connection.execute("BEGIN")
    connection.execute("UPDATE items SET n = 3")
    connection.execute("ROLLBACK")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE items SET n = 4 WHERE id = 1")
    with pytest.raises(libsql.OperationalError, match="within a transaction"):
        connection.execute("BEGIN")
    connection.execute("COMMIT")
    with pytest.raises(libsql.OperationalError, match="savepoint"):
        connection.execute("RELEASE a")
    connection.close()
    assert database.run("SELECT n FROM items ORDER BY id") == [(4,), (1,)]


def test_schema_changes_are_transactional(world: World, database: ServerDatabase) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE halfway (id INTEGER)")
        with pytest.raises(sa.exc.OperationalError):
            connection.exec_driver_sql("CREATE TABLE items (id INTEGER)")
        connection.rollback()

    world.connection(body)
    assert database.run("SELECT name FROM sqlite_master WHERE name = 'halfway'") == []


def test_a_commit_that_fails_is_over(world: World, database: ServerDatabase) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE parts (item REFERENCES items DEFERRABLE INITIALLY DEFERRED)")
        connection.commit()
        connection.exec_driver_sql("INSERT INTO parts VALUES (99)")
        with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
            connection.commit()
        connection.rollback()
        connection.exec_driver_sql("INSERT INTO parts VALUES (1)")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT item FROM parts") == [(1,)]


def test_foreign_keys_can_be_switched_off_and_deferred(world: World, database: ServerDatabase) -> None:
    database.run("CREATE TABLE parts (item REFERENCES items)")

    def body(connection: sa.Connection) -> list[Any]:
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        connection.exec_driver_sql("INSERT INTO parts VALUES (3)")
        connection.exec_driver_sql("INSERT INTO items (id, n) VALUES (3, 0)")
        connection.commit()
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql("INSERT INTO parts VALUES (99)")
        with pytest.raises(sa.exc.ProgrammingError, match="inside a transaction"):
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.rollback()
        # for every transaction from now on, though each of them is another stream
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        for _ in range(2):
            connection.exec_driver_sql("INSERT INTO parts VALUES (99)")
            connection.commit()
        off = text("PRAGMA foreign_keys")(connection)
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        return off + text("PRAGMA foreign_keys")(connection)

    assert world.connection(body) == [(0,), (1,)]
    assert database.run("SELECT item FROM parts ORDER BY item") == [(3,), (99,), (99,)]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"])
@pytest.mark.parametrize("read_first", [False, True])
def test_a_dropped_table_takes_no_rows_of_others_with_it(
    world: World, database: ServerDatabase, level: str, read_first: bool
) -> None:
    database.run("CREATE TABLE parts (item REFERENCES items ON DELETE CASCADE)")
    database.run("INSERT INTO parts VALUES (1)")

    def body(connection: sa.Connection) -> None:
        if read_first:
            connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sa.exc.IntegrityError, match="parts"):
            connection.exec_driver_sql("DROP TABLE items")
        connection.rollback()
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("DROP TABLE items")
        connection.commit()

    world.connection(body, isolation_level=level)
    assert database.run("SELECT item FROM parts") == [(1,)]


def test_busy_timeout(world: World) -> None:
    def body(connection: sa.Connection) -> list[Any]:
        connection.exec_driver_sql("PRAGMA busy_timeout = 2500")
        return text("PRAGMA busy_timeout")(connection)

    assert world.connection(body) == [(2500,)]


def test_another_row_was_written(world: World, database: ServerDatabase) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SAVEPOINT a")
        assert text("SELECT n FROM items WHERE id = 1")(connection) == [(0,)]
        database.run("UPDATE items SET n = 5 WHERE id = 2")
        connection.exec_driver_sql("UPDATE items SET n = n + 1")
        connection.exec_driver_sql("RELEASE a")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items ORDER BY id") == [(1,), (6,)]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ("SELECT n FROM items WHERE id = 1", "other rows"),
        ("SELECT count(*) FROM items", "other rows"),
        ("SELECT random(), n FROM items", "other rows"),
        (
            f"{numbers(1001)} SELECT i, n FROM c, items LIMIT 1001",
            "1000 rows",
        ),
    ],
)
def test_what_was_read_was_written(world: World, database: ServerDatabase, read: str, reason: str) -> None:
    def body(connection: sa.Connection) -> None:
        text(read)(connection)
        database.run("INSERT INTO items (id, n) VALUES (3, 0)")
        database.run("UPDATE items SET n = 5 WHERE id = 1")
        with pytest.raises(sa.exc.OperationalError, match=reason) as caught:
            connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        assert isinstance(caught.value.orig, libsql.SnapshotError)
        with pytest.raises(sa.exc.OperationalError, match="call rollback"):
            connection.exec_driver_sql("SELECT 1")
        connection.rollback()
        connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n FROM items WHERE id = 1") == [(6,)]


def test_a_first_write_waits_for_a_writer(world: World, database: ServerDatabase) -> None:
    writer = database.connect()
    writer.execute("UPDATE items SET n = 10 WHERE id = 1")
    thread = threading.Timer(0.3, writer.commit)
    thread.start()
    world.connection(committed("UPDATE items SET n = n + 1 WHERE id = 1"))
    thread.join()
    writer.close()
    assert database.run("SELECT n FROM items WHERE id = 1") == [(11,)]


def test_no_update_is_lost(world: World, database: ServerDatabase) -> None:
    def increments() -> None:
        connection = database.connect(isolation_level="IMMEDIATE")
        for _ in range(20):
            ((n,),) = connection.execute("SELECT n FROM items WHERE id = 1").fetchall()
            connection.execute("UPDATE items SET n = ? WHERE id = 1", (n + 1,))
            connection.commit()
        connection.close()

    def body(connection: sa.Connection) -> None:
        done = 0
        while done < 20:
            try:
                n = connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar_one()
                connection.exec_driver_sql("UPDATE items SET n = ? WHERE id = 1", (n + 1,))
                connection.commit()
            except sa.exc.OperationalError as error:
                if not isinstance(error.orig, libsql.SnapshotError):
                    raise
                connection.rollback()
            else:
                done += 1

    threads = [threading.Thread(target=increments) for _ in range(3)]
    for thread in threads:
        thread.start()
    world.connection(body)
    for thread in threads:
        thread.join()
    assert database.run("SELECT n FROM items WHERE id = 1") == [(80,)]


def test_readers_do_not_stop_a_writer(world: World, database: ServerDatabase) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT * FROM items")
        began = time.monotonic()
        database.run("UPDATE items SET n = 7")
        assert time.monotonic() - began < 5

    world.connection(body)


def test_typed_columns(world: World) -> None:
    metadata = sa.MetaData()
    table = sa.Table(
        "typed",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("price", sa.Numeric(10, 2)),
        sa.Column("data", sa.LargeBinary),
        sa.Column("facts", sa.JSON),
        sa.Column("flag", sa.Boolean),
        sa.Column("big", sa.BigInteger),
    )
    row = {"price": Decimal("1.25"), "data": b"\0\xff", "facts": {"a": [1, None]}, "flag": True, "big": 2**62 + 1}

    def body(connection: sa.Connection) -> tuple[Any, list[str]]:
        metadata.create_all(connection)
        key = connection.execute(sa.insert(table).values(row)).inserted_primary_key
        assert key == (1,)
        found = connection.execute(sa.select(table)).mappings().one()
        return dict(found), [column["name"] for column in sa.inspect(connection).get_columns("typed")]

    found, columns = world.connection(body)
    assert found == {"id": 1} | row
    assert columns == ["id", *row]


def test_executemany_is_for_writing(database: ServerDatabase) -> None:
    connection = database.connect()
    with pytest.raises(libsql.ProgrammingError, match="executemany"):
        connection.cursor().executemany("SELECT ?", [(1,)])
    connection.close()
    assert dbapi.paramstyle == "qmark"
