# ruff: noqa: S608 - its statements are constants
"""How close the repository comes to the raw drivers: ``make bench``.

Two databases: libSQL files (WAL, ``synchronous=FULL``) and a throw-away PostgreSQL server with the settings that it has
when nobody changes them, so each commit reaches the disk. In each, two tables made by the migrations: a large one,
which `schedule_many` fills from a generator, and a small one of 1,000 rows; both grow by what is measured. No timer is
due at first; some are added for the last two operations.

A measurement runs its contenders in turns, some turns in each of several rounds, the order of the contenders reversed
from turn to turn. A ratio is made of two rates of the same round, and only ratios mean something on a machine that
does other things too. Before an operation is measured, its contenders show that they give or store the same.

What every contender begins with is Python's: a ``uuid.UUID``, a name or a number, an aware datetime in UTC. What every
one ends with is the same information, in the order of instant, workflow id and timer id.

==================  ==================================================================================================
ours                the methods of `TimerRepository` on a connection of SQLAlchemy: at AUTOCOMMIT for ``schedule`` and
                    ``expired``, in a transaction that is begun and committed for ``schedule_many`` and ``take``.
                    `TimerEntry` objects are made within the measured time.
raw                 the same with the driver alone: one connection with the same settings, the same transactions, the
                    values converted within the measured time by the few lines of `LibsqlFloor` and `PostgresFloor`,
                    which check nothing. Constant statement texts.
bare                the raw statement alone: its parameters were converted before, its rows are left as they came.
==================  ==================================================================================================

The raw statements are the fastest of those tried:

==================  ================================================  ================================================
operation           libSQL                                            PostgreSQL
==================  ================================================  ================================================
``schedule``        upsert of one row                                 upsert of one row, prepared
``schedule_many``   upsert of sorted rows from one JSON parameter     upsert of sorted rows from three binary arrays
                    (``json_each``); ``raw 2`` has them in 1,000      (``unnest``), prepared; ``raw 2`` has them in
                    VALUES                                            text arrays, as psycopg sends lists by itself
``expired``         SELECT of text                                    SELECT in binary, prepared, in a session in UTC
``take``            one DELETE of those that a limited, ordered       the same, the subselect with FOR UPDATE SKIP
                    subselect names, RETURNING; sorted in Python      LOCKED, as two workers need it; in binary
==================  ================================================  ================================================

``raw 2`` is the second best way; the goal is against whichever of the two is faster in the run. The first lines of a
database compare `expired` with itself where nothing is due, many future rows against 1,000: how many times as long it
takes. For all other lines a ratio says what part of the other's rate is ours.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from raw import (
    LibsqlRaw,
    Parameters,
    PostgresRaw,
    Raw,
    Row,
    Timer,
    console,
    future,
    new_database,
    overdue,
    postgresql_server,
    timer_id_text,
    to_json,
)
from rich.table import Table
from sqlalchemy import URL, Engine, create_engine

from aion_timers import TimerEntry, TimerRepository, migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SMALL: Final = 1_000
BATCH: Final = 1_000
SAMPLE: Final = 10_000
PAGE: Final = 100


# -- the raw drivers --------------------------------------------------------------------------------------------------

_INTO: Final = "INSERT INTO timers (workflow_id, timer_id, fire_at)"
_OR_MOVE: Final = "ON CONFLICT (workflow_id, timer_id) DO UPDATE SET fire_at = excluded.fire_at"
_SELECT: Final = "SELECT workflow_id, timer_id, fire_at FROM timers"
_FIRST: Final = "ORDER BY fire_at, workflow_id, timer_id LIMIT"
_DELETE: Final = "DELETE FROM timers WHERE (workflow_id, timer_id) IN (SELECT workflow_id, timer_id FROM timers"
_RETURNING: Final = "RETURNING workflow_id, timer_id, fire_at"


class Floor(Raw):
    """The work of the repository, done with a driver alone."""

    _one: str
    _many: str
    _many_2: str
    _first_due: str
    _take: str

    def schedule(self, timer: Timer) -> None:
        """Write one timer."""
        self.execute(self._one, self.single(timer))

    def schedule_bare(self, parameters: Parameters) -> None:
        """Write the timer that `single` has converted."""
        self.execute(self._one, parameters)

    def schedule_many(self, timers: Sequence[Timer]) -> None:
        """Write `BATCH` timers."""
        self.schedule_many_bare(self.batch(timers))

    def schedule_many_2(self, timers: Sequence[Timer]) -> None:
        """Write `BATCH` timers in the second way."""
        parameters = self._batch_2(timers)
        with self.transaction():
            self.execute(self._many_2, parameters)

    def schedule_many_bare(self, parameters: Parameters) -> None:
        """Write the timers that `batch` has converted."""
        with self.transaction():
            self.execute(self._many, parameters)

    def expired(self, limit: int) -> list[Timer]:
        """The first due timers."""
        return self.decoded(self.expired_bare(limit))

    def expired_bare(self, limit: int) -> list[Row]:
        """The first due rows as they come."""
        rows: list[Row] = self.execute(self._first_due, (limit,)).fetchall()
        return rows

    def take(self, limit: int) -> list[Timer]:
        """Delete the first due timers and return them."""
        return self.decoded(sorted(self.take_bare(limit), key=lambda row: (row[2], row[0], row[1])))

    def take_bare(self, limit: int) -> list[Row]:
        """Delete the first due rows and return them as they come, in any order."""
        with self.transaction():
            rows: list[Row] = self.execute(self._take, (limit,)).fetchall()
        return rows

    def single(self, timer: Timer) -> Parameters:
        """One timer as the driver takes it."""
        raise NotImplementedError

    def batch(self, timers: Sequence[Timer]) -> Parameters:
        """Many timers as the driver takes them, sorted by key."""
        raise NotImplementedError

    def _batch_2(self, timers: Sequence[Timer]) -> Parameters:
        raise NotImplementedError


class LibsqlFloor(LibsqlRaw, Floor):
    """The floor of a libSQL file."""

    _one = f"{_INTO} VALUES (?, ?, ?) {_OR_MOVE}"
    _many = f"{_INTO} SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?) WHERE true {_OR_MOVE}"
    _many_2 = f"{_INTO} VALUES {', '.join(['(?, ?, ?)'] * BATCH)} {_OR_MOVE}"
    _due = "WHERE fire_at <= strftime('%Y-%m-%dT%H:%M:%f000000Z', 'now')"
    _first_due = f"{_SELECT} {_due} {_FIRST} ?"
    _take = f"{_DELETE} {_due} {_FIRST} ?) {_RETURNING}"

    def single(self, timer: Timer) -> tuple[str, str, str]:
        """The three texts that are stored."""
        workflow_id, timer_id, fire_at = timer
        instant = fire_at.isoformat(timespec="microseconds")
        return f'"{workflow_id}"', timer_id_text(timer_id), f"{instant[:26]}000Z"

    def batch(self, timers: Sequence[Timer]) -> Parameters:
        """One JSON text."""
        return (to_json(sorted([self.single(timer) for timer in timers])),)

    def _batch_2(self, timers: Sequence[Timer]) -> Parameters:
        return tuple([value for row in sorted([self.single(timer) for timer in timers]) for value in row])


class PostgresFloor(PostgresRaw, Floor):
    """The floor of a PostgreSQL server."""

    _one = f"{_INTO} VALUES (%b, %b, %b) {_OR_MOVE}"
    _many = f"{_INTO} SELECT * FROM unnest(%b::uuid[], %b::text[], %b::timestamptz[]) {_OR_MOVE}"
    _many_2 = f"{_INTO} SELECT * FROM unnest(%t::uuid[], %t::text[], %t::timestamptz[]) {_OR_MOVE}"
    _due = "WHERE fire_at <= statement_timestamp()"
    _first_due = f"{_SELECT} {_due} {_FIRST} %b"
    _take = f"{_DELETE} {_due} {_FIRST} %b FOR UPDATE SKIP LOCKED) {_RETURNING}"

    def single(self, timer: Timer) -> Parameters:
        """The timer with its id encoded."""
        workflow_id, timer_id, fire_at = timer
        return workflow_id, timer_id_text(timer_id), fire_at

    def batch(self, timers: Sequence[Timer]) -> Parameters:
        """A list for each column."""
        # sorted by the number, since comparing two UUID objects runs Python code
        ordered = sorted([(timer[0].int, timer_id_text(timer[1]), timer[0], timer[2]) for timer in timers])
        return [row[2] for row in ordered], [row[1] for row in ordered], [row[3] for row in ordered]

    _batch_2 = batch


# -- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """The same work by the repository, on a connection at AUTOCOMMIT and one with transactions."""

    def __init__(self, engine: Engine) -> None:
        self._autocommit = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._transactional = engine.connect()

    def schedule(self, timer: Timer) -> None:
        """Write one timer."""
        TimerRepository(self._autocommit).schedule(*timer)

    def schedule_many(self, timers: Sequence[Timer]) -> None:
        """Write `BATCH` timers."""
        with self._transactional.begin():
            TimerRepository(self._transactional).schedule_many(TimerEntry(*timer) for timer in timers)

    def expired(self, limit: int) -> list[TimerEntry]:
        """The first due timers."""
        return TimerRepository(self._autocommit).expired(limit=limit)

    def take(self, limit: int) -> list[TimerEntry]:
        """Delete the first due timers and return them."""
        with self._transactional.begin():
            return TimerRepository(self._transactional).take(limit=limit)

    def require(self, timer: Timer) -> None:
        """Fail unless the timer is stored as it is."""
        stored = TimerRepository(self._autocommit).get(timer[0], timer[1])
        assert stored is not None
        assert plain([stored]) == [timer]

    def close(self) -> None:
        """Close the connections."""
        self._autocommit.close()
        self._transactional.close()


def plain(timers: Sequence[TimerEntry]) -> list[Timer]:
    """Entries as the raw drivers' functions return them."""
    return [(timer.workflow_id, timer.timer_id.value, timer.fire_at) for timer in timers]


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """Something that is timed.

    Args:
        name: as the table shows it.
        run: does the work once, with what ``load`` made.
        load: makes, outside the measured time, what each run is given.
    """

    name: str
    run: Callable[[Any], object]
    load: Callable[[], Any]
    rates: list[float] = field(default_factory=list)


