"""What a SQLAlchemy application sees beside transactions: URLs, values, errors, pools; sync and async."""

import asyncio
import datetime as dt
import gc
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DataError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy_libsql.libsql import SQLiteDialect_libsql

import aion_timers.libsql
from aion_timers.libsql import DisconnectError, SnapshotError, dbapi, is_sound


def scalar(sql: str) -> Callable[[sa.Connection], Any]:
    return lambda connection: connection.exec_driver_sql(sql).scalar()


def test_the_usual_url_gives_a_sound_dialect(world: Any) -> None:
    assert is_sound(world.sync_engine.dialect)
    assert world.sync_engine.dialect.driver == world.driver
    assert world.sync_engine.dialect.name == "sqlite"
    world.connection(scalar("SELECT 1"))
    assert world.sync_engine.dialect.server_version_info == (3, 45, 1)


def test_other_dialects_are_not_sound() -> None:
    assert not is_sound(SQLiteDialect_libsql())
    assert not is_sound(sa.make_url("sqlite://").get_dialect()())


def test_registering_again_changes_nothing(world: Any) -> None:
    aion_timers.libsql.register()
    assert sa.make_url(f"sqlite+{world.driver}://").get_dialect() is type(world.sync_engine.dialect)


def test_wal_and_full_are_the_defaults(make_world: Any, database: Any) -> None:
    assert database.run("PRAGMA journal_mode") == [("wal",)]
    assert make_world(database.path).connection(scalar("PRAGMA synchronous")) == 2
    assert make_world(database.path, synchronous="NORMAL").connection(scalar("PRAGMA synchronous")) == 1
    with pytest.raises(ArgumentError, match="FULL or NORMAL, not 'OFF'"):
        make_world(database.path, synchronous="OFF")


def test_timeout_of_url_and_connect_args(make_world: Any, database: Any) -> None:
    def timeout(connection: sa.Connection) -> float:
        driver: dbapi.Connection = connection.connection.driver_connection  # type: ignore[assignment]
        return driver.timeout

    assert make_world(database.path).connection(timeout) == dbapi.DEFAULT_TIMEOUT
    assert make_world(f"{database.path}?timeout=5").connection(timeout) == 5.0
    assert make_world(database.path, connect_args={"timeout": 6}).connection(timeout) == 6.0
    for wrong in ("soon", "-1", "nan"):
        with pytest.raises(ArgumentError, match=f"seconds, 0 or more, not '{wrong}'"):
            make_world(f"{database.path}?timeout={wrong}").connection(timeout)
    with pytest.raises(ProgrammingError, match="not 'soon'"):
        make_world(database.path, connect_args={"timeout": "soon"}).connection(timeout)


def test_values(world: Any) -> None:
    everything = sa.Table(
        "everything",
        sa.MetaData(),
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("big", sa.BigInteger),
        sa.Column("blob", sa.LargeBinary),
        sa.Column("at", sa.DateTime),
        sa.Column("day", sa.Date),
        sa.Column("document", sa.JSON),
        sa.Column("flag", sa.Boolean),
        sa.Column("price", sa.Numeric(10, 2, asdecimal=False)),
        sa.Column("text", sa.String),
    )
    rows = [
        {
            "id": uuid.UUID(int=n),
            "big": big,
            "blob": bytes([0, n]),
            "at": dt.datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001 - what the column type takes
            "day": dt.date(2026, 1, 2),
            "document": {"a": [1, None]},
            "flag": True,
            "price": 1.25,
            "text": "ü?'",
        }
        for n, big in enumerate([2**63 - 1, -(2**63), 2**53 + 1, 2**31, 0])
    ]

    def body(connection: sa.Connection) -> None:
        everything.create(connection)
        connection.execute(everything.insert(), rows)
        connection.commit()
        found = connection.execute(everything.select().order_by(everything.c.id)).mappings().all()
        assert [dict(row) for row in found] == rows
        for row in rows:
            assert connection.scalar(sa.select(everything.c.id).where(everything.c.big == row["big"])) == row["id"]
        returned = connection.execute(everything.update().values(big=1).returning(everything.c.id))
        assert len(returned.all()) == len(rows)

    world.connection(body)


def test_refused_values(world: Any, model: Any) -> None:
    for values, error in (
        ({"name": "a\0b"}, DataError),
        ({"n": 2**63}, DataError),
        ({"name": "\ud800"}, DataError),
        ({"name": dt.date(2026, 1, 2)}, ProgrammingError),
    ):
        with pytest.raises(error):
            world.connection(lambda c, values=values: c.execute(sa.insert(model).values(values)))


