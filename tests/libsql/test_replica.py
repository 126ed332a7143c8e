"""An embedded replica, of a server of the tests' own."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError

from aion_timers import TimerRepository, migrate
from aion_timers.libsql import DisconnectError, ProgrammingError, SnapshotError, dbapi
from tests.sqld import Sqld

from .conftest import SyncWorld

Body = Callable[[sa.Connection], Any]


once = pytest.mark.parametrize("make_world", [SyncWorld], ids=["sync"], indirect=True)
"""For what the async dialect has no part in."""


@pytest.fixture(scope="module")
def sqld() -> Iterator[Sqld]:
    """A server."""
    with Sqld.started() as server:
        yield server


@pytest.fixture
def primary(sqld: Sqld) -> str:
    """Its address."""
    return f"http://{sqld.url.host}:{sqld.url.port}"


@pytest.fixture
def elsewhere(primary: str, tmp_path: Path) -> Iterator[dbapi.Connection]:
    """Another replica; the primary has a table with a row, and no other."""
    connection = dbapi.connect(tmp_path / "elsewhere.db", sync_url=primary)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        connection.execute(f"DROP TABLE {name}")
    write(connection, "CREATE TABLE items (id INTEGER PRIMARY KEY, n INTEGER)")
    write(connection, "INSERT INTO items VALUES (1, 0)")
    yield connection
    connection.close()


@pytest.fixture
def world(make_world: Callable[..., Any], elsewhere: dbapi.Connection, primary: str, tmp_path: Path) -> Any:  # noqa: ARG001 - it makes the table
    """An engine on a replica."""
    return make_replica(make_world, tmp_path / "replica.db", primary)


def make_replica(make_world: Callable[..., Any], path: Path, primary: str, **connect_args: Any) -> Any:
    return make_world(path, pool_size=1, max_overflow=0, connect_args={"sync_url": primary, **connect_args})


def write(connection: dbapi.Connection, sql: str) -> None:
    connection.execute(sql)
    connection.commit()


def n(connection: sa.Connection) -> Any:
    """What the row holds."""
    return connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar()


def committed(sql: str) -> Body:
    return lambda connection: (connection.exec_driver_sql(sql), connection.commit())


@contextmanager
def away(sqld: Sqld) -> Iterator[None]:
    """Do without the server."""
    sqld.kill()
    try:
        yield
    finally:
        sqld.restart()


# -- reading and writing ---------------------------------------------------------------------------


def test_reads_are_those_of_the_last_sync(world: Any, elsewhere: dbapi.Connection) -> None:
    assert world.connection(n) == 0
    write(elsewhere, "UPDATE items SET n = 1")
    for level in ("SERIALIZABLE", "AUTOCOMMIT"):
        assert world.connection(n, isolation_level=level) == 0
    assert world.connection(n, isolation_level="IMMEDIATE") == 1  # which the primary is asked for
    world.connection(lambda c: c.connection.sync())
    assert world.connection(n) == 1


@once
def test_what_it_wrote_it_reads(world: Any, elsewhere: dbapi.Connection) -> None:
    world.connection(committed(f"UPDATE items SET n = {2**53 + 1}"))
    assert world.connection(n) == 2**53 + 1
    elsewhere.sync()
    assert elsewhere.execute("SELECT n FROM items").fetchall() == [(2**53 + 1,)]


def test_a_write_after_reads_that_are_stale(world: Any, elsewhere: dbapi.Connection) -> None:
    def add(connection: sa.Connection) -> None:
        now = n(connection)
        connection.exec_driver_sql("UPDATE items SET n = ?", (now + 1,))
        connection.commit()

    world.connection(n)
    write(elsewhere, "UPDATE items SET n = 10")
    with pytest.raises(OperationalError) as raised:
        world.connection(add)
    assert isinstance(raised.value.orig, SnapshotError)
    world.connection(add)  # it has been synced
    write(elsewhere, "UPDATE items SET n = 20")
    world.connection(add, isolation_level="IMMEDIATE")
    write(elsewhere, "INSERT INTO items VALUES (2, 0)")  # which it doesn't read
    world.connection(add)
    assert world.connection(n) == 22


@once
@pytest.mark.parametrize("look", ["table_xinfo(items)", "foreign_keys", "user_version"])
def test_looking_around_after_a_read(world: Any, look: str) -> None:
    def body(connection: sa.Connection) -> None:
        assert n(connection) == 0
        assert connection.exec_driver_sql(f"PRAGMA {look}").all()
        assert sa.inspect(connection).get_pk_constraint("items")["constrained_columns"] == ["id"]
        connection.exec_driver_sql("UPDATE items SET n = 1")
        connection.commit()

    world.connection(body)
    assert world.connection(n) == 1


@once
@pytest.mark.parametrize("read_first", [False, True])
def test_savepoints(world: Any, read_first: bool) -> None:
    def body(connection: sa.Connection) -> None:
        if read_first:
            assert n(connection) == 0
        for value, keep in ((1, True), (2, False)):
            savepoint = connection.begin_nested()
            assert n(connection) == value - 1
            connection.exec_driver_sql("UPDATE items SET n = ?", (value,))
            (savepoint.commit if keep else savepoint.rollback)()
        connection.commit()

    world.connection(body)
    assert world.connection(n) == 1


@once
def test_a_constraint_of_the_primary(world: Any) -> None:
    with pytest.raises(IntegrityError, match=r"^\S+ UNIQUE constraint failed: items.id"):
        world.connection(committed("INSERT INTO items VALUES (1, 1)"))
    assert world.connection(n) == 0


@once
def test_schema_changes_are_transactional(world: Any) -> None:
    world.connection(lambda c: (n(c), c.exec_driver_sql("CREATE TABLE halfway (a)"), c.rollback()))
    assert world.connection(lambda c: sa.inspect(c).get_table_names()) == ["items"]


@once
def test_timers(world: Any) -> None:
    def body(connection: sa.Connection) -> int:
        migrate.upgrade(connection)
        repository = TimerRepository(connection)
        repository.schedule(UUID(int=1), "letter", datetime.now(UTC))
        connection.commit()
        assert repository.get(UUID(int=1), "letter")
        return len(repository.take(limit=10))

    assert world.connection(body) == 1


def test_an_encrypted_replica(elsewhere: dbapi.Connection, primary: str, tmp_path: Path) -> None:
    write(elsewhere, "UPDATE items SET n = 'plaintext'")
    secret = dbapi.connect(tmp_path / "secret.db", sync_url=primary, encryption_key="hunter2")
    assert secret.execute("SELECT n FROM items").fetchall() == [("plaintext",)]
    secret.close()
    assert all(b"plaintext" not in file.read_bytes() for file in tmp_path.glob("secret.db*"))
    elsewhere.close()
    assert any(b"plaintext" in file.read_bytes() for file in tmp_path.glob("elsewhere.db*"))


@once
def test_syncing_in_the_background(make_world: Any, elsewhere: dbapi.Connection, primary: str, tmp_path: Path) -> None:
    world = make_replica(make_world, tmp_path / "replica.db", primary, sync_interval=0.05)
    assert world.connection(n) == 0
    write(elsewhere, "UPDATE items SET n = 1")
    until = time.monotonic() + 60
    while world.connection(n) == 0:
        assert time.monotonic() < until
        time.sleep(0.01)


# -- a primary that is away ------------------------------------------------------------------------


def test_reads_go_on_without_the_primary(world: Any, sqld: Sqld) -> None:
    assert world.connection(n) == 0
    with away(sqld):
        for level in ("SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"):
            with pytest.raises(OperationalError) as raised:
                world.connection(committed("UPDATE items SET n = 1"), isolation_level=level)
            assert not raised.value.connection_invalidated
            assert world.connection(n) == 0
        with pytest.raises(OperationalError):
            world.connection(lambda c: (n(c), c.exec_driver_sql("UPDATE items SET n = 1")))
        assert world.connection(n) == 0
        with pytest.raises(dbapi.OperationalError, match="does not answer"):
            world.connection(lambda c: c.connection.sync())
        assert world.connection(n) == 0
    world.connection(committed("UPDATE items SET n = 1"))
    assert world.connection(n) == 1


def test_the_primary_dies_in_a_transaction(world: Any, sqld: Sqld) -> None:
    def write_around(kill: Callable[[], None]) -> Body:
        def body(connection: sa.Connection) -> None:
            connection.exec_driver_sql("UPDATE items SET n = n + 1")
            kill()
            connection.exec_driver_sql("INSERT INTO items VALUES (2, 0)")
            connection.commit()

        return body

    with ExitStack() as stack:
        with pytest.raises(OperationalError) as raised:
            world.connection(write_around(lambda: stack.enter_context(away(sqld))))
        assert isinstance(raised.value.orig, DisconnectError)
        assert raised.value.connection_invalidated
    assert world.connection(n) == 0

    with pytest.raises(OperationalError, match="lost the transaction"):
        world.connection(write_around(sqld.restart))
    assert world.connection(n) == 0
    with pytest.raises(OperationalError):
        world.connection(lambda c: (c.exec_driver_sql("UPDATE items SET n = 5"), sqld.restart(), c.commit()))
    assert world.connection(n, isolation_level="IMMEDIATE") == 0
    world.connection(committed("UPDATE items SET n = 1"))
    assert world.connection(n) == 1


@once
def test_the_primary_is_away_at_connect(make_world: Any, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and doesn't listen
        address = f"http://user:hunter2@127.0.0.1:{unused.getsockname()[1]}"
        world = make_replica(make_world, tmp_path / "replica.db", address, auth_token="hunter3")  # noqa: S106 - of nobody
        for _ in range(2):
            with pytest.raises(OperationalError, match=r"primary http://127.0.0.1:\d+ does not answer") as raised:
                world.connection(n)
            assert "hunter" not in str(raised.value)


def test_a_primary_that_never_answers(make_world: Any, tmp_path: Path) -> None:
    beats = 0
    done = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.wait(0.01):
            beats += 1

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        world = make_replica(make_world, tmp_path / "replica.db", address, timeout=0.5)
        heart = threading.Thread(target=beat)
        heart.start()
        try:
            with pytest.raises(OperationalError, match="does not answer"):
                world.connection(n)
        finally:
            done.set()
            heart.join()
    assert beats > 5


@once
@pytest.mark.parametrize("address", ["nonsense", "ws://127.0.0.1:1", "http://", "http://[", 5])
def test_what_is_no_address(make_world: Any, address: Any, tmp_path: Path) -> None:
    with pytest.raises(sa.exc.ProgrammingError, match="sync_url is the address of the primary"):
        make_replica(make_world, tmp_path / "replica.db", address).connection(n)


@pytest.mark.parametrize("database", [":memory:", "file:replica.db?mode=rwc", "http://127.0.0.1:1", ""])
def test_what_is_no_file(database: str) -> None:
    with pytest.raises(ProgrammingError, match="a replica is kept in a file"):
        dbapi.connect(database, sync_url="http://127.0.0.1:1")


# -- one connection --------------------------------------------------------------------------------

OPEN = """
import sys
from aion_timers.libsql import dbapi
try:
    dbapi.connect(sys.argv[1], sync_url=sys.argv[2]).close()
    print("opened")
