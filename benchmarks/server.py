"""How close the repository on a libSQL server comes to the published driver on the same one: part of ``make bench``.

The server is sqld on loopback, with its files in memory where there is room, so that it is the way to the server that
is compared and not a disk. Both schedule timers, each in a transaction that is begun and committed: one of them, or
1,000 as one JSON parameter, with the same statements. Ours is `TimerRepository` on an engine; theirs is the driver
alone, the values converted by the few lines of `LibsqlFloor`. Eight threads have a connection each.

The contenders run in turns for a while each, in several rounds; a ratio is made of two rates of the same round. The
driver holds the interpreter's lock for the whole of a round trip. So one of its threads that waits for the database's
lock keeps the owner of that from committing, until the server takes the lock away from the owner after 5 seconds; only
what was committed counts.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import libsql_experimental
from floors import BATCH, LibsqlFloor
from raw import Timer, console, future
from rich.table import Table
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from aion_timers import AsyncTimerRepository, TimerEntry, TimerRepository, migrate

# a file of the checkout, which is no installed package
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.sqld import Sqld

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    Work = Callable[[], object]

GOALS: Final = {("ours", 1): 1.0, ("ours", 8): 3.0, ("ours, async", 1): 1.0, ("ours, async", 8): 1.0}


class ServerFloor(LibsqlFloor):
    """The published driver's connection to a server."""

    def __init__(self, url: URL) -> None:
        self._driver = libsql_experimental.connect(f"http://{url.host}:{url.port}", isolation_level=None)

    def schedule(self, timer: Timer) -> None:
        """Write one timer in a transaction, as ours does."""
        with self.transaction():
            super().schedule(timer)


def in_threads(number: int, seconds: float, make: Callable[[ExitStack], Work]) -> float:
    """How often a second some threads do their work, together; work that gives False was in vain."""
    counts = [0] * number
    ready, go = threading.Barrier(number + 1), threading.Event()
    stop = threading.Event()

    def run(index: int) -> None:
        with ExitStack() as stack:
            work: Any = make(stack)
            work()
            ready.wait()
            go.wait()
            while not stop.is_set():
                counts[index] += work() is not False

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = perf_counter()
    go.set()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (perf_counter() - start)


def ours(url: URL, number: int, seconds: float, many: int) -> float:
    """The sync repository."""
    engine = create_engine(url, pool_size=number, isolation_level="IMMEDIATE")

    def make(_: ExitStack) -> Work:
        def work() -> None:
            entries = [TimerEntry(*timer) for timer in future(many)]
            with engine.begin() as connection:
                timers = TimerRepository(connection)
                if many > 1:
                    timers.schedule_many(entries)
                else:
                    (entry,) = entries
                    timers.schedule(entry.workflow_id, entry.timer_id, entry.fire_at)

        return work

    rate = in_threads(number, seconds, make)
    engine.dispose()
    return rate


def theirs(url: URL, number: int, seconds: float, many: int) -> float:
    """The published driver."""

    def make(stack: ExitStack) -> Work:
        floor = ServerFloor(url)

        def close() -> None:
            floor.close()

        stack.callback(close)

        def work() -> bool:
            nonlocal floor
            timers = list(future(many))
            try:
                if many > 1:
                    floor.schedule_many(timers)
                else:
                    floor.schedule(timers[0])
            except ValueError:  # the driver's only error
                floor.close()
                floor = ServerFloor(url)
                return False
            return True

        return work

    return in_threads(number, seconds, make)


def ours_async(url: URL, number: int, seconds: float, many: int) -> float:
    """The async repository, with as many tasks as there are threads."""

    async def run() -> float:
        engine = create_async_engine(
            url.set(drivername="sqlite+aiolibsql"), pool_size=number, isolation_level="IMMEDIATE"
        )
        count = 0

        async def one() -> None:
            entries = [TimerEntry(*timer) for timer in future(many)]
            async with engine.begin() as connection:
                timers = AsyncTimerRepository(connection)
                if many > 1:
                    await timers.schedule_many(entries)
                else:
                    (entry,) = entries
                    await timers.schedule(entry.workflow_id, entry.timer_id, entry.fire_at)

        async def repeat(until: float) -> None:
            nonlocal count
            while perf_counter() < until:
                await one()
                count += 1

        await asyncio.gather(*(one() for _ in range(number)))
        start = perf_counter()
        await asyncio.gather(*(repeat(start + seconds) for _ in range(number)))
        rate = count / (perf_counter() - start)
        await engine.dispose()
        return rate

    return asyncio.run(run())


def main() -> None:
    """Measure and print; a missed goal is shown and is no failure, since the machine has its part in it."""
    parser = argparse.ArgumentParser(description="Compare the repository on a server with the published driver.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long a contender's turn is")
    options = parser.parse_args()
    table = Table(title=f"libSQL server: ours against the published driver, {options.rounds} rounds, medians a second")
    for title in ("operation", "workers", "ours", "ours/s", "theirs/s", "min", "median", "max", "goal", ""):
        table.add_column(title)
    met = []
    with Sqld.started() as server:
        engine = create_engine(server.url)
        migrate.upgrade(engine)
        for many in (1, BATCH):
            for number in (1, 8):
                rates: dict[str, list[float]] = {"theirs": [], "ours": [], "ours, async": []}
                contenders = {"theirs": theirs, "ours": ours, "ours, async": ours_async}
                for round_number in range(options.rounds):
                    for name in list(contenders)[:: 1 if round_number % 2 else -1]:
                        with engine.begin() as connection:
                            connection.exec_driver_sql("DELETE FROM timers")
                        rates[name].append(contenders[name](server.url, number, options.seconds, many) * many)
                for name in ("ours", "ours, async"):
                    ratios = sorted(
                        mine / (other or 1e-9) for mine, other in zip(rates[name], rates["theirs"], strict=True)
                    )
                    goal = GOALS[name, number]
                    met.append(median(ratios) >= goal)
                    table.add_row(
                        "schedule" if many == 1 else f"schedule_many of {many:,}",
                        str(number),
                        name,
                        f"{median(rates[name]):,.0f}",
                        f"{median(rates['theirs']):,.0f}",
                        *(f"{ratio:.2f}" for ratio in (ratios[0], median(ratios), ratios[-1])),
                        f">= {goal:g}",
                        "[green]met[/]" if met[-1] else "[red]missed[/]",
                    )
                table.add_section()
        engine.dispose()
    console.print(table)
    console.print(f"goals met: {sum(met)} of {len(met)}")


if __name__ == "__main__":
    main()
