"""Forks, other ways to start processes, closed event loops and the end of the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

COMMON = """
import asyncio, os, sys, threading, time, warnings
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
import aion_timers.libsql
from aion_timers.libsql import dbapi
aion_timers.libsql.register()
# Python 3.12 and later warn of a fork beside other threads, which is what is tested
warnings.simplefilter("ignore", DeprecationWarning)
path = sys.argv[1]
url = f"sqlite+libsql:///{path}"

class Signal:
    def __init__(self):
        self._ends = os.pipe()
    def send(self):
        os.write(self._ends[1], b".")
    def wait(self):
        assert os.read(self._ends[0], 1)

def forked(work):
    "Run work in a child, which then ends as a program does; a function that waits for it."
    sys.stdout.flush()
    child = os.fork()
    if not child:
        work()
        sys.exit()
    def wait():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return wait

def add(connection, n=1):
    connection.exec_driver_sql("UPDATE items SET n = n + ? WHERE id = 1", (n,))

def commit(engine, n=1):
    with engine.begin() as connection:
        add(connection, n)
"""


def total(database: Any) -> int:
    """What has been added, in a file that is as it should be."""
    assert database.run("PRAGMA integrity_check") == [("ok",)]
    return int(database.run("SELECT n FROM items WHERE id = 1")[0][0])


# -- forks -------------------------------------------------------------------------------------------------------------

LOCKS = """
engine = sa.create_engine(url)
commit(engine)
committed, closed = Signal(), Signal()

def work():
    child = OPENED
    commit(child)
    committed.send()
    closed.wait()
    commit(child)

wait = forked(work)
committed.wait()
engine.dispose()  # whoever closes last removes the log, unless another process has a lock
closed.send()
wait()
"""


@pytest.mark.parametrize("opened", ["engine", "sa.create_engine(url)"], ids=["same engine", "new engine"])
def test_a_child_has_locks_of_its_own(run_python: Any, database: Any, opened: str) -> None:
    run_python(COMMON + LOCKS.replace("OPENED", opened), database.path)
    assert total(database) == 3


def test_workers_of_a_server_that_forks(run_python: Any, database: Any) -> None:
    code = """
engine = sa.create_engine(url, isolation_level="IMMEDIATE")
commit(engine)  # such as a check at the start