def race(
    contenders: Sequence[Contender],
    effort: Effort,
    *,
    runs: int,
    units: int,
    clock: Callable[[], float] = perf_counter,
) -> None:
    """Fill each contender's rates: the units a second of each round; a turn is ``runs`` runs of ``units`` units."""
    for round_number in range(-1, effort.rounds):
        seconds = dict.fromkeys((contender.name for contender in contenders), 0.0)
        for turn in range(effort.turns):
            for contender in contenders if (round_number + turn) % 2 else reversed(contenders):
                loads = [contender.load() for _ in range(runs)]
                run = contender.run
                gc.collect()
                start = clock()
                for load in loads:
                    run(load)
                seconds[contender.name] += clock() - start
        if round_number < 0:
            continue  # the caches are warm now
        for contender in contenders:
            contender.rates.append(effort.turns * runs * units / seconds[contender.name])


def at_least(contenders: Sequence[Contender], operation: str, rows: str, goal: float) -> list[Line]:
    """The lines of an operation: the goal is for the first contender's rate against the faster raw one's."""
    ours = contenders[0]
    raw = [other for other in contenders if other.name.startswith("raw")]
    fastest = max(raw, key=lambda other: median(other.rates))
    lines = []
    for other in contenders[1:]:
        ratios = [mine / theirs for mine, theirs in zip(ours.rates, other.rates, strict=True)]
        judged = goal if other is fastest else None
        lines.append(Line(operation, rows, other.name, median(ours.rates), median(other.rates), ratios, judged))
    return lines


