"""What a statement costs more through `aion_timers.libsql` than through the raw driver: ``make bench``.

Two files (WAL, ``synchronous=FULL``) with the same small table, one connection each. The statements are those that an
application sends again and again, so the layer knows their texts already. A committed upsert is timed with its wait for
the disk. The others wait for nothing, so it is processor time that counts, which other programs disturb least; in a
transaction, which is rolled back in the end, nothing hides what the layer adds. A ratio says how many times as long a
statement takes through the layer; it is made of two rates of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, Final

from floors import Contender, Effort, Line, race, show
from raw import LibsqlRaw, console

from aion_timers.libsql import dbapi

if TYPE_CHECKING:
    from collections.abc import Callable

    from raw import Parameters

    Clock = Callable[[], float]

ROWS: Final = 1_000
_TABLE: Final = "CREATE TABLE entries (name TEXT PRIMARY KEY, n INTEGER) WITHOUT ROWID"
_UPSERT: Final = "INSERT INTO entries VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = excluded.n"
_SELECT: Final = "SELECT name, n FROM entries WHERE name = ?"


class Layer:
    """The layer and the driver, each with a file of its own."""

    def __init__(self, directory: Path) -> None:
        self.ours = dbapi.connect(directory / "ours.db", isolation_level="AUTOCOMMIT")
        dbapi.connect(directory / "raw.db").close()  # puts it into WAL mode
        self.raw = LibsqlRaw(directory / "raw.db")
        for connection in (self.ours, self.raw):
            connection.execute("BEGIN", ())
            connection.execute(_TABLE, ())
            for number in range(ROWS):
                connection.execute(_UPSERT, (f"name {number}", number))
            connection.execute("COMMIT", ())

    def upserts(self, operation: str, effort: Effort, runs: int, goal: float | None, clock: Clock) -> Line:
        """Give a row another number."""
        numbers = itertools.count()

        def load() -> Parameters:
            number = next(numbers)
            return f"name {number % ROWS}", number

        def writer(execute: Callable[..., Any]) -> Callable[[Parameters], object]:
            return lambda row: execute(_UPSERT, row)

        contenders = []
        for name, execute in (("ours", self.ours.execute), ("raw", self.raw.execute)):
            write = writer(execute)
            write(("name 0", -1))
            assert execute("SELECT n FROM entries WHERE name = 'name 0'", ()).fetchone() == (-1,)
            contenders.append(Contender(name, write, load))
        return compared(operation, contenders, effort, runs, goal=goal, clock=clock)

    def selects(self, operation: str, effort: Effort, runs: int, goal: float | None) -> Line:
        """Read a row by its key."""
        names = itertools.cycle([(f"name {number}",) for number in range(ROWS)])

        def reader(execute: Callable[..., Any]) -> Callable[[Parameters], Any]:
            return lambda name: execute(_SELECT, name).fetchone()

        contenders = []
        for name, execute in (("ours", self.ours.execute), ("raw", self.raw.execute)):
            read = reader(execute)
            assert read(("name 7",))[0] == "name 7"
            contenders.append(Contender(name, read, lambda: next(names)))
        return compared(operation, contenders, effort, runs, goal=goal, clock=process_time)

    def measure(self, effort: Effort) -> list[Line]:
        """All lines."""
        lines = [
            self.upserts("upsert, committed", effort, effort.singles, 1.3, perf_counter),
            self.selects("select of one row", effort, effort.pages, 1.5),
        ]
        for connection in (self.ours, self.raw):
            connection.execute("BEGIN IMMEDIATE", ())
        lines += [
            self.upserts("upsert in a transaction", effort, effort.pages, None, process_time),
            self.selects("select of one row in a transaction", effort, effort.pages, None),
        ]
        for connection in (self.ours, self.raw):
            connection.execute("ROLLBACK", ())
        return lines

    def close(self) -> None:
        """Close both."""
        self.ours.close()
        self.raw.close()


def compared(
    operation: str, contenders: list[Contender], effort: Effort, runs: int, *, goal: float | None, clock: Clock
) -> Line:
    """How many times as long ours takes."""
    race(contenders, effort, runs=runs, units=1, clock=clock)
    ours, raw = contenders
    ratios = [theirs / mine for mine, theirs in zip(ours.rates, raw.rates, strict=True)]
    return Line(operation, f"{ROWS:,}", "raw", median(ours.rates), median(raw.rates), ratios, goal, at_most=True)


def main() -> None:
    """Measure and print; a missed goal is shown and is no failure, since the machine has its part in it."""
    parser = argparse.ArgumentParser(description="Compare the libSQL layer with the driver.")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (9, or 4 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: done in seconds")
    parser.add_argument("--directory", type=Path, help="where the files are made, for a while; its disk counts")
    options = parser.parse_args()
    rounds = options.rounds or (4 if options.quick else 9)
    effort = Effort(rounds, turns=20, singles=10, batches=0, pages=200, takes=0)
    with tempfile.TemporaryDirectory(prefix="aion-timers-bench-", dir=options.directory) as directory:
        layer = Layer(Path(directory))
        lines = layer.measure(effort)
        layer.close()
    show("libsql, how many times as long a statement takes", lines, rounds)
    judged = [line for line in lines if line.met is not None]
    console.print(f"goals met: {sum(line.met is True for line in judged)} of {len(judged)}")


if __name__ == "__main__":
    main()
