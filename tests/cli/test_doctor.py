"""The doctor on healthy databases of each kind, and on broken ones: each ill has a name and a cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import URL, Engine, create_engine, text

from aion_timers import TimerEntry, TimerRepository, UnsupportedBindError, doctor, migrate, prepare_sqlite
from aion_timers.doctor import Finding, Limits
from tests.cli.conftest import Cli, NewUrl
from tests.cli.conftest import text as shown
from tests.store import SERVERS, Store

ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
PAST = datetime(2020, 1, 1, tzinfo=UTC)
EngineOf = Callable[[URL], Engine]


def examined(bind: Any, **limits: Any) -> dict[str, Finding]:
    return {its.name: its for its in doctor.examine(bind, Limits(**limits))}


def ills(bind: Any, **limits: Any) -> dict[str, str]:
    """What is not as it should be; a test server that gives up durability for speed is."""
    found = examined(bind, **limits)
    assert all(bool(its.cure) == (its.status != "ok") for its in found.values())
    return {name: its.status for name, its in found.items() if its.status != "ok" and name != "durability"}


@pytest.fixture(params=["libsql", "sqlite", "psycopg"])
def engine(request: pytest.FixtureRequest, new_url: NewUrl, engine_of: EngineOf) -> Engine:
    """A healthy database."""
    return engine_of(new_url(request.param))


def on_file(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


def test_a_healthy_database(store: Store, cli: Cli, url: URL) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "later", datetime.now(UTC) + timedelta(days=1))
    result = cli("doctor", "--json", url=url, code=None)
    found = [json.loads(line) for line in result.out.splitlines()]
    # the plain sqlite3 driver leaves a new file without a write-ahead log
    left = {"journal"} if store.backend in {"sqlite", "aiosqlite"} else {"durability"}
    if store.backend in SERVERS:
        left = {"synchronous"}  # sqld runs with NORMAL
    assert {its["name"] for its in found if its["status"] != "ok"} <= left
    assert result.code == int(any(its["status"] != "ok" for its in found))
    looked_at = {"dialect", "versions", "migration", "plan", "clock", "overdue", "leases", "attempts", "foreign"}
    looked_at |= {"journal", "synchronous", "busy", "log"} if store.is_sqlite else {"durability", "dead", "horizon"}
    assert {its["name"] for its in found} == looked_at


def test_an_async_engine(store: Store) -> None:
    if not store.is_async:
        assert examined(store.engine)["dialect"].status == "ok"
        return
    with store.connection() as connection:
        assert {its.status for its in connection.run_sync(doctor.examine)} <= {"ok", "warn", "fail"}
    with pytest.raises(UnsupportedBindError, match="run_sync"):
        doctor.examine(store.engine)  # type: ignore[arg-type] # not a sync one


def test_durability_is_what_the_server_says(new_url: NewUrl, engine_of: EngineOf) -> None:
    engine = engine_of(new_url("psycopg"))
    with engine.connect() as connection:
        is_durable = connection.exec_driver_sql("SHOW fsync").scalar_one() == "on"
    assert (examined(engine)["durability"].status == "ok") == is_durable
    with engine.connect() as connection:
        connection.exec_driver_sql("SET synchronous_commit = off")
        connection.commit()
        assert examined(connection)["durability"].status == ("warn" if is_durable else "fail")


def test_migrations(engine: Engine, cli: Cli) -> None:
    migrate.downgrade(engine, "aion0001")
    behind = examined(engine)["migration"]
    assert (behind.status, "at revision aion0001" in behind.found) == ("fail", True)
    migrate.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE aion_timers_version SET version_num = 'aion9999'"))
    newer = examined(engine)["migration"]
    assert (newer.status, newer.cure) == (
        "fail",
        "upgrade the library: a newer version has migrated this database",
    )
    assert "overdue" in examined(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE timers"))
        connection.execute(text("DROP TABLE aion_timers_version"))
    assert list(examined(engine))[-1] == "migration"
    assert cli("doctor", url=engine.url, code=1).out.splitlines()[-1].startswith("fail\tmigration\t")


def test_a_missing_index(engine: Engine) -> None:
    with engine.begin() as connection:
        TimerRepository(connection).schedule_many(
            TimerEntry(UUID(int=number), 1, datetime(2090, 1, 1, tzinfo=UTC)) for number in range(20)
        )
    assert ills(engine).keys() <= {"journal"}
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX idx_timers_fire_at"))
    found = examined(engine)
    assert (found["plan"].status, found["migration"].status) == ("fail", "fail")
    assert found["migration"].cure is not None
    assert "CREATE INDEX" in found["migration"].cure


def test_what_is_overdue_and_held_too_long(engine: Engine) -> None:
    with engine.begin() as connection:
        TimerRepository(connection).schedule_many([TimerEntry(ALPHA, f"t{number}", PAST) for number in range(4)])
    assert ills(engine)["overdue"] == "fail"
    assert "t0" in examined(engine)["overdue"].found
    assert "overdue" not in ills(engine, overdue=timedelta(days=99_999))
    with engine.begin() as connection:
        TimerRepository(connection, clock=lambda: PAST).claim(limit=1, lease=timedelta(seconds=30))
        TimerRepository(connection).claim(limit=1, lease=timedelta(hours=5), names=["t1"])
    assert ills(engine)["leases"] == "fail"
    assert "1 lease ended" in examined(engine)["leases"].found
    found = examined(engine, abandoned=timedelta(days=99_999 // 20))["leases"]
    assert (found.status, "1 timer held for more than 1:00:00" in found.found) == ("warn", True)
    assert ills(engine, attempts=1)["attempts"] == "warn"
    assert "attempts" not in ills(engine, attempts=2)


def test_the_stock_dialect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aion_timers.libsql import sound  # noqa: PLC0415 - as an engine made before the import would have it

    engine = create_engine(f"sqlite+libsql:///{tmp_path}/a.db")
    monkeypatch.setattr(sound, "SoundDialect", type("Other", (), {}))
    (finding,) = doctor.examine(engine)
    assert (finding.name, finding.status) == ("dialect", "fail")
    assert "import aion_timers before create_engine()" in str(finding.cure)
    engine.dispose()


def test_how_a_file_is_kept(new_url: NewUrl) -> None:
    url = new_url("libsql")
    engine = create_engine(url, synchronous="NORMAL", connect_args={"timeout": 0})
    assert ills(engine) == {"synchronous": "warn", "busy": "warn"}
    assert ills(engine, log=-1)["log"] == "warn"
    engine.dispose()

    plain = create_engine(new_url("sqlite"))
    prepare_sqlite(plain)
    with plain.connect() as connection:
        connection.exec_driver_sql("SELECT 1").all()
        connection.rollback()
        driver: Any = connection.connection.driver_connection
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "busy_timeout = 10"):
            driver.execute(f"PRAGMA {pragma}").fetchall()
        assert ills(connection) == {"journal": "fail", "synchronous": "fail", "busy": "warn"}
    plain.dispose()


def test_rows_of_another_program(new_url: NewUrl, engine_of: EngineOf) -> None:
    engine = engine_of(new_url("libsql"))
    with engine.begin() as connection:
        for value in ("x'ff'", "CAST(x'ff' AS TEXT)", "'plain'", "'-'"):
            connection.exec_driver_sql(
                f"INSERT INTO timers (workflow_id, timer_id, fire_at) VALUES ({value}, 'a', '-0001-01-01T00:00:00Z')"
            )
    finding = examined(engine)["foreign"]
    assert finding.status == "warn"
    assert finding.found.startswith("4 rows written by another program")


def test_what_keeps_postgresql_from_tidying_up(new_url: NewUrl, engine_of: EngineOf) -> None:
    url = new_url("psycopg")
    engine = engine_of(url)
    with psycopg.connect(shown(url.set(drivername="postgresql"))) as idle:
        idle.execute("SELECT txid_current()")
        finding = examined(engine, horizon=timedelta(0))["horizon"]
        assert finding.status == "warn"
        assert finding.cure == f"end it: SELECT pg_terminate_backend({idle.info.backend_pid})"
        assert "horizon" not in ills(engine, horizon=timedelta(hours=1))
    with engine.connect() as connection:
        transaction = connection.begin_twophase("left behind")
        connection.execute(text("SELECT txid_current()"))
        transaction.prepare()
        connection.invalidate()
    finding = examined(engine, horizon=timedelta(0))["horizon"]
    assert "ROLLBACK PREPARED 'left behind'" in str(finding.cure)
    with psycopg.connect(shown(url.set(drivername="postgresql")), autocommit=True) as admin:
        admin.execute("ROLLBACK PREPARED 'left behind'")
    assert "horizon" not in ills(engine, horizon=timedelta(0))
    assert ills(engine, dead=-1)["dead"] == "warn"


def test_the_clock(new_url: NewUrl, engine_of: EngineOf) -> None:
    engine = engine_of(new_url("psycopg"))
    finding = examined(engine)["clock"]
    assert finding.status == "ok", finding
    with engine.connect() as connection:
        # a clock that runs ahead, as this connection sees it
        connection.exec_driver_sql("CREATE SCHEMA fast")
        connection.exec_driver_sql(
            "CREATE FUNCTION fast.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE"
            " AS 'SELECT pg_catalog.statement_timestamp() + interval ''1 hour'''"
        )
        connection.exec_driver_sql("SET search_path TO fast, pg_catalog, public")
        connection.commit()
        finding = examined(connection)["clock"]
    assert finding.status == "warn"
    assert "ahead of this machine's" in finding.found


def test_the_engine_of_the_application(
    cli: Cli, new_url: NewUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = new_url("libsql").database
    (tmp_path / "doctored_shop.py").write_text(
        "import aion_timers\nfrom sqlalchemy import create_engine\n"
        "from sqlalchemy.ext.asyncio import create_async_engine\n"
        f"engine = create_engine('sqlite+libsql:///{path}', synchronous='NORMAL')\n"
        f"other = create_async_engine('sqlite+aiolibsql:///{path}')\n"
    )
    out = cli("doctor", "doctored_shop:engine", code=1).rows
    assert [row[1] for row in out if row[0] != "ok"] == ["synchronous"]
    assert {row[0] for row in cli("doctor", "doctored_shop:other").rows} == {"ok"}
    assert "name an Engine or an AsyncEngine" in cli("doctor", "doctored_shop:create_engine", code=2).err
