"""Alembic's command line, run as a program."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.util import CommandError

from aion_timers import NotMigratedError, migrate
from tests.conftest import DATA
from tests.migrations.conftest import HEAD, ROOT, Database, alembic, in_process, start_alembic

FAILED = "ERROR [alembic.util.messaging] "
NOT_MIGRATED = (
    "the database is not migrated; run `aion-timers migrate` or `alembic upgrade heads`,"
    " or call aion_timers.migrate.upgrade(engine)\n"
)


@pytest.mark.parametrize("backend", ["libsql", "psycopg"])
def test_the_commands(backend: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    out, report = alembic("check", url=database.url, status=255)
    assert report.endswith(FAILED + NOT_MIGRATED)
    assert out == "FAILED: " + NOT_MIGRATED
    assert database.snapshot() == []

    report = alembic("upgrade", "head", url=database.url)[1]
    assert "Running upgrade  -> aion0001, Create or adopt the table timers." in report
    assert "Running upgrade aion0001 -> aion0002, Let a timer be leased." in report
    assert alembic("current", url=database.url)[0] == f"{HEAD} (head)\n"
    assert alembic("check", url=database.url)[0] == "No new upgrade operations detected.\n"
    database.run(migrate.check)

    database.add_timer()
    report = alembic("downgrade", "base", url=database.url, status=255)[1]
    assert FAILED + "the downgrade would drop 1 timer; let them fire" in report
    assert database.sql("SELECT count(*) FROM timers") == [(1,)]
    alembic("-x", "force=true", "downgrade", "base", url=database.url)
    assert database.snapshot() == []


@pytest.mark.parametrize("backend", ["aiolibsql", "sqlite", "aiosqlite", "psycopg_async", "asyncpg"])
def test_every_driver(backend: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    alembic("upgrade", "aion_timers@head", url=database.url)
    database.run(migrate.check)
    x = [f"url={database.url.render_as_string(hide_password=False)}"]
    assert in_process(command.check, x=x) == "No new upgrade operations detected.\n"
    assert in_process(command.current, x=x) == f"{HEAD} (head)\n"
    assert f"{HEAD} (aion_timers) (head)" in in_process(command.history, x=x)
    in_process(command.downgrade, "base", x=x)
    assert in_process(command.current, x=x) == ""
    assert database.snapshot() == []


def test_check_tells_what_our_own_comparison_tells(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("DROP INDEX idx_timers_fire_at")
    x = [f"url={database.url.render_as_string(hide_password=False)}"]
    with pytest.raises(NotMigratedError) as ours:
        database.run(migrate.check)
    with pytest.raises(CommandError, match="index idx_timers_fire_at is missing; run CREATE INDEX") as theirs:
        in_process(command.check, x=x)
    assert str(theirs.value) == str(ours.value)
    database.sql("CREATE INDEX idx_timers_fire_at ON timers (fire_at, workflow_id, timer_id)")
    assert in_process(command.check, x=x) == "No new upgrade operations detected.\n"


def test_a_database_of_a_newer_version(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("UPDATE aion_timers_version SET version_num = 'aion9999'")
    x = [f"url={database.url.render_as_string(hide_password=False)}"]
    for work, *arguments in ((command.upgrade, "head"), (command.downgrade, "base"), (command.check,)):
        with pytest.raises(CommandError, match=r"at revision aion9999, which this version .*; upgrade the library"):
            in_process(work, *arguments, x=x)


def test_an_adopted_file_is_clean_among_its_other_tables(new_database: Callable[..., Database], tmp_path: Path) -> None:
    database = new_database("libsql", Path(shutil.copyfile(DATA / "aion-0.1.0.db", tmp_path / "aion.db")))
    before = database.snapshot()
    alembic("upgrade", "head", url=database.url)
    database.sql("ALTER TABLE timers ADD COLUMN note TEXT", "CREATE INDEX by_note ON timers (note)")
    x = [f"url={database.url}"]
    assert in_process(command.check, x=x) == "No new upgrade operations detected.\n"
    database.sql("DROP INDEX by_note", "ALTER TABLE timers DROP COLUMN note")
    in_process(command.downgrade, "base", x=x)
    assert [row for row in database.snapshot() if row[1] != "timers"] == [row for row in before if row[1] != "timers"]
    assert database.sql("SELECT count(*) FROM timers") == [(120,)]


def test_where_the_database_is(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "alembic.ini", project)
    (project / "migrations").symlink_to(ROOT / "migrations")
    ini, named, given = project / "alembic.ini", tmp_path / "named.db", tmp_path / "given.db"

    alembic("-c", str(ini), "upgrade", "head", cwd=tmp_path)
    assert (project / "timers.db").exists()
    alembic("-c", str(ini), "upgrade", "head", cwd=tmp_path, AION_TIMERS_URL=f"sqlite+libsql:///{named}")
    assert named.exists()
    x = f"url=sqlite+libsql:///{given}"
    alembic("-c", str(ini), "-x", x, "upgrade", "head", cwd=tmp_path, AION_TIMERS_URL=f"sqlite+libsql:///{tmp_path}")
    assert given.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url but hunter22", "-x url is not a database URL; give one, for example"),
        ("", "-x url is not a database URL; give one, for example"),
        ("mysql://someone:hunter22@host/name", "-x url names the database 'mysql'; give a supported one"),
        ("postgresql+hunter://someone:hunter22@host/name", "postgresql+hunter://someone:***@host/name: Can't load"),
        (
            "postgresql+psycopg://someone:hunter22@127.0.0.1:1/name?application_name=hunter22",
            "postgresql+psycopg://someone:***@127.0.0.1:1/name: connection failed",
        ),
        ("postgresql+asyncpg://someone:hunter22@127.0.0.1:1/name", "someone:***@127.0.0.1:1/name: "),
        ("postgresql+asyncpg://someone:hunter22@127.0.0.1:1/name?token=hunter22", "someone:***@127.0.0.1:1/name: "),
        ("sqlite+libsql:////nowhere/timers.db?timeout=1", "/nowhere doesn't exist"),
        ("sqlite:////nowhere/timers.db", "cannot be opened"),
    ],
)
def test_a_url_that_does_not_lead_to_a_database(url: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with pytest.raises(CommandError) as raised:
        in_process(command.upgrade, "head", x=[f"url={url}"])
    told = str(raised.value)
    assert message in told
    assert "\n" not in told
    assert "hunter22" not in told + caplog.text


def test_an_error_is_one_line_without_secrets() -> None:
    url = "url=postgresql+asyncpg://someone:hunter22@127.0.0.1:1/name"
    out, report = alembic("-x", url, "upgrade", "head", status=255)
    assert report.splitlines()[-1].startswith(f"{FAILED}postgresql+asyncpg://someone:***@127.0.0.1:1/name: ")
    assert "hunter22" not in out + report
    assert "Traceback" not in report


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(CommandError, match="there is no option -x ulr; there are force and url"):
        in_process(command.upgrade, "head", x=["ulr=sqlite:///timers.db"])


@pytest.mark.parametrize(("backend", "programs"), [("libsql", 8), ("psycopg", 4)])
def test_programs_that_migrate_an_empty_database_at_once(
    backend: str, programs: int, new_database: Callable[..., Database]
) -> None:
    database = new_database(backend)
    started = [start_alembic("upgrade", "head", url=database.url) for _ in range(programs)]
    with ThreadPoolExecutor(programs) as threads:
        reports = [report for _, report in threads.map(lambda process: process.communicate(timeout=60), started)]
    assert [process.returncode for process in started] == [0] * programs, reports
    assert sum("Running upgrade  ->" in report for report in reports) == 1
    database.run(migrate.check)


# -- SQL for somebody else to run -------------------------------------------------------------------------------------


def test_sql_for_postgresql(new_database: Callable[..., Database]) -> None:
    database, other = new_database("psycopg"), new_database("psycopg")
    x = [f"url={database.url}"]
    upgrade = alembic("upgrade", "head", "--sql", url=database.url)[0]
    downgrade = in_process(command.downgrade, f"{HEAD}:base", sql=True, x=x)
    forced = in_process(command.downgrade, f"{HEAD}:base", sql=True, x=[*x, "force=true"])
    other.run(migrate.upgrade)

    with psycopg.connect(database.url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.autocommit = True
        connection.execute(upgrade.encode())
        assert database.snapshot() == other.snapshot()
        database.run(migrate.check)
        database.add_timer()
        with pytest.raises(psycopg.errors.RaiseException, match="would drop timers"):
            connection.execute(downgrade.encode())
        connection.execute("ROLLBACK")
        assert database.sql("SELECT count(*) FROM timers") == [(1,)]
        connection.execute(forced.encode())
        assert database.snapshot() == []
        connection.execute(upgrade.encode())
        connection.execute(downgrade.encode())
    assert database.snapshot() == []


def test_sql_for_the_sqlite_family(new_database: Callable[..., Database], tmp_path: Path) -> None:
    migrated = new_database("sqlite")
    script = alembic("upgrade", "head", "--sql")[0]
    with pytest.raises(CommandError, match=r"a downgrade of a SQLite file cannot be written as SQL: .*without --sql"):
        in_process(command.downgrade, f"{HEAD}:base", sql=True, x=[f"url={migrated.url}"])
    migrated.run(migrate.upgrade)

    for backend in ("sqlite", "libsql"):
        for name in ("aion-0.1.0", None):
            path = tmp_path / f"{backend}-{name}.db"
            if name:
                shutil.copyfile(DATA / f"{name}.db", path)
            run_script(backend, path, script)
            database = new_database(backend, path)
            database.run(migrate.check)
            if name:
                assert database.sql("SELECT count(*) FROM timers") == [(120,)]
                database.run(migrate.downgrade)
                assert database.sql("SELECT count(*) FROM timers") == [(120,)]
            else:
                squeezed = [tuple(" ".join(str(cell).split()) for cell in row) for row in database.snapshot()]
                assert squeezed == [tuple(" ".join(str(cell).split()) for cell in row) for row in migrated.snapshot()]


def run_script(backend: str, path: Path, script: str) -> None:
    """Run a script through the driver itself."""
    if backend == "sqlite":
        connection: Any = sqlite3.connect(path)
    else:
        import libsql_experimental  # noqa: PLC0415 - it has no wheels for some platforms

        connection = libsql_experimental.connect(str(path))
    connection.executescript(script)
    connection.close()
