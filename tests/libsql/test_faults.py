"""Kills, full disks, crowds, and a reader that never ends: what was acknowledged stays, and the file stays sound."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

import aion_timers.libsql

WORKER = Path(__file__).with_name("worker.py")


def check(database: Any) -> None:
    assert database.run("PRAGMA integrity_check") == [("ok",)]


# -- kills -------------------------------------------------------------------------------------------------------------


def commit_until_killed(path: str, victim: int, acknowledge: Connection) -> None:
    """Commit transactions of two rows, one of them large, and tell after each; the log is emptied all the time."""
    aion_timers.libsql.register()
    engine = sa.create_engine(f"sqlite+libsql:///{path}")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_autocheckpoint = 8")
        connection.commit()
        number = 0
        while True:
            connection.exec_driver_sql("INSERT INTO small VALUES (?, ?)", (victim, number))
            connection.exec_driver_sql("INSERT INTO large VALUES (?, ?, randomblob(10000))", (victim, number))
            connection.commit()
            acknowledge.send(number)
            number += 1


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_kill_takes_nothing_back(database: Any, kills: int, record_property: Callable[..., None]) -> None:
    database.run("CREATE TABLE small (victim, number)")
    database.run("CREATE TABLE large (victim, number, data)")
    # forked from a server that has imported everything and opened nothing, so that a victim starts at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance = random.Random(1)  # noqa: S311 - when to kill, no secret
    begun = time.monotonic()
    commits = 0
    for victim in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=commit_until_killed, args=(str(database.path), victim, sender))
        process.start()
        sender.close()
        acknowledged = receiver.recv()
        time.sleep(chance.uniform(0, 0.03))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        try:
            while True:
                acknowledged = receiver.recv()
        except EOFError:
            receiver.close()
        check(database)
        small, large = (
            [
                number
                for (number,) in database.run(f"SELECT number FROM {table} WHERE victim = {victim} ORDER BY number")
            ]
            for table in ("small", "large")
        )
        # the commit that was under way may have been done, or not, but not by half
        assert small == large
        assert small in (list(range(acknowledged + 1)), list(range(acknowledged + 2)))
        commits += len(small)
        database.run("DELETE FROM large")
    row = {"kills": kills, "commits": commits, "lost": 0, "seconds": round(time.monotonic() - begun, 1)}
    record_property("libSQL file: SIGKILL in a loop of commits", row)


# -- no room -----------------------------------------------------------------------------------------------------------


def fill(connection: sa.Connection, rows: int) -> None:
    numbers = ",".join(map(str, range(rows)))
    connection.exec_driver_sql(f"INSERT INTO items (n, data) SELECT 7, randomblob(10000) FROM json_each('[{numbers}]')")


def fill_row_by_row(connection: sa.Connection, rows: int) -> None:
    for _ in range(rows):
        connection.exec_driver_sql("INSERT INTO items (n, data) VALUES (7, randomblob(10000))")


@pytest.mark.parametrize(("write", "kept"), [(fill, 1), (fill_row_by_row, 0)])
def test_a_full_database_in_the_middle_of_a_transaction(
    world: Any, database: Any, write: Callable[[sa.Connection, int], None], kept: int
) -> None:
    """SQLite undoes the statement alone, or the whole transaction, which then can't be committed by half."""

    def limit(connection: sa.Connection, pages: int) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        connection.commit()

    def body(connection: sa.Connection) -> None:
        limit(connection, connection.exec_driver_sql("PRAGMA page_count").scalar_one() + 20)
        connection.exec_driver_sql("UPDATE items SET n = n + 1")
        with pytest.raises(OperationalError, match=r"database or disk is full: .*app\.db; make room on its disk"):
            write(connection, 100)
        if not kept:
            with pytest.raises(OperationalError, match="rolled back after an error"):
                connection.exec_driver_sql("SELECT 1")
            with pytest.raises(OperationalError, match="nothing was committed"):
                connection.commit()
            connection.rollback()
        connection.commit()
        assert database.run("SELECT n FROM items WHERE id <= 2") == [(kept,), (kept,)]
        check(database)
        limit(connection, 1_000_000)
        write(connection, 100)
        connection.commit()

    world.connection(body)
    assert database.run("SELECT n, count(*) FROM items GROUP BY n") == [(kept, 2), (7, 100)]
    check(database)