@dataclass
class Line:
    """One line of the printed table; at most or at least the goal, as the sign says."""

    operation: str
    rows: str
    against: str
    ours: float
    theirs: float
    ratios: list[float]
    goal: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, if there is one."""
        if self.goal is None:
            return None
        return median(self.ratios) <= self.goal if self.at_most else median(self.ratios) >= self.goal


# -- the operations ---------------------------------------------------------------------------------------------------


@dataclass
class Store:
    """One table with both ways to it."""

    engine: Engine
    floor: Floor
    ours: Ours
    rows: int

    @property
    def size(self) -> str:
        """How many rows it is filled with."""
        return f"{self.rows:,}"

    def close(self) -> None:
        """Close all connections."""
        self.ours.close()
        self.floor.close()
        self.engine.dispose()


@dataclass
class Effort:
    """How much of everything: turns are short enough that a disturbance meets all contenders alike."""

    rounds: int
    turns: int
    singles: int
    batches: int
    pages: int
    takes: int


def schedule(store: Store, effort: Effort) -> list[Line]:
    """One timer, committed."""
    ours, floor = store.ours, store.floor
    for write in (ours.schedule, floor.schedule, lambda timer: floor.schedule_bare(floor.single(timer))):
        (timer,) = future(1)
        write(timer)
        ours.require(timer)
    contenders = [
        Contender("ours", ours.schedule, lambda: next(future(1))),
        Contender("raw", floor.schedule, lambda: next(future(1))),
        Contender("bare", floor.schedule_bare, lambda: floor.single(next(future(1)))),
    ]
    race(contenders, effort, runs=effort.singles, units=1)
    return at_least(contenders, "schedule", store.size, 0.6)


def schedule_many(store: Store, effort: Effort) -> list[Line]:
    """A batch of timers in a transaction."""
    ours, floor = store.ours, store.floor

    def load() -> list[Timer]:
        return list(future(BATCH))

    contenders = [
        Contender("ours", ours.schedule_many, load),
        Contender("raw", floor.schedule_many, load),
        Contender("raw 2", floor.schedule_many_2, load),
        Contender("bare", floor.schedule_many_bare, lambda: floor.batch(load())),
    ]
    for contender in contenders[:-1]:
        timers = load()
        contender.run(timers)
        ours.require(timers[0])
        ours.require(timers[-1])
    race(contenders, effort, runs=effort.batches, units=BATCH)
    return at_least(contenders, f"schedule_many of {BATCH:,}", store.size, 0.8)


def expired(store: Store, effort: Effort) -> list[Line]:
    """The first page of what is due."""
    ours, floor = store.ours, store.floor
    assert plain(ours.expired(PAGE)) == floor.expired(PAGE)
    assert len(floor.expired_bare(PAGE)) == PAGE
    contenders = [
        Contender("ours", ours.expired, lambda: PAGE),
        Contender("raw", floor.expired, lambda: PAGE),
        Contender("bare", floor.expired_bare, lambda: PAGE),
    ]
    race(contenders, effort, runs=effort.pages, units=1)
    return at_least(contenders, f"expired(limit={PAGE})", store.size, 0.5)


def take(store: Store, effort: Effort) -> list[Line]:
    """Batches of what is due, the contenders taking from one heap, which is filled again for each of them."""
    ours, floor = store.ours, store.floor
    due = floor.expired(3 * BATCH)
    assert plain(ours.take(BATCH)) == due[:BATCH]
    assert floor.take(BATCH) == due[BATCH : 2 * BATCH]
    assert len(floor.take_bare(BATCH)) == BATCH
    contenders = [
        Contender("ours", ours.take, lambda: BATCH),
        Contender("raw", floor.take, lambda: BATCH),
        Contender("bare", floor.take_bare, lambda: BATCH),
    ]
    race(contenders, effort, runs=effort.takes, units=BATCH)
    assert len(floor.expired(BATCH)) == BATCH, "the heap of due timers was too small"
    return at_least(contenders, f"take(limit={BATCH:,})", store.size, 0.7)


def due_for(effort: Effort) -> int:
    """How many due timers `take` needs, and a batch more."""
    return BATCH * (3 * (1 + effort.turns * (effort.rounds + 1) * effort.takes) + 1)


def nothing_due(large: Store, small: Store, effort: Effort) -> list[Line]:
    """The cost of asking where nothing is due, with many future timers against few."""
    assert large.ours.expired(PAGE) == small.ours.expired(PAGE) == []
    contenders = [
        Contender("large", large.ours.expired, lambda: PAGE),
        Contender("small", small.ours.expired, lambda: PAGE),
        Contender("raw large", large.floor.expired, lambda: PAGE),
        Contender("raw small", small.floor.expired, lambda: PAGE),
    ]
    race(contenders, effort, runs=effort.pages, units=1)
    lines = []
    for title, (many, few), goal in (("ours", contenders[:2], 1.3), ("raw", contenders[2:], None)):
        # times, not rates: how many times as long it takes
        ratios = [less / more for more, less in zip(many.rates, few.rates, strict=True)]
        rates = median(many.rates), median(few.rates)
        lines.append(
            Line(f"expired, none due: {title}", large.size, f"{small.size} rows", *rates, ratios, goal, at_most=True)
        )
    return lines


# -- filling ----------------------------------------------------------------------------------------------------------


def fill(store: Store) -> str:
    """Fill the table by one call over a generator; what that took."""
    memory: list[int] = []

    def entries() -> Iterator[TimerEntry]:
        for number, timer in enumerate(future(store.rows)):
            if number % SAMPLE == 0:
                memory.append(_memory())
            yield TimerEntry(*timer)

    start = perf_counter()
    with store.engine.begin() as connection:
        assert TimerRepository(connection).schedule_many(entries()) == store.rows
    seconds = perf_counter() - start
    memory.append(_memory())
    # the first sample is from before the first statement
    first, most = (f"{size / 2**20:.1f} MiB" for size in (memory[1], max(memory[1:])))
    store.floor.settle()
    return (
        f"schedule_many over a generator of {store.size}: {seconds:.1f} s, {store.rows / seconds:,.0f} a second;"
        f" memory {first} after the first {SAMPLE:,}, at most {most} later"
    )


def _memory() -> int:
    """The memory that this process occupies, in bytes; where the system doesn't tell, the most that it ever did."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