def test_returns_rows_and_rowcount(world: Any, model: Any) -> None:
    def body(connection: sa.Connection) -> None:
        inserted = connection.execute(sa.insert(model).values(name="a", n=1))
        assert not inserted.returns_rows
        assert inserted.rowcount == 1
        assert inserted.inserted_primary_key == (3,)
        with pytest.raises(sa.exc.ResourceClosedError):
            inserted.fetchall()
        assert connection.execute(sa.insert(model), [{"n": 0}, {"n": 0}]).rowcount == 2
        assert connection.execute(sa.update(model).values(n=2).returning(model.id)).rowcount == 5
        assert connection.execute(sa.delete(model).where(model.id < 0)).rowcount == 0

    world.connection(body)


def test_a_failing_returning_raises_in_execute(world: Any, database: Any, model: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.execute(sa.insert(model).values(id=3, n=0))
        with pytest.raises(IntegrityError) as raised:
            connection.execute(sa.insert(model).values(id=1, n=0).returning(model.id))
        assert isinstance(raised.value.orig, aion_timers.libsql.IntegrityError)
        connection.rollback()

    world.connection(body)
    assert database.run("SELECT count(*) FROM items") == [(2,)]


def test_reflection(world: Any) -> None:
    inspector = world.connection(
        lambda c: (
            sa.inspect(c).get_table_names(),
            [column["name"] for column in sa.inspect(c).get_columns("items")],
            sa.inspect(c).get_pk_constraint("items")["constrained_columns"],
        )
    )
    assert inspector == (["items"], ["id", "name", "n", "data"], ["id"])


def test_a_panic_is_a_disconnect_and_the_pool_heals(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_size=1, max_overflow=0)
    for level in ("SERIALIZABLE", "AUTOCOMMIT"):
        with pytest.raises(OperationalError) as raised:
            world.connection(
                scalar("SELECT CAST(x'ff41' AS TEXT) UNION ALL SELECT name FROM items"), isolation_level=level
            )
        assert isinstance(raised.value.orig, DisconnectError)
        assert raised.value.connection_invalidated
        assert world.connection(scalar("SELECT count(*) FROM items")) == 2
        database.run("UPDATE items SET n = n + 1")
        del raised
        gc.collect()
        world.connection(
            lambda c: c.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all(), isolation_level="AUTOCOMMIT"
        )
        assert database.run("PRAGMA wal_checkpoint(TRUNCATE)") == [(0, 0, 0)]


def test_a_connection_that_was_closed_behind_the_pool_is_replaced(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_size=1, max_overflow=0)

    def close(connection: sa.Connection) -> None:
        connection.connection.driver_connection.close()  # type: ignore[union-attr]
        connection.exec_driver_sql("SELECT 1")

    with pytest.raises(sa.exc.DBAPIError) as raised:
        world.connection(close)
    assert raised.value.connection_invalidated
    assert world.connection(scalar("SELECT 1")) == 1


def test_pre_ping_begins_nothing(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_pre_ping=True, pool_size=1, max_overflow=0, isolation_level="IMMEDIATE")
    for _ in range(3):
        world.connection(lambda _: pytest.fail("locked") if database.locked else None)
        world.connection(scalar("SELECT 1"))


def test_the_pool_rolls_back(make_world: Any, database: Any) -> None:
    world = make_world(database.path, pool_size=1, max_overflow=0)
    world.connection(scalar("UPDATE items SET n = 5 RETURNING n"))
    assert not database.locked
    assert world.connection(scalar("SELECT max(n) FROM items")) == 0


def test_two_phase_is_not_supported(world: Any) -> None:
    with pytest.raises(NotImplementedError):
        world.connection(lambda c: c.begin_twophase())


@pytest.mark.parametrize(
    ("sql", "parameters", "message"),
    [
        ("DELETE FROM items ORDER BY id LIMIT 1", (), "syntax error"),
        ("SELECT pow(2, 3)", (), "no such function"),
        ('SELECT "abc"', (), "no such column"),
        (f"SELECT {', '.join('?' * 32_767)}", tuple(range(32_767)), "too many SQL variables"),
        ("SELECT 'a' LIKE ?", ("a" * 50_001,), "pattern too complex"),
        ("SELECT load_extension('x')", (), "no such function|not authorized"),
    ],
    ids=["DELETE with LIMIT", "mathematics", "double quotes", "parameters", "LIKE", "extensions"],
)
def test_limits(world: Any, sql: str, parameters: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OperationalError, match=message):
        world.connection(lambda c: c.exec_driver_sql(sql, parameters))


def test_just_inside_the_limits(world: Any) -> None:
    many = tuple(range(32_766))
    values = f"VALUES {', '.join(['(?)'] * len(many))}"
    assert len(world.connection(lambda c: c.exec_driver_sql(values, many).all())) == len(many)
    assert world.connection(lambda c: c.exec_driver_sql("SELECT 'a' LIKE ?", ("a" * 50_000,)).scalar()) == 0


def test_a_copy_of_a_file_that_is_in_use(make_world: Any, world: Any, database: Any, tmp_path: Path) -> None:
    with database.held():  # by one whose change is not committed
        world.connection(
            lambda c: c.exec_driver_sql("VACUUM INTO ?", (str(tmp_path / "copy.db"),)), isolation_level="AUTOCOMMIT"
        )
    assert make_world(tmp_path / "copy.db").connection(scalar("SELECT max(n) FROM items")) == 0


# -- connecting ------------------------------------------------------------------------------------


def connect_error(make_world: Any, url: object) -> str:
    with pytest.raises(sa.exc.DBAPIError) as raised:
        make_world(url).connection(scalar("SELECT 1"))
    return str(raised.value.orig)


def test_missing_directory(make_world: Any, tmp_path: Any) -> None:
    message = connect_error(make_world, tmp_path / "no" / "app.db")
    assert str(tmp_path / "no" / "app.db") in message
    assert "doesn't exist; create it" in message


def test_a_directory(make_world: Any, tmp_path: Any) -> None:
    assert f"{tmp_path} can't be opened: it is a directory" in connect_error(make_world, tmp_path)


def test_not_a_database(make_world: Any, tmp_path: Any) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear reader, " * 100)
    message = connect_error(make_world, path)
    assert str(path) in message
    assert "check the path and the key" in message


def test_the_switch_to_wal_waits_for_a_writer(make_world: Any, database: Any) -> None:
    database.run("PRAGMA journal_mode=DELETE")
    holder = database.connect()
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("UPDATE items SET n = 5")
    with pytest.raises(OperationalError, match="database is locked"):
        make_world(f"{database.path}?timeout=0.1").connection(scalar("SELECT 1"))
    timer = threading.Timer(0.2, holder.commit)
    timer.start()
    assert make_world(database.path).connection(scalar("PRAGMA journal_mode")) == "wal"
    timer.join()
    holder.close()
    assert database.run("SELECT n FROM items") == [(5,), (5,)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


READ_ONLY = """
import os, sys
import sqlalchemy as sa
import aion_timers.libsql
from aion_timers.libsql import dbapi

path, wal, locked = sys.argv[1:]
connection = dbapi.connect(path)
if wal == "no":
    connection.execute("PRAGMA journal_mode=DELETE")
connection.execute("CREATE TABLE t (a)")
connection.commit()
connection.close()
os.chmod(path, 0o444)
if locked == "directory":
    os.chmod(os.path.dirname(path), 0o555)
aion_timers.libsql.register()
engine = sa.create_engine(f"sqlite+libsql:///{path}")
unchanging = sa.create_engine(f"sqlite+libsql:///file:{path}?immutable=1&uri=true")
if os.getuid() == 0:
    os.setuid(65534)
try:
    with engine.connect() as connection:
        print(connection.exec_driver_sql("SELECT count(*) FROM t").scalar())
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
except sa.exc.DBAPIError as error:
    print(error.orig)
if locked == "directory":
    with unchanging.connect() as connection:
        print(connection.exec_driver_sql("SELECT count(*) FROM t").scalar())
"""


@pytest.mark.parametrize("wal", ["wal", "no"])
@pytest.mark.parametrize("locked", ["file", "directory"])
def test_read_only_file(run_python: Any, folder: Path, wal: str, locked: str) -> None:
    lines = run_python(READ_ONLY, folder / "app.db", wal, locked).splitlines()
    if (wal, locked) == ("wal", "directory"):
        assert f"{folder}/app.db can't be read: it is in WAL mode" in lines[0]
        assert "immutable=1" in lines[0]
        assert lines[1] == "0"
    else:
        assert lines[0] == "0"
        assert f"{folder}/app.db can't be written; let this user write to the file" in lines[1]


MISSING = """
import sys
import sqlalchemy as sa

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import aion_timers.libsql
from aion_timers.libsql import SnapshotError, is_sound
aion_timers.libsql.register()
print(is_sound(sa.create_engine("sqlite://").dialect))
from sqlalchemy.ext.asyncio import create_async_engine
for create, driver in ((sa.create_engine, "libsql"), (create_async_engine, "aiolibsql")):
    try:
        create(f"sqlite+{driver}://")
        print("made")
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("missing", ["libsql_experimental", "sqlalchemy_libsql"])
def test_without_the_driver(run_python: Any, missing: str) -> None:
    sound, *errors = run_python(MISSING, missing).splitlines()
    assert sound == "False"
    for error in errors:
        for part in ("pip install sqlalchemy-libsql", "Linux on x86-64 with glibc", "macOS", "3.13"):
            assert part in error


def test_without_aiosqlite(run_python: Any) -> None:
    assert run_python(MISSING, "aiosqlite").splitlines() == ["False", "made", "made"]


# -- async only ------------------------------------------------------------------------------------


def test_async_errors_are_the_same_classes(database: Any, model: Any) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiolibsql:///{database.path}")
        async with AsyncSession(engine) as session:
            item = await session.get(model, 1)
            assert item
            database.run("UPDATE items SET n = n + 1")
            item.n = 5
            with pytest.raises(OperationalError) as raised:
                await session.flush()
            assert type(raised.value.orig) is SnapshotError
        await engine.dispose()

    asyncio.run(run())


def test_async_stream(database: Any) -> None:
    async def run() -> list[int]:
        engine = create_async_engine(f"sqlite+aiolibsql:///{database.path}")
        async with engine.connect() as connection:
            result = await connection.stream(sa.text("SELECT id FROM items ORDER BY id"))
            found = [row.id async for row in result]
        await engine.dispose()
        return found

    assert asyncio.run(run()) == [1, 2]


def test_the_event_loop_runs_while_a_task_waits_for_the_lock(database: Any) -> None:
    async def run() -> int:
        engine = create_async_engine(f"sqlite+aiolibsql:///{database.path}")
        with database.writer(0.5):
            beats = 0

            async def beat() -> None:
                nonlocal beats
                while True:
                    await asyncio.sleep(0.005)
                    beats += 1

            heart = asyncio.create_task(beat())
            async with engine.begin() as connection:
                await connection.exec_driver_sql("UPDATE items SET n = 5")
            heart.cancel()
        await engine.dispose()
        return beats

    assert asyncio.run(run()) > 10


def test_a_cancelled_task_stops_waiting_for_the_lock(database: Any) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiolibsql:///{database.path}", pool_size=1, max_overflow=0)

        async def write() -> None:
            async with engine.begin() as connection:
                await connection.exec_driver_sql("UPDATE items SET n = n + 100")

        with database.held():
            task = asyncio.create_task(write())
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), 5)  # the lock is held, and the timeout is 15 s
        await write()
        await engine.dispose()

    asyncio.run(run())
    assert database.run("SELECT n FROM items") == [(100,), (100,)]


def test_more_waiting_tasks_than_the_event_loop_has_threads(database: Any) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiolibsql:///{database.path}", pool_size=45, isolation_level="IMMEDIATE")

        async def add() -> None:
            async with engine.begin() as connection:
                n = (await connection.exec_driver_sql("SELECT n FROM items WHERE id = 1")).scalar_one()
                await asyncio.sleep(0)
                await connection.exec_driver_sql("UPDATE items SET n = ? WHERE id = 1", (n + 1,))

        await asyncio.gather(*(add() for _ in range(40)))
        await engine.dispose()

    assert (os.cpu_count() or 1) + 4 < 40
    asyncio.run(run())
    assert database.run("SELECT n FROM items WHERE id = 1") == [(40,)]


def test_an_engine_that_is_not_disposed_of_does_not_stop_the_exit(run_python: Any, database: Any) -> None:
    code = """
import asyncio, sys, aion_timers.libsql
from sqlalchemy.ext.asyncio import create_async_engine
aion_timers.libsql.register()
engine = create_async_engine(f"sqlite+aiolibsql:///{sys.argv[1]}")
async def main():
    async with engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE items SET n = 5")
asyncio.run(main())
print("done")
"""
    assert run_python(code, database.path) == "done"
    assert database.run("SELECT n FROM items") == [(5,), (5,)]


def test_a_lost_async_connection_is_closed(database: Any) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiolibsql:///{database.path}", pool_size=1, max_overflow=0)
        connections = [await engine.connect()]
        await connections[0].exec_driver_sql("UPDATE items SET n = 5")

        def lose() -> None:
            connections.clear()
            gc.collect()

        with pytest.warns(sa.exc.SAWarning, match="garbage collector"):
            lose()
        async with engine.begin() as connection:
            assert (await connection.exec_driver_sql("UPDATE items SET n = n + 1 RETURNING n")).scalar() == 1
        await engine.dispose()

    asyncio.run(run())
