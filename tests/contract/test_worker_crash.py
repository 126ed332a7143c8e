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
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, Engine, create_engine, func, select, text
from sqlalchemy.orm import Session

from aion_timers import Timer, TimerEntry, TimerRepository, migrate
from tests import crashing
from tests.conftest import PostgresServer
from tests.crashing import EFFECTS, IN_TRANSACTION, PLAIN, ROUNDS, as_text

PER_KILL = 4
"""How many workflows, each with a timer of every kind, are added before a kill."""


@dataclass
class Host:
    """The application that schedules, cancels and moves timers, and what it has been told."""

    engine: Engine
    chance: random.Random
    workflows: dict[UUID, datetime] = field(default_factory=dict)
    cancelled: dict[UUID, bool] = field(default_factory=dict)
    moved: dict[UUID, datetime] = field(default_factory=dict)

    def add(self, many: int) -> None:
        """Commit some workflows, all of them due within a moment."""
        with Session(self.engine) as session, session.begin():
            timers = TimerRepository(session)
            start = timers.now() + timedelta(seconds=self.chance.uniform(-0.5, 0.5))
            added = {UUID(int=self.chance.getrandbits(128), version=4): start for _ in range(many)}
            for workflow_id in added:
                entries = [TimerEntry(workflow_id, name, start) for name in (*IN_TRANSACTION, PLAIN)]
                timers.schedule_many(entries)
        self.workflows |= added

    def interfere(self) -> None:
        """Cancel a timer and move another one, which may be waiting, held, or gone."""
        # once each: to schedule a timer again at the instant at which it has fired is to have it fire again
        workflow_id = self.chance.choice([one for one in self.workflows if one not in self.moved])
        later = self.workflows[workflow_id] + timedelta(seconds=2)
        with Session(self.engine) as session, session.begin():
            self.cancelled[workflow_id] = TimerRepository(session).cancel(workflow_id, "gone")
        with Session(self.engine) as session, session.begin():
            TimerRepository(session).schedule(workflow_id, "moved", later)
        self.moved[workflow_id] = later


@dataclass
class Tally:
    """What became of it all."""

    database: str
    seed: int
    kills: int = 0
    in_handler: int = 0
    in_transaction: int = 0
    restarts: int = 0
    timers: int = 0
    effects: int = 0
    plain_twice: int = 0
    retried: int = 0
    lost: int = 0
    early: int = 0
    double: int = 0
    left: int = 0
    seconds: int = 0

    def __str__(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in vars(self).items())


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
            counts = self._context.RawArray("i", 2)
            url = self._chance.choice(self._urls).render_as_string(hide_password=False)
            process = self._context.Process(target=crashing.fire_until_killed, args=(url, counts))
            process.start()
            self._alive.append((process, counts))

    def kill(self, tally: Tally) -> None:
        """Kill one of them: at any moment, or soon after it has begun to work; count what it was doing."""
        which = self._chance.randrange(len(self._alive))
        deadline = time.monotonic() + self._chance.choice([0, 1, 1])
        while time.monotonic() < deadline and not self._alive[which][1][crashing.HANDLERS]:
            time.sleep(0.001)
        time.sleep(self._chance.uniform(0, 0.02))
        process, counts = self._alive.pop(which)
        assert process.is_alive(), f"a worker ended by itself, with {process.exitcode} ({tally})"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        tally.kills += 1
        tally.in_handler += counts[crashing.HANDLERS] > 0
        tally.in_transaction += counts[crashing.TRANSACTIONS] > 0

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


