"""Workers are killed at random instants, and a server with them: nothing is lost, early, or done twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import URL, Engine, create_engine, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from aion_timers import StoreUnavailableError, Timer, TimerEntry, TimerRepository, migrate
from tests import crashing
from tests.conftest import PostgresServer
from tests.crashing import EFFECTS, IN_TRANSACTION, ORDERS, PLAIN, ROUNDS, STEP, as_text

T = TypeVar("T")
OUTAGE = (DBAPIError, StoreUnavailableError)

PER_KILL = 4
"""How many workflows, each with a timer of every kind, are added before a kill."""

HOSTS = 2


@dataclass
class Promise:
    """What the application has asked for the timers of one workflow, and what it was told."""

    start: datetime
    cancelled: bool | None = False
    """Whether the timer `gone` was cancelled; None if the answer was lost."""
    moved: datetime | None = None
    """To when the timer `moved` was moved."""
    moved_by: datetime | None = None
    """A time, by the clock that decides, at which the move was known to be committed; None if the answer was lost."""


@dataclass
class Host:
    """A part of the application, which schedules, cancels and moves timers while workers and servers are killed."""

    engine: Engine
    chance: random.Random
    promises: dict[UUID, Promise] = field(default_factory=dict)
    answers_lost: int = 0

    def work(self, many: int) -> None:
        """Add some workflows, and change the timers of one."""
        time.sleep(self.chance.uniform(0, 0.05))
        self._add(many)
        time.sleep(self.chance.uniform(0, 0.1))
        self._interfere()

    def _add(self, many: int) -> None:
        """Commit some workflows, all of them due within a moment."""
        workflow_ids = [UUID(int=self.chance.getrandbits(128), version=4) for _ in range(many)]
        start = self._now() + timedelta(seconds=self.chance.uniform(-0.5, 0.5))

        def order(session: Session) -> bool:
            session.execute(insert(ORDERS), [{"workflow_id": workflow_id} for workflow_id in workflow_ids])
            names = (*IN_TRANSACTION, PLAIN)
            TimerRepository(session).schedule_many(
                TimerEntry(id_, name, start) for id_ in workflow_ids for name in names
            )
            return True

        while not (self._perhaps(order) or self._answer(lambda session: self._are_stored(session, workflow_ids))):
            pass
        self.promises |= {workflow_id: Promise(start) for workflow_id in workflow_ids}

    @staticmethod
    def _are_stored(session: Session, workflow_ids: list[UUID]) -> bool:
        return bool(session.scalars(select(ORDERS).where(ORDERS.c.workflow_id.in_(workflow_ids))).all())

    def _interfere(self) -> None:
        """Cancel a timer and move another one, which may be waiting, held, or gone."""
        # once each: to schedule a timer again at the instant at which it has fired is to have it fire again
        workflow_id = self.chance.choice([one for one, promise in self.promises.items() if promise.moved is None])
        promise = self.promises[workflow_id]
        promise.cancelled = self._perhaps(lambda session: TimerRepository(session).cancel(workflow_id, "gone"))
        later = promise.moved = promise.start + timedelta(seconds=2)
        if self._perhaps(lambda session: TimerRepository(session).schedule(workflow_id, "moved", later)) is not None:
            promise.moved_by = self._now()

    def _now(self) -> datetime:
        return self._answer(lambda session: TimerRepository(session).now())

    def _perhaps(self, work: Callable[[Session], T]) -> T | None:
        """Commit a transaction; None if nobody knows whether that happened."""
        try:
            with Session(self.engine) as session, session.begin():
                return work(session)
        except OUTAGE:
            self.answers_lost += 1
            return None

    def _answer(self, question: Callable[[Session], T]) -> T:
        """Ask until the database answers."""
        deadline = time.monotonic() + 60
        while True:
            try:
                with Session(self.engine) as session:
                    return question(session)
            except OUTAGE:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


@dataclass
class Tally:
    """What became of it all."""

    database: str
    seed: int
    kills: int = 0
    in_handler: int = 0
    in_transaction: int = 0
    in_commit: int = 0
    restarts: int = 0
    answers_lost: int = 0
    timers: int = 0
    effects: int = 0
    taken_over: int = 0
    """Effects of those timers, that never fail by themselves, which a worker had claimed before and not settled."""
    plain_twice: int = 0
    lost: int = 0
    early: int = 0
    double: int = 0
    left: int = 0
    seconds: int = 0


class Workers:
    """Some processes that fire timers; one that is killed is replaced."""

    def __init__(self, urls: list[URL], chance: random.Random) -> None:
        # forked from a server that has imported everything and opened nothing, so that a worker starts at once
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([crashing.__name__])
        self._urls = urls
        self._chance = chance
        self._alive: list[tuple[Any, Any]] = []

    def fill_up(self, many: int) -> None:
        """Start what is missing."""
        while len(self._alive) < many:
            counts = self._context.RawArray("i", len(crashing.STAGES))
            url = self._chance.choice(self._urls).render_as_string(hide_password=False)
            process = self._context.Process(target=crashing.fire_until_killed, args=(url, counts))
            process.start()
            self._alive.append((process, counts))

    def kill(self, tally: Tally) -> None:
        """Kill one of them: at any moment, or soon after it has begun to work; count what it was doing."""
        which = self._chance.randrange(len(self._alive))
        deadline = time.monotonic() + self._chance.choice([0, 1, 1])
        while time.monotonic() < deadline and not any(self._alive[which][1]):
            time.sleep(0.001)
        time.sleep(self._chance.uniform(0, self._chance.choice([0.005, 0.02, 0.2])))
        process, counts = self._alive.pop(which)
        assert process.is_alive(), f"a worker ended by itself, with {process.exitcode} ({tally})"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        tally.kills += 1
        tally.in_handler += any(counts)
        tally.in_transaction += counts[crashing.TRANSACTIONS] > 0
        tally.in_commit += counts[crashing.COMMITS] > 0

    def end(self) -> None:
        """Kill them all."""
        for process, _ in self._alive:
            process.kill()
            process.join()
        self._alive.clear()


def wait_for_an_empty_table(engine: Engine, seconds: float = 90) -> int:
    """Wait until all is done; how many timers are left."""
    deadline = time.monotonic() + seconds
    while True:
        with Session(engine) as session:
            left = session.scalars(select(func.count()).select_from(Timer)).one()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def is_early(effect: Any, promise: Promise) -> bool:
    """Whether it came before the timer's own instant, or before what the application had asked for."""
    due = promise.start
    if effect.name == "again":
        due += effect.round * STEP
    elif effect.name == "moved" and promise.moved and promise.moved_by and effect.seen_at > as_text(promise.moved_by):
        due = promise.moved
    return bool(effect.seen_at < max(effect.fire_at, as_text(due)))