FULL = """
import os, resource, subprocess, sys
import sqlalchemy as sa
import aion_timers.libsql
from aion_timers.libsql import dbapi
aion_timers.libsql.register()
folder, how = sys.argv[1:]
path = os.path.join(folder, "full.db")

def take_the_room():
    if how == "disk":
        with open(os.path.join(folder, "ballast"), "wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(4096)):
                    pass
            except OSError:
                return
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path + "-wal") + 10_000, resource.RLIM_INFINITY))

def make_room():
    if how == "disk":
        os.remove(os.path.join(folder, "ballast"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def write(connection, row):
    connection.exec_driver_sql("INSERT INTO t VALUES (?, randomblob(100000))", (row,))

if how == "disk":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=True)
engine = sa.create_engine(f"sqlite+libsql:///{path}", pool_size=1, max_overflow=0)
with engine.begin() as connection:
    connection.exec_driver_sql("CREATE TABLE t (row, data)")
    write(connection, "before")
take_the_room()
for _ in range(2):
    try:
        with engine.begin() as connection:
            write(connection, "meanwhile")
    except sa.exc.OperationalError as error:
        print(str(error.orig).replace(path, "PATH"))
with engine.connect() as connection:
    print(*connection.exec_driver_sql("SELECT row FROM t").scalars())
make_room()
with engine.begin() as connection:
    write(connection, "after")
engine.dispose()
with engine.connect() as connection:
    print(*connection.exec_driver_sql("SELECT row FROM t").scalars())
    print(connection.exec_driver_sql("PRAGMA integrity_check").scalar())
engine.dispose()
"""

FULL_DISK = ["database or disk is full: PATH; make room on its disk"] * 2
NO_LARGER_FILE = ["disk I/O error"] * 2
THEN = ["before", "before after", "ok"]


def test_a_commit_that_finds_no_room(run_python: Any, tmp_path: Path) -> None:
    assert run_python(FULL, tmp_path, "file").splitlines() == NO_LARGER_FILE + THEN


@pytest.mark.skipif(
    not (sys.platform == "linux" and os.geteuid() == 0),
    reason="only root may mount a small disk; the test above does the same without one",
)
def test_a_commit_that_finds_the_disk_full(run_python: Any, tmp_path: Path) -> None:
    code = (
        f"import os, sys; os.execvp('unshare', ['unshare', '--mount', sys.executable, '-c', {FULL!r}, *sys.argv[1:]])"
    )
    assert run_python(code, tmp_path, "disk").splitlines() == FULL_DISK + THEN


# -- a reader that never ends ------------------------------------------------------------------------------------------


def test_a_reader_that_never_ends_stops_no_checkpoint_for_ever(world: Any, database: Any) -> None:
    """It sees what it saw first; the log grows meanwhile, nobody waits, and it is emptied once the reader has gone."""
    wal = Path(f"{database.path}-wal")
    writer = database.connect(timeout=0)

    def write(times: int) -> None:
        for _ in range(times):
            writer.execute("UPDATE items SET n = n + 1, data = randomblob(10000)")
            writer.commit()

    def checkpoint() -> tuple[bool, bool]:
        """Whether it was held up, and whether anything is left in the log."""
        ((busy, log, moved),) = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return bool(busy), log > moved

    def body(connection: sa.Connection) -> None:
        read = sa.text("SELECT n FROM items")
        write(1)
        assert connection.scalars(read).all() == [1, 1]
        write(300)
        assert checkpoint() == (True, True)
        assert wal.stat().st_size > 300 * 10_000
        write(1)
        assert connection.scalars(read).all() == [1, 1]
        connection.rollback()
        assert checkpoint() == (False, False)
        assert wal.stat().st_size == 0
        assert connection.scalars(read).all() == [302, 302]

    world.connection(body)
    writer.close()
    check(database)


# -- crowds ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def idle(start: Any) -> Callable[[], float]:
    """A process that only syncs a file of its own now and then; tells how long it was held up at most since asked."""
    process = start(WORKER, "idle")

    def ask() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    ask()
    return ask


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (4, 2)])
def test_a_crowd(  # noqa: PLR0917 - two tables of parameters
    start: Any,
    database: Any,
    idle: Callable[[], float],
    record_property: Callable[..., None],
    processes: int,
    threads: int,
    seconds: int,
) -> None:
    """Everybody reads a counter, adds one and writes it, at level IMMEDIATE: no error, and none is lost."""
    database.run("CREATE TABLE log (n)")
    transactions = 0
    for attempt in range(3):
        idle()
        process = start(WORKER, processes, "crowd", database.path, threads, seconds)
        out, err = process.communicate(timeout=seconds + 60)
        assert process.returncode == 0, err
        elsewhere = idle()
        workers = [Counter(one) for one in json.loads(out)]
        done = sum(worker["committed"] for worker in workers)
        transactions += done
        assert all(set(worker) <= {"committed", "stall", "least"} for worker in workers)  # no errors
        assert all(worker["least"] > 0 for worker in workers)
        assert database.run("SELECT n FROM items WHERE id = 1") == [(transactions,)]
        assert database.run("SELECT count(*), count(DISTINCT n) FROM log") == [(transactions, transactions)]
        stall = max(worker["stall"] for worker in workers)
        row = {
            "shape": f"{processes} x {threads}",
            "seconds": seconds,
            "transactions": done,
            "errors": 0,
            "lost": 0,
            "worst stall ms": round(stall * 1000),
            "of an idle process": round(elsewhere * 1000),
        }
        record_property("libSQL file: read, add one, write at level IMMEDIATE", row)
        # a machine that has other things to do holds up everybody
        if seconds < 60 or stall < 0.1 + elsewhere:
            break
        assert attempt < 2, row
    check(database)
