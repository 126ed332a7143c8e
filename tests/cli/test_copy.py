"""``copy``: every row, leases and attempts too, over and back, through kills, and nothing overwritten."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, Engine, text

from aion_timers import TimerEntry, TimerRepository, migrate
from tests.cli.conftest import Cli, NewUrl, Result, start, sync_engine
from tests.cli.conftest import text as shown
from tests.conftest import DATA

SOON = datetime(2090, 1, 1, tzinfo=UTC)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")

EngineOf = Callable[[URL], Engine]


def entries(number: int) -> Iterator[TimerEntry]:
    for at in range(number):
        # keys of all kinds, in an order that is not that of their instants
        name: str | int = at if at % 3 else f'nämé-"{at}"\\\n\u2028'
        yield TimerEntry(UUID(int=at * 7919 % number, version=4), name, SOON + timedelta(microseconds=at * 13))


def fill(engine: Engine, many: Iterator[TimerEntry] | list[TimerEntry]) -> None:
    with engine.begin() as connection:
        TimerRepository(connection).schedule_many(many)


def rows(engine: Engine) -> list[tuple[Any, ...]]:
    """Every row in the one order, in a form that is the same on both kinds of databases."""
    columns = "workflow_id, timer_id, fire_at, lease_token, lease_until, attempts"
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT {columns} FROM timers ORDER BY workflow_id, timer_id")).all()
    return [(str(row[0]).strip('"'), row[1], _instant(row[2]), str(row[3]), _instant(row[4]), row[5]) for row in found]


def _instant(value: Any) -> Any:
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def copied(cli: Cli, source: URL, target: URL, *options: str, code: int = 0) -> tuple[dict[str, Any], Result]:
    result = cli("copy", shown(source), shown(target), "--json", *options, code=code)
    return json.loads(result.out), result


@pytest.mark.parametrize("kinds", [("libsql", "psycopg", "sqlite"), ("psycopg", "libsql", "psycopg")])
def test_there_and_on_and_again(cli: Cli, new_url: NewUrl, engine_of: EngineOf, kinds: tuple[str, ...]) -> None:
    one, two, three = (new_url(kind) for kind in kinds)
    number = 5_000
    fill(engine_of(one), entries(number))
    with engine_of(one).begin() as connection:  # some that were held, and are to be tried again
        timers = TimerRepository(connection, clock=lambda: datetime(2091, 1, 1, tzinfo=UTC))
        claims = timers.claim(limit=50, lease=timedelta(days=1))
        timers.release(*claims[:25], retry_at=SOON)
    before = rows(engine_of(one))
    report, _ = copied(cli, one, two, "--held", "copy")
    assert (report["copied"], report["verified"], report["same"]) == (number, number, 0)
    assert report["rounded"] == report["foreign"] == report["different"] == report["missing"] == 0
    assert rows(engine_of(two)) == before
    copied(cli, two, three, "--held", "copy")
    assert rows(engine_of(three)) == before == rows(engine_of(one))
    again, _ = copied(cli, one, two, "--held", "copy")
    assert (again["copied"], again["same"], again["verified"]) == (0, number, number)
    assert rows(engine_of(two)) == before


@pytest.mark.parametrize("kinds", [("libsql", "psycopg"), ("psycopg", "libsql")])
def test_another_timer_at_the_target_is_not_overwritten(
    cli: Cli, new_url: NewUrl, engine_of: EngineOf, kinds: tuple[str, str]
) -> None:
    one, two = (new_url(kind) for kind in kinds)
    fill(engine_of(one), [TimerEntry(ALPHA, number, SOON) for number in range(10)])
    own = TimerEntry(ALPHA, "own", SOON)
    fill(engine_of(two), [TimerEntry(ALPHA, 3, SOON + timedelta(days=1)), TimerEntry(ALPHA, 4, SOON), own])
    report, result = copied(cli, one, two, code=1)
    assert (report["copied"], report["same"], report["different"], report["verified"]) == (8, 1, 1, 9)
    assert result.err == f"different at DST: {ALPHA} timer:anonymous:3\n"

    report, result = copied(cli, one, two, "--if-exists", "keep")
    assert (report["kept"], report["verified"], result.err) == (1, 9, "")
    with engine_of(two).connect() as connection:
        assert TimerRepository(connection).get(ALPHA, 3) == TimerEntry(ALPHA, 3, SOON + timedelta(days=1))

    report, _ = copied(cli, one, two, "--if-exists", "replace")
    assert (report["copied"], report["verified"]) == (1, 10)
    with engine_of(two).connect() as connection:
        timers = TimerRepository(connection)
        assert timers.get(ALPHA, 3) == TimerEntry(ALPHA, 3, SOON)
        assert timers.get(ALPHA, "own") == own


def test_timers_that_are_held_are_refused_first(cli: Cli, new_url: NewUrl, engine_of: EngineOf) -> None:
    one, two = new_url("libsql"), new_url("psycopg")
    fill(engine_of(one), [TimerEntry(ALPHA, number, datetime(2020, 1, 1, tzinfo=UTC)) for number in range(3)])
    with engine_of(one).begin() as connection:
        TimerRepository(connection).claim(limit=2, lease=timedelta(hours=1))
    refused = cli("copy", shown(one), shown(two), code=1)
    assert "2 timers are held by workers, and would be fired twice; stop the workers" in refused.err
    assert rows(engine_of(two)) == []
    _, result = copied(cli, one, two, "--held", "copy")
    assert result.err.startswith("2 timers are held by workers of SRC")
    with engine_of(two).begin() as connection:
        assert len(TimerRepository(connection).claim(limit=9, lease=timedelta(seconds=30))) == 1


def test_rows_of_another_program_are_listed_and_stay(
    cli: Cli, new_url: NewUrl, engine_of: EngineOf, tmp_path: Path
) -> None:
    path = tmp_path / "aion.db"
    shutil.copy(DATA / "aion-0.1.0-beyond.db", path)
    one, two, three = URL.create("sqlite+libsql", database=str(path)), new_url("psycopg"), new_url("libsql")
    migrate.upgrade(engine_of(one))
    with engine_of(one).begin() as connection:
        connection.exec_driver_sql("INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES (x'ff', 'a', 'b')")
        held = connection.execute(text("SELECT count(*) FROM timers")).scalar_one()
        # finer than PostgreSQL has it
        connection.exec_driver_sql(
            f"INSERT INTO timers (workflow_id, timer_id, fire_at) "
            f"VALUES ('\"{ALPHA}\"', '{{\"Anonymous\":1}}', '2090-01-01T00:00:00.000000001Z')"
        )
    report, result = copied(cli, one, two, code=1)
    assert report["foreign"] + report["copied"] == held + 1
    assert report["foreign"] > 1
    assert report["verified"] == report["copied"]
    assert result.err.count("not copied, in a form of another program's own: ") == report["foreign"]
    with engine_of(two).connect() as connection:
        found = TimerRepository(connection).get(ALPHA, 1)
    assert found is not None
    assert found.fire_at == SOON + timedelta(microseconds=1)
    assert report["rounded"] >= 1
    copied(cli, one, three, code=1)
    with engine_of(three).connect() as connection:
        kept = connection.execute(text("SELECT fire_at FROM timers WHERE workflow_id = :id"), {"id": f'"{ALPHA}"'})
        assert kept.scalar_one() == "2090-01-01T00:00:00.000000001Z"


def test_what_cannot_be_copied_at_all(cli: Cli, new_url: NewUrl, tmp_path: Path) -> None:
    one = new_url("libsql")
    same = one.set(drivername="sqlite+aiosqlite")
    assert "SRC and DST are the same database" in cli("copy", shown(one), shown(same), code=2).err
    assert "DST is not the URL of a database" in cli("copy", shown(one), "x", code=2).err
    (tmp_path / "empty.db").touch()
    empty = URL.create("sqlite+libsql", database=str(tmp_path / "empty.db"))
    assert "empty.db: the database is not migrated; run `aion-timers migrate`" in (
        cli("copy", shown(one), shown(empty), code=78).err
    )


def kill_half_way(source: URL, target: URL, number: int, cwd: Path) -> int:
    """Kill a copy once a part of the rows is there; how many are."""
    engine = sync_engine(target)
    copying = start("copy", shown(source), shown(target), cwd=cwd)
    try:
        deadline = time.monotonic() + 90
        while copying.poll() is None and time.monotonic() < deadline:
            with engine.connect() as connection:
                if connection.execute(text("SELECT count(*) FROM timers")).scalar_one() > number // 3:
                    break
    finally:
        copying.send_signal(signal.SIGKILL)
        copying.communicate(90)
    with engine.connect() as connection:
        there: int = connection.execute(text("SELECT count(*) FROM timers")).scalar_one()
    engine.dispose()
    return there


def test_a_copy_that_was_killed_goes_on(cli: Cli, new_url: NewUrl, engine_of: EngineOf, tmp_path: Path) -> None:
    one, two = new_url("libsql"), new_url("psycopg")  # the other way round is in the run of a million
    number = 12_000
    fill(engine_of(one), entries(number))
    there = kill_half_way(one, two, number, tmp_path)
    assert there > number // 3
    report, _ = copied(cli, one, two)
    assert (report["same"], report["copied"], report["verified"]) == (there, number - there, number)
    assert rows(engine_of(two)) == rows(engine_of(one))


PEAK = """
import re, sys
from pathlib import Path
from aion_timers.cli.app import run
code = run()
# of this program alone: what getrusage() tells counts in the one that started it
kib = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
sys.stderr.write(f"peak {int(kib) // 1024} MiB\\n")
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kinds", [("libsql", "psycopg"), ("psycopg", "libsql")], ids="-to-".join)
def test_a_million_timers(
    new_url: NewUrl, engine_of: EngineOf, kinds: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (new_url(kind) for kind in kinds)
    number = 1_000_000
    fill(engine_of(one), entries(number))
    there = kill_half_way(one, two, number, tmp_path)
    assert number > there > number // 3
    copying = start("copy", shown(one), shown(two), "--json", cwd=tmp_path, code=PEAK)
    out, err = copying.communicate(timeout=900)
    assert copying.returncode == 0, err
    report = json.loads(out)
    assert (report["same"], report["copied"], report["verified"]) == (there, number - there, number)
    peak = int(err.rsplit("peak ", 1)[1].split()[0])
    assert peak < 250
    with capsys.disabled():
        print(f"\n{' to '.join(kinds)}: killed at {there:,}; {report}; peak {peak} MiB")  # noqa: T201 - the figures are what it is run for