# -- databases --------------------------------------------------------------------------------------------------------


@contextmanager
def libsql_stores(directory: Path, sizes: Sequence[int]) -> Iterator[list[Store]]:
    """Files of libSQL for these sizes, still empty."""
    made = []
    for size in sizes:
        path = directory / f"{size}.db"
        engine = create_engine(URL.create("sqlite+libsql", database=str(path)))
        migrate.upgrade(engine)
        made.append(Store(engine, LibsqlFloor(path), Ours(engine), size))
    yield made
    for store in made:
        store.close()


@contextmanager
def postgresql_stores(directory: Path, sizes: Sequence[int]) -> Iterator[list[Store]]:
    """Databases for these sizes, still empty, on a server of their own."""
    with postgresql_server(directory) as url:
        made = []
        for size in sizes:
            own = new_database(url, f"timers_{size}")
            engine = create_engine(own)
            migrate.upgrade(engine)
            made.append(Store(engine, PostgresFloor(own), Ours(engine), size))
        yield made
        for store in made:
            store.close()


DATABASES: Final = {"libsql": libsql_stores, "postgresql": postgresql_stores}


# -- the command ------------------------------------------------------------------------------------------------------


def measure(name: str, directory: Path, rows: int, effort: Effort) -> list[Line]:
    """Everything on one database."""
    with DATABASES[name](directory, [rows, SMALL]) as (large, small):
        console.print(f"[bold]{name}[/]: {fill(large)}")
        fill(small)
        lines = nothing_due(large, small, effort)
        for store in (small, large):
            lines += schedule(store, effort)
            lines += schedule_many(store, effort)
        with large.engine.begin() as connection:
            TimerRepository(connection).schedule_many(TimerEntry(*timer) for timer in overdue(due_for(effort)))
        large.floor.settle()
        lines += expired(large, effort)
        lines += take(large, effort)
    return lines