def serve():
    def requests():
        for _ in range(10):
            with engine.begin() as connection:
                n = connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar_one()
                connection.exec_driver_sql("UPDATE items SET n = ? WHERE id = 1", (n + 1,))
    threads = [threading.Thread(target=requests) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

waits = [forked(serve) for _ in range(4)]
serve()
for wait in waits:
    wait()
engine.dispose()
"""
    run_python(COMMON + code, database.path)
    assert total(database) == 1 + 5 * 20


def test_a_fork_in_the_middle_of_a_write(run_python: Any, database: Any) -> None:
    code = """
engine = sa.create_engine(url)

def refused(use):
    try:
        use()
    except sa.exc.OperationalError as error:
        print(error.orig)

def work():
    "The connection can't be used, and the file can't be opened, neither here nor in a child of the child."
    refused(lambda: add(connection))
    connection.rollback()
    refused(lambda: commit(engine))
    forked(lambda: refused(lambda: commit(engine)))()

with engine.connect() as connection:
    connection.exec_driver_sql("PRAGMA cache_size = 10")  # so that most of what is written is in the log already
    add(connection)
    connection.exec_driver_sql("CREATE TABLE big (a)")
    fill = "INSERT INTO big SELECT randomblob(1000) FROM json_each('[" + ",".join("0" * 2000) + "]')"
    connection.exec_driver_sql(fill)
    forked(lambda: refused(connection.commit))()
    forked(work)()
    connection.exec_driver_sql(fill)
    connection.commit()
    forked(lambda: commit(engine))()
    print(connection.exec_driver_sql("SELECT count(*) FROM big").scalar())
engine.dispose()
"""
    committed, used, opened, nested, rows = run_python(COMMON + code, database.path).splitlines()
    for inherited in (committed, used):
        assert "the connection stays with the process that opened it" in inherited
    for refused in (opened, nested):
        assert f"{database.path} can't be opened here: this process was forked while" in refused
        assert "start processes with spawn or forkserver" in refused
    assert rows == "4000"
    assert total(database) == 2


def test_a_fork_beside_threads_that_read_and_write(run_python: Any, database: Any) -> None:
    code = """
engine = sa.create_engine(url, pool_size=10)
other = sa.create_engine(url.replace("app.db", "other.db"))
commit(engine)
written, forks_are_done, read = Signal(), Signal(), Signal()

def read_on():
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT * FROM items").all()
        read.send()
        forks_are_done.wait()
        print(connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar())

def write_on():
    with other.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
        written.send()
        forks_are_done.wait()

threads = [threading.Thread(target=read_on), threading.Thread(target=write_on)]
for thread in threads:
    thread.start()
read.wait()
written.wait()

def work():
    commit(engine)
    try:
        other.connect()
    except sa.exc.OperationalError as error:
        print("refused" if "other.db" in str(error.orig) else error)

forked(work)()
for _ in threads:
    forks_are_done.send()
for thread in threads:
    thread.join()
forked(lambda: other.connect().close())()
engine.dispose()
other.dispose()
"""
    assert run_python(COMMON + code, database.path).splitlines() == ["refused", "1"]
    assert total(database) == 2


def test_a_session_of_the_parent_in_a_child(run_python: Any, database: Any) -> None:
    """A child that goes on with what its parent has begun commits nothing, and works after a rollback."""
    code = """
from sqlalchemy.orm import Session
engine = sa.create_engine(url)
with Session(engine) as session:
    session.execute(sa.text("SELECT n FROM items")).all()
    def work():
        try:
            session.execute(sa.text("UPDATE items SET n = n + 10"))
        except sa.exc.OperationalError as error:
            print(type(error.orig).__name__, error.connection_invalidated)
        session.rollback()
        session.execute(sa.text("UPDATE items SET n = n + 1"))
        session.commit()
    forked(work)()
    session.rollback()
    session.execute(sa.text("UPDATE items SET n = n + 1"))
    session.commit()
"""
    assert run_python(COMMON + code, database.path) == "DisconnectError True"
    assert total(database) == 2


def test_an_async_engine_in_a_child(run_python: Any, database: Any) -> None:
    code = """
engine = create_async_engine(url.replace("libsql", "aiolibsql"))

async def commit():
    async with engine.begin() as connection:
        await connection.run_sync(add)

async def use(connection):
    try:
        await connection.run_sync(add)
    except sa.exc.OperationalError as error:
        print(type(error.orig).__name__)
    await connection.close()
    await commit()

def work():
    asyncio.run(use(connection))
    sys.stdout.flush()
    os._exit(0)  # the end of a program would close the loop, which parent and child share

with asyncio.Runner() as runner:
    runner.run(commit())
    connection = runner.run(engine.connect().start())
    runner.run(connection.run_sync(lambda c: c.exec_driver_sql("SELECT n FROM items").all()))
    forked(work)()
    runner.run(connection.close())
    runner.run(commit())
    runner.run(engine.dispose())
"""
    assert run_python(COMMON + code, database.path) == "DisconnectError"
    assert total(database) == 3


def test_a_child_has_a_copy_of_what_is_in_memory(run_python: Any, database: Any) -> None:
    code = """
engine = sa.create_engine("sqlite+libsql://", poolclass=sa.pool.StaticPool)
with engine.begin() as connection:
    connection.exec_driver_sql("CREATE TABLE items (id, n)")
    connection.exec_driver_sql("INSERT INTO items VALUES (1, 0)")

def work():
    commit(engine)
    with engine.connect() as connection:
        print(connection.exec_driver_sql("SELECT n FROM items").scalar())

commit(engine)
forked(work)()
forked(work)()
"""
    assert run_python(COMMON + code, database.path).splitlines() == ["2", "2"]


def test_a_child_can_not_reach_a_server_through_the_driver_of_its_parent(run_python: Any, database: Any) -> None:
    """It would hang: the driver's threads are those of the parent."""
    code = """
commit(sa.create_engine(url))

def work():
    try:
        dbapi.connect(path + ".replica", sync_url="http://127.0.0.1:1")
    except dbapi.OperationalError as error:
        print(error)

forked(work)()
"""
    message = run_python(COMMON + code, database.path)
    assert f"{database.path}.replica can't be opened here: this process was forked after" in message
    assert "spawn" in message


# -- other ways to start processes -------------------------------------------------------------------------------------

SPAWN = """
import multiprocessing, sys
import sqlalchemy as sa
import aion_timers.libsql

def work(url):
    aion_timers.libsql.register()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
    engine.dispose()

if __name__ == "__main__":
    url = f"sqlite+libsql:///{sys.argv[1]}"
    work(url)
    context = multiprocessing.get_context(sys.argv[2])
    processes = [context.Process(target=work, args=(url,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_not_forked(start: Any, database: Any, tmp_path: Path, method: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(SPAWN)
    process = start(script, database.path, method)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert total(database) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't list a process's files and threads")
def test_nothing_is_opened_before_the_first_connection(run_python: Any, database: Any) -> None:
    code = """
import os
def opened():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd != "3")
before = opened()
import aion_timers
import sqlalchemy as sa, sys
from sqlalchemy.ext.asyncio import create_async_engine
engines = [sa.create_engine(f"sqlite+libsql:///{sys.argv[1]}"), create_async_engine("sqlite+aiolibsql:///new.db")]
assert opened() == before, opened()
print(len(os.listdir("/proc/self/task")))
"""
    assert run_python(code, database.path) == "1"


# -- event loops -------------------------------------------------------------------------------------------------------


def test_event_loops_that_come_and_go(run_python: Any, database: Any) -> None:
    """Connections that were left in a pool, or in a transaction, do not keep their loop, nor a lock."""
    code = """
