"""``run``, ``watch`` and ``bench``: real processes, and real signals."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import URL, Engine

from aion_timers import TimerEntry, TimerRepository
from tests.cli.conftest import Cli, NewUrl, start, start_with_pipes
from tests.cli.conftest import text as shown
from tests.forkserver import Program

EngineOf = Callable[[URL], Engine]
NOW = datetime(2020, 1, 1, tzinfo=UTC)
PATIENCE = 60

MODULE = """
import asyncio
import time
from pathlib import Path
from sqlalchemy import create_engine
import aion_timers

def note(delivery):
    with open("fired", "a") as file:
        file.write(f"{delivery.timer.timer_id.value}\\n")

async def note_async(delivery):
    note(delivery)

def slow(delivery):
    Path("begun").touch()
    time.sleep(1)
    note(delivery)

async def slow_async(delivery):
    Path("begun").touch()
    await asyncio.sleep(1)
    note(delivery)

def endless(delivery):
    Path("begun").touch()
    time.sleep(600)

class Callable:
    async def __call__(self, delivery):
        note(delivery)

of_names = {"a*": note, "b": note}
async_of_names = {"a*": note_async}
instance = Callable()

def ready():
    return aion_timers.Dispatcher(create_engine(Path("url").read_text()), note)
if Path("url").exists():
    dispatcher = ready()
"""


def fill(engine: Engine, *names: str) -> None:
    with engine.begin() as connection:
        TimerRepository(connection).schedule_many([TimerEntry(UUID(int=1), name, NOW) for name in names])


def left(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [str(timer.timer_id.value) for timer in TimerRepository(connection).expired()]


def wait_for(condition: Callable[[], object], program: Program) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert program.poll() is None, program.communicate(PATIENCE)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with an application in it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "shop.py").write_text(MODULE)
    return tmp_path / "work"


def run(here: Path, url: URL, *arguments: str) -> Program:
    return start("run", *arguments, "--url", shown(url), cwd=here)


@pytest.mark.parametrize(
    ("kind", "handlers", "expected"),
    [
        ("libsql", "shop:note", []),
        ("psycopg", "shop:note_async", []),
        ("libsql", "shop:async_of_names", ["b", "c"]),
        ("psycopg", "shop:of_names", ["c"]),
        ("sqlite", "shop:instance", []),
    ],
)
def test_every_kind_of_handler(  # noqa: PLR0917 - what the table holds, and where
    kind: str, handlers: str, expected: list[str], here: Path, new_url: NewUrl, engine_of: EngineOf
) -> None:
    engine = engine_of(url := new_url(kind))
    fill(engine, "a", "a2", "b", "c")
    options = ["--once", "--concurrency", "2", "--lease", "1m", "--batch", "5", "--max-sleep", "0.5s"]
    program = run(here, url, handlers, *options)
    out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, out) == (0, f"fired {4 - len(expected)}\n"), err
    assert left(engine) == expected


def test_a_ready_dispatcher(here: Path, new_url: NewUrl, engine_of: EngineOf) -> None:
    engine = engine_of(url := new_url("psycopg"))
    (here / "url").write_text(shown(url))
    fill(engine, "a")
    program = start("run", "shop:dispatcher", "--once", cwd=here)
    assert program.communicate(timeout=PATIENCE)[0] == "fired 1\n"
    program = start("run", "shop:dispatcher", "--batch", "2", cwd=here)
    assert "leave out --batch\n" in program.communicate(timeout=PATIENCE)[1]
    assert program.returncode == 2


@pytest.mark.parametrize(
    ("number", "handler"),
    [(signal.SIGTERM, "shop:slow"), (signal.SIGINT, "shop:slow_async")],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_ends_it_in_an_orderly_way(
    number: signal.Signals, handler: str, here: Path, new_url: NewUrl, engine_of: EngineOf
) -> None:
    engine = engine_of(url := new_url("libsql"))
    fill(engine, "a", "b", "c")
    program = run(here, url, handler)
    wait_for((here / "begun").exists, program)
    program.send_signal(number)
    _, err = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0, err
    # the one that ran came to its end, and the others were given back
    fired = (here / "fired").read_text().split()
    assert sorted(fired + left(engine)) == ["a", "b", "c"]
    assert fired
    with engine.begin() as connection:
        assert len(TimerRepository(connection).claim(limit=9, lease=timedelta(seconds=30))) == 3 - len(fired)


def test_the_second_signal_kills(here: Path, new_url: NewUrl, engine_of: EngineOf) -> None:
    fill(engine_of(url := new_url("libsql")), "a")
    program = run(here, url, "shop:endless")
    wait_for((here / "begun").exists, program)
    program.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    while program.poll() is None and time.monotonic() < deadline:  # the first may not have been seen yet
        time.sleep(0.2)
        program.send_signal(signal.SIGINT)
    program.communicate(timeout=PATIENCE)
    assert program.returncode == -signal.SIGINT


@pytest.mark.parametrize("kind", ["libsql", "psycopg"])
def test_what_is_watched(cli: Cli, kind: str, new_url: NewUrl, engine_of: EngineOf) -> None:
    engine = engine_of(url := new_url(kind))
    assert cli("watch", "--once", url=url).out.split()[1:] == [
        "due=0",
        "leased=0",
        "next=none",
        "lag=0.0s",
        "throughput=-",
    ]
    fill(engine, "a", "b", "c")
    with engine.begin() as connection:
        timers = TimerRepository(connection)
        timers.claim(limit=1, lease=timedelta(hours=1))
        timers.schedule(UUID(int=1), "later", datetime(2090, 1, 1, tzinfo=UTC))
    seen = json.loads(cli("watch", "--once", "--json", url=url).out)
    assert (seen["due"], seen["leased"], seen["next"]) == (2, 1, "2090-01-01T00:00:00+00:00")
    assert seen["lag"] > 3600
    assert seen["throughput"] is None


def test_watching_goes_on_and_sees_what_gets_done(here: Path, new_url: NewUrl, engine_of: EngineOf) -> None:
    engine = engine_of(url := new_url("psycopg"))
    fill(engine, *map(str, range(50)))
    program = start_with_pipes("watch", "--json", "--interval", "0.2", "--url", shown(url), cwd=here)
    try:
        assert program.stdout is not None
        assert json.loads(program.stdout.readline())["due"] == 50
        with engine.begin() as connection:
            TimerRepository(connection).take(limit=30)
        while (seen := json.loads(program.stdout.readline()))["due"] == 50:
            pass
        assert (seen["due"], seen["throughput"] > 0) == (20, True)
        program.send_signal(signal.SIGINT)
        assert program.wait(PATIENCE) == 130
    finally:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("kind", ["libsql", "sqlite", "psycopg"])
def test_a_benchmark_leaves_nothing_behind(
    cli: Cli, kind: str, new_url: NewUrl, engine_of: EngineOf, tmp_path: Path
) -> None:
    engine = engine_of(url := new_url(kind))
    fill(engine, "mine")
    before = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(("-wal", "-shm")))
    figures = [json.loads(line) for line in cli("bench", "--timers", 500, "--json", url=url).out.splitlines()]
    assert [its["number"] for its in figures] == [500, 500, 500, 200]
    assert all(its["rate"] > 0 for its in figures)
    assert left(engine) == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(("-wal", "-shm"))) == before
    if kind == "psycopg":
        with psycopg.connect(shown(url.set(drivername="postgresql"))) as connection:
            found = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'aion_timers_bench%'")
            assert found.fetchone() == (0,)