def show(name: str, lines: Sequence[Line], rounds: int) -> None:
    """Print the table of one database."""
    table = Table(title=f"{name}: ours against the raw driver, {rounds} rounds, medians a second")
    for title in ("operation", "rows", "against"):
        table.add_column(title)
    for title in ("ours/s", "theirs/s", "min", "median", "max", "goal", ""):
        table.add_column(title, justify="right")
    before = None
    for line in lines:
        if before not in (None, (line.operation, line.rows)):
            table.add_section()
        first = before != (line.operation, line.rows)
        before = (line.operation, line.rows)
        ratios = (f"{ratio:.2f}" for ratio in (min(line.ratios), median(line.ratios), max(line.ratios)))
        goal = "" if line.goal is None else f"{'<=' if line.at_most else '>='} {line.goal}"
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[line.met]
        operation, rows = (line.operation, line.rows) if first else ("", "")
        table.add_row(operation, rows, line.against, f"{line.ours:,.0f}", f"{line.theirs:,.0f}", *ratios, goal, verdict)
    console.print(table)


def main() -> None:
    """Measure and print; a missed goal is shown and is no failure, since the machine has its part in it."""
    parser = argparse.ArgumentParser(description="Compare the repository with the raw drivers.")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (9, or 4 with --quick)")
    parser.add_argument("--rows", type=int, help="rows of the large table (1,000,000, or 50,000 with --quick)")
    parser.add_argument("--database", choices=[*DATABASES, "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows: done in a minute")
    parser.add_argument("--directory", type=Path, help="where the databases are made, for a while; its disk counts")
    options = parser.parse_args()
    rounds = options.rounds or (4 if options.quick else 9)
    rows = options.rows or (50_000 if options.quick else 1_000_000)
    if rows == SMALL:
        parser.error(f"--rows must differ from {SMALL:,}, the rows of the small table")
    effort = Effort(
        rounds, turns=2 if options.quick else 4, singles=40, batches=1 if options.quick else 2, pages=100, takes=1
    )
    lines = []
    for name in DATABASES if options.database == "both" else [options.database]:
        with tempfile.TemporaryDirectory(prefix="aion-timers-bench-", dir=options.directory) as directory:
            measured = measure(name, Path(directory), rows, effort)
        show(name, measured, rounds)
        lines += measured
    judged = [line for line in lines if line.met is not None]
    console.print(f"goals met: {sum(line.met is True for line in judged)} of {len(judged)}")


if __name__ == "__main__":
    main()