except dbapi.OperationalError as error:
    print(error)
"""


def test_a_second_connection_is_refused(
    elsewhere: dbapi.Connection, primary: str, tmp_path: Path, run_python: Any
) -> None:
    path = tmp_path / "elsewhere.db"
    with pytest.raises(dbapi.OperationalError, match="another connection has this replica open, and two would damage"):
        dbapi.connect(path, sync_url=primary)
    assert "pool_size=1, max_overflow=0" in run_python(OPEN, path, primary)
    elsewhere.close()
    assert run_python(OPEN, path, primary) == "opened"
    dbapi.connect(path, sync_url=primary).close()


FORK = """
import os, sys, warnings
from aion_timers.libsql import dbapi
connection = dbapi.connect(sys.argv[1], sync_url=sys.argv[2])
warnings.simplefilter("ignore")  # the driver has threads, of which a fork warns
from_child, to_parent = os.pipe()
from_parent, to_child = os.pipe()
if os.fork() == 0:
    os.write(to_parent, b"!")
    os.close(to_child)
    os.read(from_parent, 1)  # until the parent has closed its end
    os._exit(0)
os.read(from_child, 1)
connection.close()
dbapi.connect(sys.argv[1], sync_url=sys.argv[2]).close()
os.close(to_child)
os.wait()
print("opened")
"""


def test_a_forked_process_does_not_keep_it(primary: str, tmp_path: Path, run_python: Any) -> None:
    assert run_python(FORK, tmp_path / "replica.db", primary) == "opened"


@once
def test_what_cannot_be_synced(world: Any, database: Any) -> None:
    with pytest.raises(dbapi.ProgrammingError, match="inside a transaction"):
        world.connection(lambda c: (n(c), c.connection.sync()))
    connection = database.connect()
    with pytest.raises(ProgrammingError, match="only a replica"):
        connection.sync()
    connection.close()


# -- the driver's log ------------------------------------------------------------------------------

QUIET = """
import os, sys
import sqlalchemy as sa
import aion_timers
engine = sa.create_engine(f"sqlite+libsql:///{sys.argv[1]}", connect_args={"sync_url": sys.argv[2]}, pool_size=1)
with engine.begin() as connection:
    connection.exec_driver_sql("INSERT INTO items (n) VALUES (2)")
with engine.begin() as connection:
    print(connection.exec_driver_sql("SELECT count(*) FROM items").scalar(), os.environ.get("RUST_LOG"))
"""


def test_the_driver_logs_nothing(
    elsewhere: dbapi.Connection,  # noqa: ARG001 - it makes the table
    primary: str,
    tmp_path: Path,
    run_python: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RUST_LOG", raising=False)
    assert run_python(QUIET, tmp_path / "quiet.db", primary) == "2 None"
    monkeypatch.setenv("RUST_LOG", "info")  # which is how to see that there is something to keep quiet
    assert "handshake" in run_python(QUIET, tmp_path / "loud.db", primary)
