"""Which database a URL opens, and which options it takes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from aion_timers.libsql import ProgrammingError, dbapi


def scalar(sql: str) -> Callable[[sa.Connection], Any]:
    return lambda connection: connection.exec_driver_sql(sql).scalar()


def committed(sql: str) -> Callable[[sa.Connection], Any]:
    return lambda connection: (connection.exec_driver_sql(sql), connection.commit())


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?mode=ro", "'mode' would be ignored.*mode=ro&uri=true"),
        ("?immutable=1", "'immutable' would be ignored"),
        ("?encryption_key=hunter2", "'encryption_key' would be ignored.*go into connect_args"),
        ("?secure=true", "'secure' would be ignored"),
        ("?mode=ro&uri=true", "uri=true is for a database that is written as a URI"),
    ],
)
def test_options_that_would_be_ignored(make_world: Any, tmp_path: Path, query: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as raised:
        make_world(f"{tmp_path}/new.db{query}").connection(scalar("SELECT 1"))
    assert "hunter" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_read_only(make_world: Any, database: Any) -> None:
    world = make_world(f"file:{database.path}?mode=ro&uri=true")
    assert world.connection(scalar("SELECT count(*) FROM items")) == 2
    with pytest.raises(OperationalError, match=f"{database.path} can't be written; let this user write"):
        world.connection(scalar("UPDATE items SET n = 1"))
    database.run("UPDATE items SET n = 7")
    assert world.connection(scalar("SELECT n FROM items")) == 7


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_a_file_that_shall_not_be_made(make_world: Any, tmp_path: Path, mode: str) -> None:
    with pytest.raises(OperationalError, match="doesn't exist and can't be created"):
        make_world(f"file:{tmp_path}/new.db?mode={mode}&uri=true").connection(scalar("SELECT 1"))
    assert not list(tmp_path.iterdir())


def test_immutable(make_world: Any, database: Any) -> None:
    # the last connection puts into the file what a writer has left in the log
    world = make_world(f"file:{database.path}?immutable=1&uri=true")
    assert world.connection(scalar("SELECT count(*) FROM items")) == 2
    assert [path.name for path in database.path.parent.iterdir()] == [database.path.name]
    with pytest.raises(OperationalError, match="readonly database"):
        world.connection(scalar("UPDATE items SET n = 1"))


@pytest.mark.parametrize("url", ["app.db", "file:app.db?mode=rw&uri=true", "file:./app.db?mode=rw&uri=true"])
def test_a_relative_path_is_that_of_the_engine(
    make_world: Any, database: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(database.path.parent)
    world = make_world(url)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert world.connection(scalar("SELECT count(*) FROM items")) == 2


@pytest.mark.parametrize("name", ["a?b.db", "100%.db", "a b#c.db", "ü.db"])
def test_names_with_special_characters(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    connection = dbapi.connect(path)
    connection.execute("CREATE TABLE t (a)")
    connection.commit()
    connection.close()
    assert [one.name for one in tmp_path.iterdir()] == [name]
    escaped = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    connection = dbapi.connect(f"file:{escaped}?mode=ro", uri=True)
    with pytest.raises(dbapi.OperationalError) as raised:
        connection.execute("INSERT INTO t VALUES (1)")
    assert f"{path} can't be written" in str(raised.value)
    connection.close()


@pytest.mark.parametrize("address", ["ws://localhost:8080", "wss://localhost", "postgresql://localhost/db", "s3://b/k"])
def test_addresses_of_another_kind(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProgrammingError, match="there is no support for addresses that begin with"):
        dbapi.connect(address)
    assert not list(tmp_path.iterdir())


# -- encryption ------------------------------------------------------------------------------------


def test_encryption(make_world: Any, tmp_path: Path, run_python: Any) -> None:
    path = tmp_path / "secret.db"
    world = make_world(path, connect_args={"encryption_key": "hunter2"})
    world.connection(committed("CREATE TABLE plaintext (a)"))
    assert make_world(path, connect_args={"encryption_key": "hunter2"}).connection(scalar("SELECT 1")) == 1
    for arguments in ({"encryption_key": "hunter3"}, {}):
        with pytest.raises(DatabaseError, match=f"{path} is neither .* or encrypted with another key") as raised:
            make_world(path, connect_args=arguments).connection(scalar("SELECT 1"))
        assert "hunter" not in str(raised.value)
    # by another process, since closing a file drops this one's locks
    code = "import pathlib, sys; print([b'plain' in path.read_bytes() for path in pathlib.Path(sys.argv[1]).iterdir()])"
    assert set(run_python(code, tmp_path).strip("[]").split(", ")) == {"False"}


# -- memory ----------------------------------------------------------------------------------------

ALONE = ["", ":memory:", "file::memory:?uri=true", "file:one?mode=memory&uri=true"]
SHARED = ["file:two?mode=memory&cache=shared&uri=true", "file:/three?vfs=memdb&uri=true"]


@pytest.mark.parametrize("database", ALONE)
def test_a_database_in_memory_is_one_for_all(
    make_world: Any, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = make_world(database)
    world.connection(committed("CREATE TABLE t (a)"))
    world.connection(committed("INSERT INTO t VALUES (1)"))
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(world.connection, scalar("SELECT a FROM t")).result() == 1
    assert world.connection(scalar("SELECT a FROM t")) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("database", SHARED)
def test_a_shared_database_in_memory_has_several_connections(
    make_world: Any, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = make_world(database)

    def body(connection: sa.Connection) -> None:
        committed("CREATE TABLE t (a)")(connection)
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        other = dbapi.connect(database.removesuffix("&uri=true"), uri=True, timeout=0)
        with pytest.raises(dbapi.BusyError):
            other.execute("INSERT INTO t VALUES (2)")
        other.rollback()
        connection.commit()
        assert other.execute("SELECT a FROM t").fetchall() == [(1,)]
        other.close()

    world.connection(body)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("database", SHARED)
def test_threads_share_a_database_in_memory(database: str) -> None:
    engine = sa.create_engine(f"sqlite+libsql:///{database}", isolation_level="IMMEDIATE")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n)")
        connection.exec_driver_sql("INSERT INTO t VALUES (0)")
    start = threading.Barrier(4)

    def add() -> None:
        start.wait()
        for _ in range(50):
            with engine.begin() as connection:
                n = connection.exec_driver_sql("SELECT n FROM t").scalar_one()
                connection.exec_driver_sql("UPDATE t SET n = ?", (n + 1,))

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(add) for _ in range(4)]:
            done.result()
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT n FROM t").scalar() == 200
    engine.dispose()
