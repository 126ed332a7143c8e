"""What threads and processes do to each other on one libSQL file.

``python benchmarks/contention.py [--seconds 10]`` prints one table for read-modify-write (threads of one process, and
processes with two threads each, at level IMMEDIATE and at the default), one for readers beside a writer that never
pauses, and one for sessions that think between their read and their write. It fails if an update is lost, or an error
is seen that is not allowed there.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from aion_timers import Timer, TimerRepository, migrate
from aion_timers.libsql import SnapshotError

METADATA = sa.MetaData()
COUNTERS = sa.Table("counters", METADATA, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
HOT, OTHER, OWN = 1, 2, 10  # the counter that all write; the writer's; the first of those that thinkers have each


def extra_work(session: Session) -> None:
    """What each transaction does beside its counter."""
    TimerRepository(session).schedule(uuid4(), "reminder", datetime(2030, 1, 1, tzinfo=UTC))


def increment(session: Session, counter: int, *, think: float = 0) -> None:
    """Read a counter, think, write it back."""
    n = session.scalars(sa.select(COUNTERS.c.n).where(COUNTERS.c.id == counter)).one()
    time.sleep(think)
    session.execute(sa.update(COUNTERS).where(COUNTERS.c.id == counter).values(n=n + 1))


# -- measuring -------------------------------------------------------------------------------------


@contextmanager
def heartbeat(report: dict[str, float]) -> Iterator[None]:
    """Note the longest stall, in seconds, of a thread that wakes every millisecond."""
    stop = threading.Event()

    def beat() -> None:
        last = time.monotonic()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            report["stall"] = max(report.get("stall", 0), now - last - 0.001)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def attempt(counts: Counter[str], waits: list[float], transaction: Callable[[], None]) -> None:
    """Run a transaction and count how it ended."""
    begun = time.monotonic()
    try:
        transaction()
        counts["committed"] += 1
    except DBAPIError as error:
        counts[type(error.orig).__name__] += 1
    waits.append(time.monotonic() - begun)


def in_threads(
    threads: int, seconds: float, run: Callable[[int, Counter[str], list[float]], None]
) -> dict[str, object]:
    """Let every thread call ``run`` again and again; counts, longest wait and longest stall."""
    end = time.monotonic() + seconds
    results: list[tuple[Counter[str], list[float]]] = []

    def loop(number: int) -> None:
        counts: Counter[str] = Counter()
        waits: list[float] = []
        while time.monotonic() < end:
            run(number, counts, waits)
        results.append((counts, waits))

    report: dict[str, float] = {}
    workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    with heartbeat(report):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    total = sum((counts for counts, _ in results), Counter())
    return {"counts": total, "longest": max(max(waits, default=0) for _, waits in results), "stall": report["stall"]}


def engine_on(path: Path, level: str = "SERIALIZABLE") -> sa.Engine:
    """An engine that waits long enough for every turn."""
    return sa.create_engine(
        f"sqlite+libsql:///{path}", isolation_level=level, connect_args={"timeout": 60}, pool_size=20
    )


def value(path: Path, counter: int) -> int:
    """What a counter says."""
    engine = engine_on(path)
    with engine.connect() as connection:
        n: int = connection.scalars(sa.select(COUNTERS.c.n).where(COUNTERS.c.id == counter)).one()
    engine.dispose()
    return n


def scheduled(path: Path) -> int:
    """How many timers there are."""
    engine = engine_on(path)
    with Session(engine) as session:
        n = session.scalars(sa.select(sa.func.count()).select_from(Timer)).one()
    engine.dispose()
    return n


def fresh(directory: Path) -> Path:
    """A file with its counters at 0."""
    path = directory / f"{random.getrandbits(40):010x}.db"
    engine = engine_on(path)
    METADATA.create_all(engine)
    migrate.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(COUNTERS), [{"id": i, "n": 0} for i in (HOT, OTHER, *range(OWN, OWN + 8))])
    engine.dispose()
    return path


# -- the shapes ------------------------------------------------------------------------------------


def hot_counter(path: Path, level: str, threads: int, seconds: float) -> dict[str, object]:
    """Read-modify-write of one counter, and the extra work, in one process."""
    engine = engine_on(path, level)

    def run(_: int, counts: Counter[str], waits: list[float]) -> None:
        def transaction() -> None:
            with Session(engine) as session, session.begin():
                increment(session, HOT)
                extra_work(session)

        attempt(counts, waits, transaction)

    result = in_threads(threads, seconds, run)
    engine.dispose()
    return result


def hot_counter_in_processes(path: Path, level: str, processes: int, seconds: float) -> dict[str, object]:
    """The same in several processes with two threads each."""
    started = [
        subprocess.Popen(  # noqa: S603 - this very script
            [sys.executable, __file__, "--worker", str(path), level, "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout
        process.stdout.readline()
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in started]
    return {
        "counts": sum((Counter(result["counts"]) for result in results), Counter()),
        "longest": max(result["longest"] for result in results),
        "stall": max(result["stall"] for result in results),
    }


def readers_beside_a_writer(path: Path, seconds: float) -> dict[str, object]:
    """Four threads hold read-only sessions open, one thread writes without a pause."""
    engine = engine_on(path)

    def run(number: int, counts: Counter[str], waits: list[float]) -> None:
        own: Counter[str] = Counter()

        def write() -> None:
            with Session(engine) as session, session.begin():
                session.execute(sa.update(COUNTERS).where(COUNTERS.c.id == HOT).values(n=COUNTERS.c.n + 1))

        def read() -> None:
            with Session(engine) as session:
                for _ in range(10):
                    session.scalars(sa.select(COUNTERS.c.n).where(COUNTERS.c.id == HOT)).one()
                    counts["reads"] += 1
                    time.sleep(0.001)

        attempt(own, waits, read if number else write)
        counts["writes"] += own.pop("committed", 0) if not number else 0
        own.pop("committed", None)
        counts.update(own)

    result = in_threads(5, seconds, run)
    engine.dispose()
    return result


def thinkers_beside_a_writer(path: Path, seconds: float) -> dict[str, object]:
    """Four threads read a row of their own, think 20 ms and write it; one thread writes another row."""
    engine = engine_on(path)

    def run(number: int, counts: Counter[str], waits: list[float]) -> None:
        own: Counter[str] = Counter()

        def transaction() -> None:
            with Session(engine) as session, session.begin():
                increment(session, OWN + number if number else OTHER, think=0.02 if number else 0)

        attempt(own, waits, transaction)
        counts["thinkers" if number else "writes"] += own.pop("committed", 0)
        counts.update(own)

    result = in_threads(5, seconds, run)
    engine.dispose()
    return result


# -- the tables ------------------------------------------------------------------------------------


def show(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print a table."""
    texts = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    print()