engine = create_async_engine(url.replace("libsql", "aiolibsql"), pool_size=1, max_overflow=1)

async def commit():
    async with engine.begin() as connection:
        await connection.run_sync(add)

async def leave_open():
    connection = await engine.connect()
    await connection.run_sync(lambda c: add(c, 100))
    left.append(connection)

left = []
for _ in range(3):
    asyncio.run(commit())
asyncio.run(leave_open())
with warnings.catch_warnings():
    warnings.simplefilter("ignore", sa.exc.SAWarning)  # that the connection was not closed
    left.clear()
    import gc
    gc.collect()
asyncio.run(commit())
asyncio.run(engine.dispose())
"""
    run_python(COMMON + code, database.path)
    assert total(database) == 4


# -- the end of the interpreter ----------------------------------------------------------------------------------------

ENDS = {
    "a connection in a pool": "engine = sa.create_engine(url); commit(engine)",
    "a transaction": "engine = sa.create_engine(url); commit(engine); open = engine.connect(); add(open)",
    "a result": "engine = sa.create_engine(url); commit(engine);"
    " open = engine.connect(); rows = open.exec_driver_sql('SELECT * FROM items')",
    "a raw cursor": "commit(sa.create_engine(url)); open = dbapi.connect(path);"
    " cursor = open.execute('UPDATE items SET n = n + 1 RETURNING id')",
    "a thread that waits for the lock": """
commit(sa.create_engine(url))
holder = dbapi.connect(path)
holder.execute('UPDATE items SET n = 9')
waiter = dbapi.connect(path, timeout=1000)
threading.Thread(target=waiter.execute, args=('UPDATE items SET n = 9',), daemon=True).start()
time.sleep(0.1)
""",
    "a task that waits for the lock": """
engine = create_async_engine(url.replace("libsql", "aiolibsql") + "?timeout=1000")
commit(sa.create_engine(url))
holder = dbapi.connect(path)
holder.execute('UPDATE items SET n = 9')
async def wait():
    async with engine.begin() as connection:
        await connection.run_sync(add)
async def main():
    task = asyncio.create_task(wait())
    await asyncio.sleep(0.1)
asyncio.run(main())
""",
    "an async transaction": """
engine = create_async_engine(url.replace("libsql", "aiolibsql"))
commit(sa.create_engine(url))
warnings.simplefilter("ignore", sa.exc.SAWarning)  # that the connection was not closed
async def main():
    global open
    open = await engine.connect()
    await open.run_sync(add)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("left", ENDS.values(), ids=ENDS.keys())
def test_a_program_ends_with_something_left_open(start: Any, database: Any, left: str) -> None:
    process = start("-c", COMMON + left, database.path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert total(database) == 1
