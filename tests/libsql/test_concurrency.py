"""Several processes and threads on one file: nothing is lost, everybody gets a turn, and nobody stops the others."""

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aion_timers.libsql import dbapi

Start = Callable[..., "subprocess.Popen[str]"]
WORKER = Path(__file__).with_name("worker.py")


def ready(process: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
    assert process.stdout
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()
    return process


def result(process: "subprocess.Popen[str]") -> Any:
    out, err = process.communicate("stop\n", timeout=500)
    assert process.returncode == 0, err
    return json.loads(out)


def together(start: Start, processes: int, *task: object) -> list[Counter[str]]:
    """Let several processes do the same thing from the same moment on."""
    return [Counter(one) for one in result(start(WORKER, processes, *task))]


def test_eight_processes_start_on_an_empty_file(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    assert together(start, 8, "create", path) == [Counter(mode="wal")] * 8
    connection = dbapi.connect(str(path))
    assert connection.execute("SELECT count(*) FROM starts").fetchone() == (8,)
    connection.close()


def make_pairs(database: Any) -> None:
    database.run("CREATE TABLE pairs (pair, side, on_call, PRIMARY KEY (pair, side))")
    database.run("INSERT INTO pairs SELECT a.value, b.value, 1 FROM json_each('[0,1,2]') a, json_each('[0,1]') b")


@pytest.mark.parametrize(
    "transactions", [pytest.param(60, id="short"), pytest.param(4_000, id="long", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(600)
def test_no_write_skew(start: Start, database: Any, transactions: int) -> None:
    make_pairs(database)
    counts: Counter[str] = sum(together(start, 4, "skew", database.path, 2, transactions, "on"), Counter())
    assert counts["committed"] == 8 * transactions
    assert counts["violations"] == 0
    assert counts["retried"] > 0  # they did meet


def test_the_write_skew_test_sees_violations(start: Start, database: Any) -> None:
    make_pairs(database)
    counts: Counter[str] = sum(together(start, 4, "skew", database.path, 2, 60, "off"), Counter())
    assert counts["violations"] > 0


@pytest.mark.parametrize("level", ["IMMEDIATE", "SERIALIZABLE"])
@pytest.mark.parametrize(
    "transactions", [pytest.param(20, id="short"), pytest.param(1_000, id="long", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(600)
def test_no_update_is_lost(start: Start, database: Any, level: str, transactions: int) -> None:
    database.run("CREATE TABLE log (n)")
    counts: Counter[str] = sum(together(start, 4, "count", database.path, 2, transactions, level), Counter())
    total = 8 * transactions
    assert counts["committed"] == total
    assert set(counts) <= ({"committed"} if level == "IMMEDIATE" else {"committed", "SnapshotError"})
    assert database.run("SELECT n FROM items WHERE id = 1") == [(total,)]
    assert database.run("SELECT count(*), count(DISTINCT n), max(n) FROM log") == [(total, total, total - 1)]


@pytest.mark.parametrize("read_first", [False, True], ids=["writes", "reads and writes"])
def test_everybody_gets_a_turn_beside_a_rival_in_a_hot_loop(start: Start, database: Any, read_first: bool) -> None:
    rival = ready(start(WORKER, "rival", database.path, 2))
    connection = database.connect(timeout=20)
    end = time.monotonic() + 2
    commits = 0
    while time.monotonic() < end:
        if read_first:
            connection.execute("SELECT n FROM items WHERE id = 1").fetchall()
        connection.execute("UPDATE items SET n = n + 1 WHERE id = 1")
        connection.commit()
        commits += 1
    connection.close()
    theirs = result(rival)["commits"]
    assert database.run("SELECT n FROM items ORDER BY id") == [(commits,), (theirs,)]
    assert commits >= 20


def test_readers_do_not_stop_a_writer(world: Any, database: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT * FROM items").all()
        for _ in range(50):
            database.run("UPDATE items SET n = n + 1")
        assert connection.exec_driver_sql("SELECT n FROM items").all() == [(0,), (0,)]

    world.connection(body)
    assert database.run("SELECT n FROM items") == [(50,), (50,)]


def test_other_threads_run_while_one_waits_for_the_lock(database: Any) -> None:
    holder = database.connect()
    holder.execute("UPDATE items SET n = 1")
    done = threading.Event()

    def wait() -> None:
        connection = database.connect(timeout=10)
        connection.execute("UPDATE items SET n = n + 10")
        connection.commit()
        connection.close()
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    beats = 0
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        time.sleep(0.001)
        beats += 1
    assert not done.is_set()
    holder.commit()
    holder.close()
    thread.join()
    assert done.is_set()
    assert beats > 50
    assert database.run("SELECT n FROM items") == [(11,), (11,)]


def test_threads_of_one_process_lose_nothing(database: Any) -> None:
    engine = sa.create_engine(f"sqlite+libsql:///{database.path}", isolation_level="IMMEDIATE", pool_size=8)
    errors: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(25):
                with engine.begin() as connection:
                    n = connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar_one()
                    connection.exec_driver_sql("UPDATE items SET n = ? WHERE id = 1", (n + 1,))
        except BaseException as error:  # noqa: BLE001 - the test reports it
            errors.append(error)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    assert errors == []
    assert database.run("SELECT n FROM items WHERE id = 1") == [(200,)]


def test_sessions_that_think_do_not_fail_beside_a_writer_of_other_rows(start: Start, database: Any) -> None:
    rival = ready(start(WORKER, "rival", database.path, 2))
    engine = sa.create_engine(f"sqlite+libsql:///{database.path}")
    for _ in range(15):
        with engine.begin() as connection:
            n = connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar_one()
            time.sleep(0.02)
            connection.exec_driver_sql("UPDATE items SET n = ? WHERE id = 1", (n + 1,))
    engine.dispose()
    result(rival)
    assert database.run("SELECT n FROM items WHERE id = 1") == [(15,)]


def test_ctrl_c_ends_a_wait_for_the_lock(start: Start, database: Any) -> None:
    code = """
import sys
from aion_timers.libsql import dbapi
connection = dbapi.connect(sys.argv[1], timeout=100)
print("ready", flush=True)
try:
    connection.execute("UPDATE items SET n = 5")
except KeyboardInterrupt:
    connection.rollback()
    print("true")
"""
    with database.held():
        process = ready(start("-c", code, database.path))
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert result(process) is True  # with the lock still held
    assert database.run("SELECT n FROM items") == [(0,), (0,)]
