"""The commands that change and show single timers, and what goes wrong with them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import URL, create_engine

from aion_timers import TimerEntry
from aion_timers.cli.database import Database
from tests.cli.conftest import Cli, NewUrl, start, text
from tests.conftest import Databases
from tests.store import Store

ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
BETA = UUID("00000000-0000-4000-8000-00000000000b")
SOON = datetime(2090, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["libsql", "psycopg"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite", "psycopg", "psycopg_async", "asyncpg"], indirect=True
)
def test_the_life_of_a_timer_on_the_url_of_every_driver(cli: Cli, url: URL) -> None:
    assert cli("schedule", ALPHA, "pay", "2090-01-01T01:00:00+01:00", url=url).out == (
        "scheduled for 2090-01-01T00:00:00+00:00\n"
    )
    kept = cli("schedule", ALPHA, "pay", "+3d", "--if-exists", "latest", "--json", url=url)
    assert json.loads(kept.out) == {
        "workflow_id": str(ALPHA),
        "timer_id": "pay",
        "fire_at": "2090-01-01T00:00:00+00:00",
        "changed": False,
    }
    assert cli("list", url=url).rows == [["2090-01-01T00:00:00+00:00", str(ALPHA), "pay", "free", "0"]]
    assert cli("check", url=url).out == "at aion0002, and the table is as it should be\n"
    assert cli("cancel", ALPHA, "pay", url=url).out == "cancelled 1\n"
    assert cli("cancel", ALPHA, "pay", url=url, code=1).out == "cancelled 0\n"
    assert cli("next", url=url, code=1) == (1, "", "there is no timer\n")


def test_what_is_listed(cli: Cli, store: Store, url: URL) -> None:
    entries = [TimerEntry(ALPHA, number, SOON + timedelta(days=number)) for number in range(5)]
    entries += [TimerEntry(BETA, f"retry-{number}", SOON - timedelta(days=1 + number)) for number in range(3)]
    entries.append(TimerEntry(BETA, "now", datetime(2020, 1, 1, tzinfo=UTC)))
    with store.timers() as timers:
        timers.schedule_many(entries)
    with store.timers() as timers:
        (claim,) = timers.claim(limit=1, lease=timedelta(hours=1))
    everything = [json.loads(line) for line in cli("list", "--json", url=url).out.splitlines()]
    assert [(its["workflow_id"], its["timer_id"]) for its in everything] == [
        (str(entry.workflow_id), entry.timer_id.value) for entry in sorted(entries)
    ]
    assert everything[0]["held_until"] is not None
    assert everything[0]["attempts"] == 1

    def listed(*options: str) -> list[str]:
        return [row[2] for row in cli("list", *options, url=url).rows]

    assert listed("--workflow", str(ALPHA)) == ["#0", "#1", "#2", "#3", "#4"]
    assert listed("--name", "retry-*") == ["retry-2", "retry-1", "retry-0"]
    assert listed("--name", "retry-1", "--name", "now") == ["now", "retry-1"]
    assert listed("--due-before", SOON.isoformat(), "--due-after", "now") == ["retry-2", "retry-1", "retry-0"]
    assert listed("--due-after", (SOON + timedelta(days=4)).isoformat()) == ["#4"]
    assert listed("--held") == ["now"]
    assert len(listed("--free")) == 8
    assert [row[2] for row in cli("due", url=url).rows] == ["now"]
    assert cli("next", url=url).out.split("\t")[-1] == "retry-2\n"
    with store.timers() as timers:
        timers.release(claim)
    assert cli("next", url=url).out.startswith("now\t")


def test_pages_hold_every_timer_once(cli: Cli, store: Store, url: URL) -> None:
    # many at one instant, so that a page ends between two that only their keys tell apart
    entries = [TimerEntry(UUID(int=number % 3), f'"\\ä{number}', SOON) for number in range(25)]
    with store.timers() as timers:
        timers.schedule_many(entries)
    found, options = [], []
    while True:
        page = cli("list", "--json", "--limit", 4, *options, url=url)
        found += [json.loads(line)["timer_id"] for line in page.out.splitlines()]
        if not page.err:
            break
        options = ["--after", page.err.removeprefix("next page: --after ").strip()]
    assert found == [entry.timer_id.value for entry in sorted(entries)]
    whole = cli("list", "--json", "--limit", 4, "--all", url=url)
    assert [json.loads(line)["timer_id"] for line in whole.out.splitlines()] == found
    assert whole.err == ""
    assert "no place in a list" in cli("list", "--after", "x", url=url, code=2).err


@pytest.mark.parametrize("backend", ["libsql"], indirect=True)
def test_rows_of_another_program_are_paged_over_and_counted(cli: Cli, store: Store, url: URL) -> None:
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(ALPHA, number, SOON) for number in range(3)])
    for number in range(4):
        store.sql(
            "INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES "
            f"('\"x{number}\"', CAST(x'22ff{number:02x}22' AS TEXT), '2089-01-01T00:00:00Z')"
        )
    listed = cli("list", "--limit", 2, "--all", url=url)
    assert [row[2] for row in listed.rows] == ["#0", "#1", "#2"]
    assert listed.err.startswith("left out 4 in a form of another program's own")


def test_a_workflow_is_cancelled(cli: Cli, store: Store, url: URL) -> None:
    with store.timers() as timers:
        timers.schedule_many([TimerEntry(ALPHA, number, SOON) for number in range(3)])
        timers.schedule(BETA, 7, SOON)
    assert "give one of the two" in cli("cancel", ALPHA, url=url, code=2).err
    assert cli("cancel", ALPHA, "--all", url=url).out == "cancelled 3\n"
    assert cli("cancel", BETA, 7, url=url, code=1).out == "cancelled 0\n"
    assert cli("cancel", BETA, 7, "--anonymous", url=url).out == "cancelled 1\n"


def test_migrations_up_and_down(cli: Cli, store: Store, url: URL) -> None:
    assert cli("migrate", url=url).out == "at aion0002\n"
    assert cli("migrate", "--down", "--revision", "aion0001", url=url).out == "aion0002 -> aion0001\n"
    behind = cli("check", url=url, code=1)
    assert "is at revision aion0001" in behind.err
    assert behind.err.endswith("run `aion-timers migrate`\n")
    assert cli("migrate", url=url).out == "aion0001 -> aion0002\n"
    with store.timers() as timers:
        timers.schedule(ALPHA, 1, SOON)
    refused = cli("migrate", "--down", url=url, code=1).err
    assert refused.endswith("would drop 1 timer; let them fire or cancel them first, or give --force\n")
    assert cli("migrate", "--down", "--force", url=url).out == "aion0002 -> base\n"
    assert "run `aion-timers migrate`" in cli("list", url=url, code=78).err


def test_a_schema_online_and_offline(cli: Cli, databases: Databases) -> None:
    made = databases.create()
    url = made.set(drivername="postgresql+asyncpg")
    try:
        with psycopg.connect(text(made), autocommit=True) as connection:
            connection.execute('CREATE SCHEMA "of Host"; CREATE SCHEMA other')
        assert cli("migrate", "--schema", "of Host", url=url).out == "base -> aion0002\n"
        cli("check", url=url, code=1)
        cli("check", "--schema", "of Host", url=url)
        cli("schedule", ALPHA, "a", SOON.isoformat(), "--schema", "of Host", url=url)
        assert len(cli("list", "--schema", "of Host", url=url).rows) == 1
        found = cli("doctor", "--json", "--schema", "of Host", url=url, code=None).out.splitlines()
        # a server of tests gives up durability for speed
        assert {its["name"] for its in map(json.loads, found) if its["status"] != "ok"} <= {"durability"}

        with psycopg.connect(text(made), autocommit=True) as connection:
            connection.execute(cli("migrate", "--sql", "--schema", "other", url=url).out)  # type: ignore[call-overload] # SQL that is written just now
        cli("check", "--schema", "other", url=url)
        assert cli("list", "--schema", "other", url=url).out == ""
        with psycopg.connect(text(made), autocommit=True) as connection:
            connection.execute(cli("migrate", "--sql", "--down", "--schema", "other", url=url).out)  # type: ignore[call-overload] # SQL that is written just now
        cli("check", "--schema", "other", url=url, code=1)
    finally:
        databases.drop(made)


def test_sql_for_a_file(cli: Cli, tmp_path: Path) -> None:
    url = URL.create("sqlite+libsql", database=str(tmp_path / "offline.db"))
    sql = cli("migrate", "--sql", url=url).out
    assert not (tmp_path / "offline.db").exists()
    plain = create_engine(URL.create("sqlite", database=str(tmp_path / "offline.db")))
    with plain.connect() as connection:
        connection.connection.executescript(sql)  # type: ignore[attr-defined] # sqlite3's
    plain.dispose()
    cli("check", url=url)
    assert "or stop at 'aion0001'" in cli("migrate", "--sql", "--down", url=url, code=2).err
    assert "lease_token" in cli("migrate", "--sql", "--down", "--revision", "aion0001", url=url).out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nope"], 2, "No such command 'nope'."),
        (["list", "--limit", "0"], 2, "Invalid value for '--limit'"),
        (["schedule", "x", "a", "now"], 2, "WORKFLOW 'x': no UUID; write it as in"),
        (["schedule", str(ALPHA), "a", "2030-01-01"], 2, "it has no time zone, so it names no instant; write it as in"),
        (["schedule", str(ALPHA), "a", "tomorrow"], 2, "FIRE_AT 'tomorrow': no instant; write it as in"),
        (["schedule", str(ALPHA), "a", "+9999999d"], 2, "outside the years 1 to 9999"),
        (["schedule", str(ALPHA), "", "now"], 2, "timer_id '': the name is empty; pass a name"),
        (["schedule", str(ALPHA), "a", "now", "--anonymous"], 2, "TIMER 'a': no position; write a number"),
        (["list", "--schema", "s"], 2, "--schema 's': a file has no schemas; leave it out"),
        (["migrate", "--force"], 2, "--force is for the way down"),
        (["migrate", "--revision", "nope"], 2, "revision 'nope'"),
        (["run", "nothing"], 2, "'nothing' names no handler; write module:attribute"),
        (["run", "no_such_module:x"], 2, "the module 'no_such_module' cannot be imported"),
        (["run", "json:nope"], 2, "the module 'json' has no 'nope'"),
        (["run", "json:loads", "--lease", "x"], 2, "--lease 'x': no length of time"),
        (["run", "json:loads", "--lease", "1m", "--concurrency", "0"], 2, "Invalid value for '--concurrency'"),
        (["run", "json:__name__", "--once"], 2, "handlers 'json': not callable"),
    ],
)
def test_an_error_is_one_line(cli: Cli, new_url: NewUrl, arguments: list[str], code: int, message: str) -> None:
    result = cli(*arguments, url=None if arguments == ["nope"] else new_url("libsql"), code=code)
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("aion-timers: ")
    assert message in result.err


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("", 2, "no database was named; give --url or set AION_TIMERS_URL"),
        ("hunter2hunter2", 2, "--url is not the URL of a database"),
        ("mysql://me:hunter2hunter2@host/db", 2, "--url names the database 'mysql'"),
        (
            "postgresql+psycopg2://me:hunter2hunter2@host/db",
            78,
            "the module 'psycopg2' is not installed; pip install psycopg2",
        ),
        ("postgresql+psycopg://me:hunter2hunter2@127.0.0.1:1/db", 69, "the database does not answer"),
        ("postgresql+asyncpg://me:hunter2hunter2@127.0.0.1:1/db?ssl=disable", 69, "the database does not answer"),
        ("sqlite+libsql:////no/such/file.db?auth=hunter2hunter2", 69, "there is no file /no/such/file.db"),
    ],
)
def test_a_url_that_does_not_serve_and_no_secret_shown(cli: Cli, url: str, code: int, message: str) -> None:
    for command in (["list"], ["doctor"], ["watch", "--once"], ["migrate", "--down"]):
        result = cli(*command, "--url", url, code=code)
        assert message in result.err
        assert result.err.count("\n") == 1
        assert "hunter2" not in result.out + result.err


def test_the_url_of_the_environment_and_no_colour_in_a_pipe(new_url: NewUrl, tmp_path: Path) -> None:
    url = text(new_url("libsql"))
    program = start("schedule", ALPHA, "a\nb\x1b[31m", "now", cwd=tmp_path, AION_TIMERS_URL=url)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (0, "")
    program = start("list", cwd=tmp_path, AION_TIMERS_URL=url, FORCE_COLOR="", NO_COLOR="1", TERM="dumb")
    out, err = program.communicate(timeout=60)
    assert err == ""
    assert "\x1b" not in out
    assert out.count("\n") == 1
    assert "a\\nb\\x1b[31m" in out


def test_names_are_completed(tmp_path: Path) -> None:
    variables = {"_AION_TIMERS_COMPLETE": "complete_bash", "COMP_WORDS": "aion-timers sch", "COMP_CWORD": "1"}
    program = start(cwd=tmp_path, **variables)
    assert program.communicate(timeout=60)[0].split() == ["schedule"]


def test_what_two_drivers_call_the_same_file_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.db").touch()
    one = Database(f"sqlite+libsql:///{tmp_path}/a.db")
    other = Database(f"sqlite+aiosqlite:///{tmp_path}/../{tmp_path.name}/a.db")
    assert one.identity == other.identity