def examine(engine: Engine, promises: dict[UUID, Promise], tally: Tally) -> None:
    """Compare the effects with what was promised."""
    with Session(engine) as session:
        effects = session.execute(select(EFFECTS).order_by(EFFECTS.c.seen_at)).all()
    tally.timers = len(promises) * (len(IN_TRANSACTION) + 1)
    tally.effects = len(effects)
    tally.early = sum(is_early(effect, promises[effect.workflow_id]) for effect in effects)
    tally.taken_over = sum(effect.attempt > 1 for effect in effects if effect.name != "flaky")
    # not by the instant at which a timer was to fire, since a retry moves that
    each = Counter((effect.workflow_id, effect.name) for effect in effects)
    rounds = Counter((effect.workflow_id, effect.round) for effect in effects if effect.name == "again")
    last = {(effect.workflow_id, effect.name): effect.seen_at for effect in effects}
    for workflow_id, promise in promises.items():
        not_before = as_text(promise.moved if promise.moved and promise.moved_by else promise.start)
        tally.lost += sum(not each[workflow_id, name] for name in ("once", "flaky", PLAIN))
        tally.lost += sum(not rounds[workflow_id, number] for number in range(ROUNDS))
        tally.lost += not each[workflow_id, "gone"] and promise.cancelled is False
        tally.lost += last.get((workflow_id, "moved"), "") < not_before
        tally.double += sum(max(0, each[workflow_id, name] - 1) for name in ("once", "flaky"))
        tally.double += max(0, each[workflow_id, "again"] - ROUNDS)
        tally.double += max(0, each[workflow_id, "gone"] - (0 if promise.cancelled else 1))
        tally.double += max(0, each[workflow_id, "moved"] - (2 if promise.moved else 1))
        tally.plain_twice += max(0, each[workflow_id, PLAIN] - 1)


