"""What the processes of the concurrency tests do.

`worker.py rival DATABASE ROW` says `ready`, works until it is sent a line, and prints its result as JSON.
`worker.py idle` does next to nothing, to show how long the machine itself holds a process up.
`worker.py PROCESSES TASK DATABASE ...` lets several processes do a task from the same moment on, and prints the list of
their results. They are forked after the imports, which take longer than most tasks, and before the driver is used.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import aion_timers.libsql
from aion_timers.libsql import BusyError, SnapshotError, dbapi
from aion_timers.libsql.transaction import Transaction


def create(path: str) -> dict[str, object]:
    """Open an empty file at the same moment as others, and write."""
    engine = sa.create_engine(f"sqlite+libsql:///{path}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS starts (a)")
        connection.exec_driver_sql("INSERT INTO starts VALUES (1)")
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    engine.dispose()
    return {"mode": mode}


def rival(path: str, row: str) -> dict[str, object]:
    """Commit without a pause until told to stop."""
    connection = dbapi.connect(path)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    commits = 0
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not stop.is_set():
        connection.execute("UPDATE items SET n = n + 1 WHERE id = ?", (int(row),))
        connection.commit()
        commits += 1
    connection.close()
    return {"commits": commits}


def in_threads(threads: int, work: Callable[[random.Random, Counter[str]], None]) -> Counter[str]:
    total: Counter[str] = Counter()

    def run(seed: int) -> None:
        counts: Counter[str] = Counter()
        work(random.Random(seed), counts)  # noqa: S311 - load, no secret
        total.update(counts)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return total


def skew(path: str, threads: str, transactions: str, compare: str) -> dict[str, object]:
    """Write skew: of each pair of rows one must stay 1, and each transaction reads both and writes one."""
    if compare == "off":
        Transaction._require_unchanged = lambda self, snapshot: None  # type: ignore[method-assign]  # noqa: ARG005, SLF001
    engine = sa.create_engine(f"sqlite+libsql:///{path}", connect_args={"timeout": 30})

    def one(session: Session, chance: random.Random, counts: Counter[str]) -> None:
        pair = chance.randrange(3)
        rows = dict(session.execute(sa.text("SELECT side, on_call FROM pairs WHERE pair = :p"), {"p": pair}).all())
        counts["violations"] += sum(rows.values()) == 0
        time.sleep(chance.uniform(0, 0.002))
        side = chance.randrange(2)
        on_call = not (rows[0] and rows[1])
        session.execute(
            sa.text("UPDATE pairs SET on_call = :on WHERE pair = :p AND side = :s"),
            {"on": on_call, "p": pair, "s": side if not on_call else int(rows[0])},
        )
        session.commit()

    def work(chance: random.Random, counts: Counter[str]) -> None:
        chance.seed(f"{path} {time.time_ns()} {chance.random()}")
        while counts["committed"] < int(transactions):
            with Session(engine) as session:
                try:
                    one(session, chance, counts)
                    counts["committed"] += 1
                except OperationalError as error:
                    if not isinstance(error.orig, SnapshotError):
                        raise
                    counts["retried"] += 1

    counts = in_threads(int(threads), work)
    engine.dispose()
    return dict(counts)


def count(path: str, threads: str, transactions: str, level: str) -> dict[str, object]:
    """Read a counter, add one, write it back; together with a row in another table."""
    engine = sa.create_engine(f"sqlite+libsql:///{path}", isolation_level=level, connect_args={"timeout": 30})

    def work(_: random.Random, counts: Counter[str]) -> None:
        while counts["committed"] < int(transactions):
            with Session(engine) as session:
                try:
                    n = session.execute(sa.text("SELECT n FROM items WHERE id = 1")).scalar_one()
                    session.execute(sa.text("INSERT INTO log VALUES (:n)"), {"n": n})
                    session.execute(sa.text("UPDATE items SET n = :n WHERE id = 1"), {"n": n + 1})
                    session.commit()
                    counts["committed"] += 1
                except OperationalError as error:
                    counts["busy" if isinstance(error.orig, BusyError) else type(error.orig).__name__] += 1

    counts = in_threads(int(threads), work)
    engine.dispose()
    return dict(counts)


def crowd(path: str, threads: str, seconds: str) -> dict[str, object]:
    """Count for a while at level IMMEDIATE, beside a thread that notes how long it was held up at most."""
    engine = sa.create_engine(
        f"sqlite+libsql:///{path}", isolation_level="IMMEDIATE", pool_size=int(threads), connect_args={"timeout": 30}
    )
    end = time.monotonic() + float(seconds)
    each: list[int] = []

    def work(_: random.Random, counts: Counter[str]) -> None:
        while time.monotonic() < end:
            with engine.begin() as connection:
                n = connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar_one()
                connection.exec_driver_sql("INSERT INTO log VALUES (?)", (n,))
                connection.exec_driver_sql("UPDATE items SET n = ? WHERE id = 1", (n + 1,))
            counts["committed"] += 1
        each.append(counts["committed"])

    stalls = [0.0]
    working = True

    def beat() -> None:
        before = time.monotonic()
        while working:
            time.sleep(0.001)
            now = time.monotonic()
            stalls.append(max(stalls.pop(), now - before))
            before = now

    heart = threading.Thread(target=beat)
    heart.start()
    counts = in_threads(int(threads), work)
    working = False
    heart.join()
    engine.dispose()
    return {**counts, "least": min(each, default=0) if len(each) == int(threads) else 0, "stall": stalls[0]}


def idle() -> None:
    """Sync a file of its own now and then; print, for each line that is read, the longest time since the one before."""
    worst = [0.0]

    def beat() -> None:
        with tempfile.TemporaryFile() as file:
            before = time.monotonic()
            while True:
                file.write(b".")
                file.flush()
                os.fdatasync(file.fileno()) if hasattr(os, "fdatasync") else os.fsync(file.fileno())
                time.sleep(0.001)
                now = time.monotonic()
                worst[0] = max(worst[0], now - before)
                before = now

    threading.Thread(target=beat, daemon=True).start()
    for _ in sys.stdin:
        sys.stdout.write(f"{worst[0]}\n")
        sys.stdout.flush()
        worst[0] = 0.0


TASKS: dict[str, Callable[..., dict[str, object]]] = {"create": create, "skew": skew, "count": count, "crowd": crowd}


def together(processes: int, task: str, arguments: list[str]) -> list[dict[str, object]]:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(processes)
    results = context.SimpleQueue()

    def run() -> None:
        start.wait()
        results.put(TASKS[task](*arguments))

    children = [context.Process(target=run) for _ in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    failed = [child for child in children if child.exitcode]
    if failed:
        sys.exit(f"{len(failed)} processes failed")
    return [results.get() for _ in children]


if __name__ == "__main__":
    aion_timers.libsql.register()
    if sys.argv[1] == "idle":
        idle()
    elif sys.argv[1] == "rival":
        sys.stdout.write(json.dumps(rival(*sys.argv[2:])) + "\n")
    else:
        sys.stdout.write(json.dumps(together(int(sys.argv[1]), sys.argv[2], sys.argv[3:])) + "\n")