def examine(host: Host, tally: Tally) -> None:
    """Compare the effects with what was promised."""
    with Session(host.engine) as session:
        effects = session.execute(select(EFFECTS)).all()
    tally.timers = len(host.workflows) * (len(IN_TRANSACTION) + 1)
    tally.effects = len(effects)
    tally.early = sum(effect.seen_at < effect.fire_at for effect in effects)
    tally.retried = sum(effect.attempt > 1 for effect in effects)
    # not by the instant at which a timer was to fire, since a retry moves that
    each = Counter((effect.workflow_id, effect.name) for effect in effects)
    rounds = Counter((effect.workflow_id, effect.round) for effect in effects if effect.name == "again")
    last = {
        (effect.workflow_id, effect.name): effect.seen_at for effect in sorted(effects, key=lambda one: one.seen_at)
    }
    tally.plain_twice = sum(max(0, each[workflow_id, PLAIN] - 1) for workflow_id in host.workflows)
    for workflow_id, start in host.workflows.items():
        moved, cancelled = host.moved.get(workflow_id), host.cancelled.get(workflow_id)
        tally.lost += sum(not each[workflow_id, name] for name in ("once", "flaky", PLAIN))
        tally.lost += sum(not rounds[workflow_id, number] for number in range(ROUNDS))
        tally.lost += not each[workflow_id, "gone"] and not cancelled
        tally.lost += last.get((workflow_id, "moved"), "") < as_text(moved or start)
        tally.double += sum(max(0, each[workflow_id, name] - 1) for name in ("once", "flaky"))
        tally.double += max(0, each[workflow_id, "again"] - ROUNDS)
        tally.double += max(0, each[workflow_id, "gone"] - (0 if cancelled else 1))
        tally.double += max(0, each[workflow_id, "moved"] - (2 if moved else 1))


def soak(
    urls: list[URL],
    kills: int,
    capsys: pytest.CaptureFixture[str],
    *,
    restart: Callable[[], None] | None = None,
    restarts: int = 0,
) -> None:
    """Kill workers, and restart the server, while timers are scheduled, cancelled and moved."""
    seed = int(os.environ.get("AION_TIMERS_SEED") or random.SystemRandom().getrandbits(32))
    tally = Tally(urls[0].get_backend_name(), seed)
    chance = random.Random(seed)  # noqa: S311 - no secret
    engine = create_engine(urls[0])
    crashing.metadata.create_all(engine)
    host, workers = Host(engine, chance), Workers(urls, chance)
    started = time.monotonic()
    after = {(number + 1) * kills // (restarts + 1) for number in range(restarts)}
    try:
        for number in range(kills):
            workers.fill_up(2)
            host.add(PER_KILL)
            time.sleep(chance.uniform(0, 0.1))
            host.interfere()
            workers.kill(tally)
            if number in after and restart is not None:
                restart()
                engine.dispose()
                tally.restarts += 1
        workers.fill_up(2)
        tally.left = wait_for_an_empty_table(engine)
    finally:
        workers.end()
    examine(host, tally)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    engine.dispose()
    tally.seconds = round(time.monotonic() - started)
    if kills >= 100:
        with capsys.disabled():
            print(f"\n{tally}")  # noqa: T201 - the table of `make soak`
    assert (tally.left, tally.lost, tally.early, tally.double) == (0, 0, 0, 0), tally
    assert tally.in_handler > kills // 20, tally
    assert tally.restarts == restarts


@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_workers_on_a_file_are_killed(
    libsql_template: Path, tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "timers.db"
    shutil.copy(libsql_template, path)
    soak(
        [URL.create(f"sqlite+{driver}", database=str(path)) for driver in ("libsql", "libsql", "aiolibsql")],
        kills,
        capsys,
    )


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server of the tests' own, which they may restart."""
    with PostgresServer.started() as server:
        yield server


@pytest.mark.parametrize(("kills", "restarts"), [(12, 1), pytest.param(300, 10, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_workers_on_a_server_are_killed_and_the_server_is_too(
    own_server: PostgresServer, kills: int, restarts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"crash_{kills}"
    own_server.execute(f"CREATE DATABASE {name}")
    url = own_server.url.set(database=name)
    urls = [url.set(drivername=f"postgresql+{driver}") for driver in ("psycopg", "psycopg", "asyncpg")]
    engine = create_engine(urls[0])
    migrate.upgrade(engine)
    engine.dispose()
    soak(urls, kills, capsys, restart=own_server.restart, restarts=restarts)