def milliseconds(seconds: object) -> str:
    """For people to read."""
    assert isinstance(seconds, float)
    return f"{seconds * 1000:.0f} ms"


def main() -> None:
    """Measure, print and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="how long each shape runs (default: 10)")
    parser.add_argument("--worker", nargs=2, metavar=("FILE", "LEVEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        path, level = arguments.worker
        print(json.dumps(hot_counter(Path(path), level, 2, arguments.seconds)))
        return
    with tempfile.TemporaryDirectory() as directory:
        report(Path(directory), arguments.seconds)


def report(directory: Path, seconds: float) -> None:
    """Run every shape on a file of its own."""
    rows: list[tuple[object, ...]] = []
    for level in ("IMMEDIATE", "SERIALIZABLE"):
        for name, shape, workers in (
            ("8 threads", hot_counter, 8),
            ("4 processes x 2 threads", hot_counter_in_processes, 4),
        ):
            path = fresh(directory)
            result = shape(path, level, workers, seconds)
            counts = result["counts"]
            assert isinstance(counts, Counter)
            committed, retried = counts["committed"], counts[SnapshotError.__name__]
            errors = {kind: n for kind, n in counts.items() if kind not in ("committed", SnapshotError.__name__)}
            lost = max(committed - value(path, HOT), committed - scheduled(path))
            rows.append(
                (
                    f"{name}, {level}",
                    f"{committed / seconds:.0f}",
                    errors or 0,
                    retried,
                    lost,
                    milliseconds(result["longest"]),
                    milliseconds(result["stall"]),
                )
            )
            assert not errors, errors
            assert not lost, f"{lost} updates were lost"
            assert level != "IMMEDIATE" or not retried
    print(f"read-modify-write of one row and a timer scheduled, {seconds:g} s each")
    show(("shape", "transactions/s", "errors", "retries", "lost", "longest wait", "heartbeat stall"), rows)

    result = readers_beside_a_writer(fresh(directory), seconds)
    counts = result["counts"]
    assert isinstance(counts, Counter)
    print("4 threads with read-only sessions held open, 1 thread that writes without a pause")
    failures = counts.total() - counts["reads"] - counts["writes"]
    show(
        ("reads/s", "writes/s", "failures", "longest wait", "heartbeat stall"),
        [
            (
                f"{counts['reads'] / seconds:.0f}",
                f"{counts['writes'] / seconds:.0f}",
                failures,
                milliseconds(result["longest"]),
                milliseconds(result["stall"]),
            )
        ],
    )
    assert not failures, counts

    path = fresh(directory)
    result = thinkers_beside_a_writer(path, seconds)
    counts = result["counts"]
    assert isinstance(counts, Counter)
    failures = counts.total() - counts["thinkers"] - counts["writes"]
    lost = counts["thinkers"] - sum(value(path, OWN + number) for number in range(1, 5))
    print("4 threads that read a row, think 20 ms and write it, 1 thread that writes another row without a pause")
    show(
        ("transactions/s", "writes/s", "failures", "lost", "longest wait"),
        [
            (
                f"{counts['thinkers'] / seconds:.0f}",
                f"{counts['writes'] / seconds:.0f}",
                failures,
                lost,
                milliseconds(result["longest"]),
            )
        ],
    )
    assert not failures, counts
    assert not lost, f"{lost} updates were lost"


if __name__ == "__main__":
    main()