def soak(urls: list[URL], kills: int, *, restart: Callable[[], None] | None = None, restarts: int = 0) -> Tally:
    """Kill workers, and restart the server, while timers are scheduled, cancelled and moved."""
    seed = int(os.environ.get("AION_TIMERS_SEED") or random.SystemRandom().getrandbits(32))
    tally = Tally(urls[0].get_backend_name(), seed)
    chance = random.Random(seed)  # noqa: S311 - no secret
    engine = create_engine(urls[0])
    crashing.metadata.create_all(engine)
    hosts = [Host(engine, random.Random(seed + number)) for number in range(1, HOSTS + 1)]  # noqa: S311 - no secret
    workers = Workers(urls, chance)
    started = time.monotonic()
    after = {(number + 1) * kills // (restarts + 1) for number in range(restarts)}
    working: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(HOSTS) as pool:
            for number in range(kills):
                workers.fill_up(2)
                for work in working:
                    work.result()
                working = [pool.submit(host.work, PER_KILL // HOSTS) for host in hosts]
                workers.kill(tally)
                if number in after and restart is not None:
                    restart()
                    tally.restarts += 1
            for work in working:
                work.result()
        workers.fill_up(2)
        tally.left = wait_for_an_empty_table(engine)
    finally:
        workers.end()
    tally.answers_lost = sum(host.answers_lost for host in hosts)
    examine(engine, {one: promise for host in hosts for one, promise in host.promises.items()}, tally)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    engine.dispose()
    tally.seconds = round(time.monotonic() - started)
    return tally


def check(tally: Tally, record: Callable[[str, object], None]) -> None:
    """Nothing is amiss, and the kills came where they hurt; many of them are shown."""
    many = tally.kills >= 100
    if many:
        record("workers killed", vars(tally))
    assert (tally.left, tally.lost, tally.early, tally.double) == (0, 0, 0, 0), tally
    assert tally.in_handler > tally.kills // 20, tally
    assert not many or (tally.in_transaction and tally.in_commit and tally.taken_over), tally


@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_workers_on_a_file_are_killed(
    libsql_template: Path, tmp_path: Path, kills: int, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "timers.db"
    shutil.copy(libsql_template, path)
    drivers = ("libsql", "libsql", "aiolibsql")
    tally = soak([URL.create(f"sqlite+{driver}", database=str(path)) for driver in drivers], kills)
    check(tally, record_property)


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server of the tests' own, which they may restart."""
    with PostgresServer.started() as server:
        yield server


@pytest.mark.parametrize(("kills", "restarts"), [(12, 1), pytest.param(300, 10, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_workers_on_a_server_are_killed_and_the_server_is_too(
    own_server: PostgresServer, kills: int, restarts: int, record_property: Callable[[str, object], None]
) -> None:
    name = f"crash_{kills}"
    own_server.execute(f"CREATE DATABASE {name}")
    url = own_server.url.set(database=name)
    urls = [url.set(drivername=f"postgresql+{driver}") for driver in ("psycopg", "psycopg", "asyncpg")]
    engine = create_engine(urls[0])
    migrate.upgrade(engine)
    engine.dispose()
    tally = soak(urls, kills, restart=own_server.restart, restarts=restarts)
    check(tally, record_property)
    assert tally.restarts == restarts
