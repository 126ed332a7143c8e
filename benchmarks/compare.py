"""Beside others that fire jobs from PostgreSQL: ``make bench-peers``.

A throw-away PostgreSQL server with the settings that it has when nobody changes them, one process, and jobs that are
all due and do next to nothing: how many are fired in a second, from the first claim until the last one is settled. The
contenders take turns in each round; a ratio is made of two rates of one round. Each has a database of its own, and the
others have an environment of their own, which ``peers/constraints.txt`` pins.

==================  ==================================================================================================
ours                `Dispatcher.run_due` with one handler, ``batch`` tried
pgqueuer            its drain mode, batch size and number of queue managers tried; see ``peers/drain_pgqueuer.py``
APScheduler 3       its job store of SQLAlchemy, number of threads tried; a tenth of the jobs, since it removes each in
                    a transaction of its own; see ``peers/drain_apscheduler.py``
==================  ==================================================================================================

What is tried is run once before the rounds, and the best way of each is what the rounds compare.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

from dispatch import BATCHES, PostgresFloor, ratio_of, show, started, worker
from raw import console, new_database, overdue, postgresql_server
from sqlalchemy import URL, create_engine

from aion_timers import TimerEntry, TimerRepository, migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PEERS: Final = Path(__file__).parent / "peers"
TENTH: Final = 10


@dataclass
class Contender:
    """Something that fires jobs.

    Args:
        name: as the table shows it.
        jobs: how many it is given.
        ways: the settings that are tried.
        command: starts it in one of these ways.
        fill: gives it the jobs, unless its own process does.
    """

    name: str
    jobs: int
    ways: Sequence[tuple[int, ...]]
    command: Callable[[tuple[int, ...]], Sequence[str]]
    fill: Callable[[], None] | None = None
    rates: list[float] = field(default_factory=list)
    best: tuple[int, ...] = ()

    def rate(self, way: tuple[int, ...]) -> float:
        """Run it once; jobs a second."""
        if self.fill is not None:
            self.fill()
        with started(self.command(way)) as go:
            ((handled, began, ended),) = go()
        assert handled == self.jobs, (self.name, handled)
        return handled / (ended - began)

    def choose(self) -> None:
        """Try all ways."""
        tried = {way: self.rate(way) for way in self.ways}
        self.best = max(tried, key=lambda way: tried[way])
        console.print(f"{self.name}: " + ", ".join(f"{way}: {rate:,.0f}/s" for way, rate in tried.items()))


def contenders(server: URL, python: Path, jobs: int) -> list[Contender]:
    """Ours and the others, each with a database of its own."""
    urls = [new_database(server, name) for name in ("ours", "pgqueuer", "apscheduler")]
    ours, theirs, psycopg = (url.render_as_string(hide_password=False) for url in urls)
    theirs = theirs.replace("postgresql+psycopg", "postgresql")
    engine = create_engine(urls[0])
    migrate.upgrade(engine)
    floor = PostgresFloor(urls[0])
    fewer = max(1, jobs // TENTH)

    def fill() -> None:
        with engine.begin() as connection:
            TimerRepository(connection).schedule_many([TimerEntry(*timer) for timer in overdue(jobs)])
        floor.settle()

    def command(script: str, *arguments: object) -> Sequence[str]:
        return [str(python), str(PEERS / script), *map(str, arguments)]

    return [
        Contender("ours", jobs, [(batch,) for batch in BATCHES], lambda way: worker("drain", ours, str(way[0])), fill),
        Contender(
            "pgqueuer",
            jobs,
            [(batch, managers) for batch in BATCHES for managers in (1, 5)],
            lambda way: command("drain_pgqueuer.py", theirs, jobs, *way),
        ),
        Contender(
            "APScheduler",
            fewer,
            [(1,), (10,)],
            lambda way: command("drain_apscheduler.py", psycopg, fewer, *way),
        ),
    ]


def main() -> int:
    """Measure and print; a missed goal is no failure unless it is asked for: the machine has its part in it."""
    parser = argparse.ArgumentParser(description="Compare dispatchers with others that fire jobs from PostgreSQL.")
    parser.add_argument("python", type=Path, help="the interpreter of the environment that has the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a goal is missed")
    parser.add_argument("--directory", type=Path, help="where the server keeps its files, for a while; its disk counts")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="aion-timers-bench-", dir=options.directory) as directory,
        postgresql_server(Path(directory)) as server,
    ):
        made = contenders(server, options.python, options.jobs)
        for contender in made:
            contender.choose()
        for number in range(options.rounds):
            for contender in made if number % 2 else reversed(made):
                contender.rates.append(contender.rate(contender.best))
    ours, *others = made
    figures = [
        ratio_of(
            f"drain {ours.best}, of {other.name} {other.best}",
            ours.rates,
            other.rates,
            2 if other.name == "pgqueuer" else None,
        )
        for other in others
    ]
    show(f"{options.rounds} rounds, {options.jobs:,} jobs, one process", figures)
    missed = [figure for figure in figures if figure.met is False]
    console.print(f"goals met: {1 - len(missed)} of 1; median of ours: {median(ours.rates):,.0f}/s")
    return int(options.strict and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
