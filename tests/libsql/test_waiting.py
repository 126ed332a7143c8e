import threading
import time
from typing import Any

import sqlalchemy as sa

from aion_timers.libsql.waiting import Line, LockWait, line_of


def test_a_wait_ends_at_its_timeout() -> None:
    assert not LockWait(0).pause()
    begun = time.monotonic()
    wait = LockWait(0.5)
    tries = 0
    while wait.pause():
        tries += 1
    assert time.monotonic() - begun >= 0.5
    assert wait.remaining == 0
    assert tries > 10


def test_a_line_is_first_come_first_served() -> None:
    line = Line()
    served: list[int] = []

    def wait(number: int) -> None:
        with line.place() as place:
            while not place.first:
                place.sleep(10)
            served.append(number)

    with line.place() as holder:
        assert line.first is holder
        threads = []
        for number in range(5):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            while len(line) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3, 4]
    assert line.first is None


def test_one_line_for_a_file() -> None:
    line = line_of("/some/file")
    assert line_of("/some/file") is line
    assert line_of("/some/other") is not line


def test_threads_take_turns(database: Any) -> None:
    engine = sa.create_engine(f"sqlite+libsql:///{database.path}", isolation_level="IMMEDIATE", pool_size=6)
    counts = [0] * 6
    end = time.monotonic() + 1.5

    def write(number: int) -> None:
        bind = engine.execution_options(isolation_level="AUTOCOMMIT" if number < 2 else "IMMEDIATE")
        while time.monotonic() < end:
            with bind.begin() as connection:
                connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
            counts[number] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    assert database.run("SELECT n FROM items WHERE id = 1") == [(sum(counts),)]
    assert min(counts) > sum(counts) / 6 / 4


def test_who_gives_up_leaves_the_line(database: Any) -> None:
    errors: list[str] = []

    def give_up(timeout: float) -> None:
        connection = database.connect(timeout=timeout)
        try:
            connection.execute("UPDATE items SET n = 100")
        except Exception as error:  # noqa: BLE001 - the test looks at it
            errors.append(str(error))
        finally:
            connection.close()

    patient = database.connect(timeout=30)
    with database.held():
        threads = [threading.Thread(target=give_up, args=(timeout,)) for timeout in (0.3, 0.1, 0.2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    patient.execute("UPDATE items SET n = 1")
    patient.commit()
    patient.close()
    assert len(errors) == 3
    assert all("database is locked" in error for error in errors)
    assert database.run("SELECT n FROM items") == [(1,), (1,)]


FORK = """
import os, sys, threading, time, warnings
from aion_timers.libsql import dbapi
from aion_timers.libsql.waiting import line_of
warnings.simplefilter("ignore", DeprecationWarning)
path = sys.argv[1]
holder, waiter = dbapi.connect(path), dbapi.connect(path)
holder.execute("UPDATE items SET n = 1")
thread = threading.Thread(target=waiter.execute, args=("UPDATE items SET n = 2",))
thread.start()
while line_of(path).first is None:
    time.sleep(0.001)
child = os.fork()
if not child:
    os._exit(line_of(path).first is not None)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
holder.rollback()
thread.join()
waiter.rollback()
"""


def test_a_forked_process_has_nobody_waiting(run_python: Any, database: Any) -> None:
    assert run_python(FORK, database.path) == "0"
