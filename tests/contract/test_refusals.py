"""What bad input, a wrong bind and a database out of order get: an error of ours with the cure, and nothing changed."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from aion_timers import (
    AsyncTimerRepository,
    InvalidInputError,
    NotMigratedError,
    PoolExhaustedError,
    StoreUnavailableError,
    TimerEntry,
    TimerRepository,
    TimerStoreError,
    UnsafeEngineError,
    UnsupportedBindError,
    migrate,
    prepare_sqlite,
)
from tests.conftest import Databases, open_engine
from tests.store import BACKENDS, SERVERS, Store

NOW = datetime(2026, 6, 3, 2, 30, tzinfo=UTC)
ALPHA = UUID("00000000-0000-4000-8000-00000000000a")
NAIVE = datetime(2026, 6, 3)  # noqa: DTZ001 - naive on purpose
LONG = "é" * 506 + "x"  # 1,025 bytes when it is encoded

BAD_CALLS: dict[str, Callable[[Any], Any]] = {
    "naive fire_at": lambda t: t.schedule(ALPHA, "a", NAIVE),
    "date as fire_at": lambda t: t.schedule(ALPHA, "a", date(2026, 6, 3)),
    "text as fire_at": lambda t: t.schedule(ALPHA, "a", "2026-06-03T02:30:00Z"),
    "number as fire_at": lambda t: t.schedule(ALPHA, "a", 1780453800),
    "text as workflow_id": lambda t: t.schedule(str(ALPHA), "a", NOW),
    "empty name": lambda t: t.schedule(ALPHA, "", NOW),
    "lone surrogate": lambda t: t.schedule(ALPHA, "a\udc80", NOW),
    "negative position": lambda t: t.schedule(ALPHA, -1, NOW),
    "position of 2**64": lambda t: t.schedule(ALPHA, 2**64, NOW),
    "bool as timer_id": lambda t: t.schedule(ALPHA, True, NOW),  # noqa: FBT003 - what the call is about
    "None as timer_id": lambda t: t.schedule(ALPHA, None, NOW),
    "name of 1,025 bytes": lambda t: t.schedule(ALPHA, LONG, NOW),
    "unknown if_exists": lambda t: t.schedule(ALPHA, "a", NOW, if_exists="ignore"),
    "tuple as entry": lambda t: t.schedule_many([(ALPHA, "a", NOW)]),
    "name of 1,025 bytes among many": lambda t: t.schedule_many(
        [TimerEntry(ALPHA, "a", NOW), TimerEntry(ALPHA, LONG, NOW)]
    ),
    "unknown if_exists of many": lambda t: t.schedule_many([], if_exists=None),
    "naive as_of": lambda t: t.expired(NAIVE),
    "limit of 0": lambda t: t.expired(NOW, limit=0),
    "limit of True": lambda t: t.take(NOW, limit=True),
    "limit of 2**63": lambda t: t.take(NOW, limit=2**63),
    "limit as text": lambda t: t.take(NOW, limit="10"),
    "after a tuple": lambda t: t.expired(NOW, after=(ALPHA, "a", NOW)),
    "text as workflow_id to cancel": lambda t: t.cancel(str(ALPHA), "a"),
    "text as workflow_id to list": lambda t: t.list_workflow(str(ALPHA)),
    "text as workflow_id to get": lambda t: t.get(str(ALPHA), "a"),
    "text as workflow_id to cancel all": lambda t: t.cancel_workflow(str(ALPHA)),
    "None as entries": lambda t: t.schedule_many(None),
    "one entry as entries": lambda t: t.schedule_many(TimerEntry(ALPHA, "a", NOW)),
    "text as names": lambda t: t.take(NOW, limit=1, names="kept"),
    "number in names": lambda t: t.take(NOW, limit=1, names=[1]),
    "empty name in names": lambda t: t.take(NOW, limit=1, names=[""]),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_input_is_refused_and_changes_nothing(store: Store, call: Callable[[Any], Any]) -> None:
    with store.timers() as timers:
        timers.schedule(ALPHA, "kept", NOW)
    with store.timers() as timers:
        with pytest.raises(InvalidInputError) as caught:
            call(timers)
        assert caught.value.argument in str(caught.value)
        assert caught.value.cure
        assert timers.expired(NOW) == [TimerEntry(ALPHA, "kept", NOW)]


def test_a_clock_must_tell_an_aware_datetime(store: Store) -> None:
    with store.timers(clock=lambda: NAIVE) as timers, pytest.raises(InvalidInputError, match="clock"):
        timers.expired()


def test_a_clock_must_be_a_function(store: Store) -> None:
    with store.session() as session, pytest.raises(InvalidInputError, match="clock"):
        store.repository(session, clock=NOW)


def test_names_of_1024_bytes_fit(store: Store) -> None:
    name = LONG[:-1]
    with store.timers() as timers:
        timers.schedule(ALPHA, name, NOW)
        assert timers.get(ALPHA, name) is not None


def test_the_database_itself_keeps_foreign_values_out_of_postgresql(store: Store) -> None:
    if store.is_sqlite:
        # the file is shared with a program that may write what it likes
        assert not store.sql("SELECT 1 FROM sqlite_master WHERE name = 'timers' AND sql LIKE '%CHECK%'")
        return
    good = {"timer": '{"Named":"a"}', "at": "2026-06-03T02:30:00Z"}
    bad = [
        {"timer": text}
        for text in (
            "a",
            '{"Named": "a"}',
            '{"Named":"a"} ',
            '{"Named":"a"}\n',
            '{"Named":"a\nb"}',
            '{"Named":"\\u0041"}',
            '{"Anonymous":-1}',
            '{"Anonymous":03}',
            '{"Anonymous":18446744073709551616}',
            '{"Anonymous":99999999999999999999}',
            '{"Named":"' + "x" * 1013 + '"}',
        )
    ] + [{"at": text} for text in ("infinity", "-infinity", "0001-01-01 00:00:00+00 BC", "10000-01-01 00:00:00+00")]
    insert = (
        "INSERT INTO timers (workflow_id, timer_id, fire_at)"
        " VALUES (gen_random_uuid(), :timer, CAST(CAST(:at AS text) AS timestamptz))"
    )
    for change in bad:
        with pytest.raises(Exception, match="ck_timers_"):
            store.sql(insert, **(good | change))
    store.sql(insert, **good)
    store.sql(insert, **(good | {"timer": '{"Named":""}'}))
    store.sql(insert, **(good | {"timer": '{"Anonymous":18446744073709551615}', "at": "9999-12-31 23:59:59.999999+00"}))


# -- binds ------------------------------------------------------------------------------------------------------------


def test_a_sync_bind_is_refused_by_the_async_class_and_the_other_way_round() -> None:
    engine, async_engine = create_engine("sqlite://"), create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(UnsupportedBindError, match="use AsyncTimerRepository"):
        TimerRepository(AsyncSession(async_engine))  # type: ignore[arg-type] # what the test is about
    with pytest.raises(UnsupportedBindError, match="use TimerRepository"):
        AsyncTimerRepository(Session(engine))  # type: ignore[arg-type] # what the test is about
    for bind in (engine, sessionmaker(engine), async_engine):
        with pytest.raises(UnsupportedBindError, match="open a session"):
            TimerRepository(bind)  # type: ignore[arg-type] # what the test is about
        with pytest.raises(UnsupportedBindError, match="open a session"):
            AsyncTimerRepository(bind)  # type: ignore[arg-type] # what the test is about
    with pytest.raises(UnsupportedBindError, match="pass a session"):
        TimerRepository("sqlite://")  # type: ignore[arg-type] # what the test is about


class OtherDatabase(SQLiteDialect_pysqlite):
    """A database that nobody knows."""

    name = "other"
    supports_statement_cache = True


class OtherDriver(SQLiteDialect_pysqlite):
    """A driver that nobody knows."""

    driver = "other"
    supports_statement_cache = True


registry.register("other", __name__, "OtherDatabase")
registry.register("sqlite.other", __name__, "OtherDriver")


@pytest.mark.parametrize(
    ("url", "message"), [("other://", "database 'other'"), ("sqlite+other://", "driver 'other' of sqlite")]
)
def test_a_database_or_driver_without_support_is_refused(url: str, message: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection, pytest.raises(UnsupportedBindError, match=message):
        TimerRepository(connection).expired()
    engine.dispose()


def test_a_session_without_an_engine_for_timers_is_refused() -> None:
    with Session() as session, pytest.raises(UnsupportedBindError, match="binds"):
        TimerRepository(session).expired()


def test_an_engine_of_the_stock_libsql_dialect_is_refused(tmp_path: Path) -> None:
    program = f"""
import sqlalchemy_libsql, sqlalchemy
engine = sqlalchemy.create_engine("sqlite+libsql:///{tmp_path}/timers.db")
import aion_timers
with engine.connect() as connection:
    try:
        aion_timers.TimerRepository(connection).expired()
    except aion_timers.UnsafeEngineError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "import aion_timers before create_engine()" in found.stdout


def test_sqlite3_in_its_default_mode_is_refused_and_serves_once_prepared(sqlite_template: Path, tmp_path: Path) -> None:
    path = tmp_path / "timers.db"
    shutil.copy(sqlite_template, path)
    engine = create_engine(f"sqlite:///{path}")
    with Session(engine) as session, pytest.raises(UnsafeEngineError, match="prepare_sqlite"):
        TimerRepository(session).schedule(ALPHA, "a", NOW)
    engine.dispose()
    prepare_sqlite(engine)
    prepare_sqlite(engine)
    with Session(engine) as session, session.begin():
        TimerRepository(session).schedule(ALPHA, "a", NOW)
    engine.dispose()
    with pytest.raises(UnsupportedBindError, match="need to be prepared"):
        prepare_sqlite(create_engine("sqlite+libsql://"))


def test_an_engine_that_begins_nothing_is_refused_however_it_is_met(sqlite_template: Path, tmp_path: Path) -> None:
    path = tmp_path / "timers.db"
    shutil.copy(sqlite_template, path)

    def refused(engine: Engine) -> None:
        with Session(engine) as session:
            session.begin_nested()
            with pytest.raises(UnsafeEngineError):
                TimerRepository(session).schedule(ALPHA, "a", NOW)
        with Session(engine) as session, pytest.raises(UnsafeEngineError):
            TimerRepository(session).schedule(ALPHA, "a", NOW)
        engine.dispose()

    # first met at AUTOCOMMIT, which is as it should be there and proves nothing for later
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        TimerRepository(connection).expired()
    refused(engine)
    # met after a statement that has begun a transaction
    engine = create_engine(f"sqlite:///{path}")
    with Session(engine) as session:
        session.execute(text("DELETE FROM timers"))
        with pytest.raises(UnsafeEngineError):
            TimerRepository(session).schedule(ALPHA, "a", NOW)
    engine.dispose()
    engine = create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None})
    with Session(engine) as session, pytest.raises(UnsafeEngineError):
        TimerRepository(session).schedule(ALPHA, "a", NOW)
    engine.dispose()
    with pytest.raises(UnsupportedBindError, match="prepare that one"):
        prepare_sqlite(create_engine("sqlite://").execution_options(x=1))


def test_an_engine_is_prepared_after_its_first_connections(sqlite_template: Path, tmp_path: Path) -> None:
    path = tmp_path / "timers.db"
    shutil.copy(sqlite_template, path)
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        TimerRepository(connection).expired()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    prepare_sqlite(engine)
    with Session(engine) as session:
        savepoint = session.begin_nested()
        TimerRepository(session).schedule(ALPHA, "a", NOW)
        savepoint.commit()
        session.rollback()
        assert TimerRepository(session).expired() == []
    engine.dispose()


def test_the_cure_for_a_driver_is_of_the_same_kind() -> None:
    class Db(AsyncSession):
        """A host's own session class."""

    with pytest.raises(UnsupportedBindError, match="use AsyncTimerRepository"):
        TimerRepository(Db())  # type: ignore[arg-type] # what the test is about
    engine = create_engine("sqlite+other://")
    with engine.connect() as connection, pytest.raises(UnsupportedBindError, match=r"as in sqlite\+libsql://"):
        TimerRepository(connection).expired()
    engine.dispose()


def test_a_prepared_engine_waits_for_a_lock_and_keeps_autocommit(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/x.db", connect_args={"timeout": 0})
    prepare_sqlite(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000
        assert connection.connection.dbapi_connection.in_transaction  # type: ignore[union-attr] # sqlite3's own
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
        assert not connection.connection.dbapi_connection.in_transaction  # type: ignore[union-attr] # sqlite3's own
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        assert connection.connection.dbapi_connection.in_transaction  # type: ignore[union-attr] # sqlite3's own
    engine.dispose()


# -- databases out of order -------------------------------------------------------------------------------------------


@pytest.fixture
def bare_store(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store on a database that nobody migrated."""
    databases: Databases | None = None
    if backend.startswith(("psycopg", "asyncpg")):
        databases = request.getfixturevalue("databases")
        made = databases.create()
        url = made.set(drivername=f"postgresql+{backend}")
    elif backend in SERVERS:
        url = request.getfixturevalue("sqld").create(f"bare_{backend}")
        url = url.set(drivername=f"sqlite+{backend.removesuffix('_server')}")
    else:
        url = URL.create("sqlite" if backend == "sqlite" else f"sqlite+{backend}", database=str(tmp_path / "bare.db"))
    with asyncio.Runner() as runner:
        store = Store(backend, open_engine(url), runner)
        yield store
        store.close()
    if databases is not None:
        databases.drop(made)
    if backend in SERVERS:
        request.getfixturevalue("sqld").drop(f"bare_{backend}")


def test_a_database_that_is_not_migrated_names_the_command(bare_store: Store) -> None:
    for call in (
        lambda t: t.schedule(ALPHA, "a", NOW),
        lambda t: t.schedule_many([TimerEntry(ALPHA, "a", NOW)]),
        lambda t: t.expired(),
        lambda t: t.take(limit=1),
        lambda t: t.cancel_workflow(ALPHA),
    ):
        with pytest.raises(NotMigratedError, match="alembic upgrade head") as caught, bare_store.timers() as timers:
            call(timers)
        assert caught.value.__cause__ is not None


def test_a_database_that_an_older_version_migrated_names_the_command(store: Store) -> None:
    with store.connection() as connection:
        if hasattr(store.engine, "sync_engine"):
            connection.run_sync(migrate.downgrade, "aion0001")
        else:
            migrate.downgrade(connection, "aion0001")
    for call in (
        lambda t: t.schedule(ALPHA, "a", NOW, if_exists="keep"),
        lambda t: t.claim(limit=1, lease=timedelta(minutes=1)),
        lambda t: t.take(limit=1),
        lambda t: t.next_wake(),
    ):
        with pytest.raises(NotMigratedError, match="alembic upgrade head"), store.timers() as timers:
            call(timers)


@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
@pytest.mark.parametrize(
    ("statement", "missing"),
    [
        ("INSERT INTO missing_audit VALUES (1)", "missing_audit"),
        ("INSERT INTO audit VALUES (attempts)", 'column "attempts" does not exist'),
    ],
)
def test_what_the_hosts_own_trigger_misses_is_not_taken_for_ours(store: Store, statement: str, missing: str) -> None:
    store.sql("CREATE TABLE audit (number integer)")
    store.sql(f"CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {statement}; RETURN NEW; END'")
    store.sql("CREATE TRIGGER audit BEFORE INSERT ON timers FOR EACH ROW EXECUTE FUNCTION audit()")
    with pytest.raises(Exception, match=missing) as caught, store.timers() as timers:
        timers.schedule(ALPHA, "a", NOW)
    assert not isinstance(caught.value, TimerStoreError)


def test_a_pool_without_a_free_connection_says_so(url: URL, backend: str) -> None:
    with asyncio.Runner() as runner:
        store = Store(backend, open_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.1), runner)
        with store.connection(), pytest.raises(PoolExhaustedError, match="pool_size"), store.timers() as timers:
            timers.expired()
        store.close()


@pytest.mark.parametrize("backend", [one for one in BACKENDS if one not in SERVERS], indirect=True)
def test_a_database_that_can_only_be_read_says_so(store: Store, url: URL) -> None:
    if store.is_sqlite:
        read_only = URL.create(url.drivername, database=f"file:{url.database}", query={"mode": "ro", "uri": "true"})
        store.close()
        with asyncio.Runner() as runner:
            store = Store(store.backend, open_engine(read_only), runner)
            with pytest.raises(StoreUnavailableError, match="only be read"), store.timers() as timers:
                timers.schedule(ALPHA, "a", NOW)
            with store.timers() as timers:
                assert timers.expired() == []
            store.close()
        return
    with store.session() as session:
        session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(StoreUnavailableError, match="only be read"):
            store.repository(session).schedule(ALPHA, "a", NOW)
        session.rollback()


@pytest.mark.parametrize("backend", ["libsql", "aiolibsql", "sqlite", "aiosqlite"], indirect=True)
def test_a_missing_directory_and_a_file_that_is_no_database_are_named(backend: str, tmp_path: Path) -> None:
    junk = tmp_path / "junk.db"
    junk.write_bytes(b"this is no database, but it is long enough to be looked at" * 100)
    driver = "sqlite" if backend == "sqlite" else f"sqlite+{backend}"
    for path, message in ((tmp_path / "missing" / "timers.db", "cannot be opened"), (junk, "holds no SQLite database")):
        with asyncio.Runner() as runner:
            store = Store(backend, open_engine(URL.create(driver, database=str(path))), runner)
            with pytest.raises(StoreUnavailableError, match=message), store.timers() as timers:
                timers.schedule(ALPHA, "a", NOW)
            store.close()
            # aiosqlite's thread tells the loop of its end, also where it could not open the file
            runner.run(asyncio.sleep(0.1))
    assert junk.read_bytes().startswith(b"this is no database")


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("backend", ["psycopg", "psycopg_async", "asyncpg"], indirect=True)
def test_the_sessions_time_zone_changes_nothing(store: Store, url: URL, zone: str) -> None:
    store.sql(f"ALTER DATABASE \"{url.database}\" SET timezone = '{zone}'")
    store.runner.run(_dispose(store))
    ends = [datetime(1, 1, 1, tzinfo=UTC), NOW, datetime.max.replace(tzinfo=UTC)]
    assert store.sql("SHOW timezone") == [(zone,)]
    with store.timers() as timers:
        timers.schedule_many(TimerEntry(ALPHA, number, instant) for number, instant in enumerate(ends))
        assert [entry.fire_at for entry in timers.expired(ends[-1])] == ends
        assert [entry.fire_at for entry in timers.expired(NOW - timedelta(microseconds=1))] == ends[:1]
        assert timers.take(ends[-1], limit=3) == [
            TimerEntry(ALPHA, number, instant) for number, instant in enumerate(ends)
        ]


async def _dispose(store: Store) -> None:
    result: Any = store.engine.dispose()
    if result is not None:
        await result


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async", "asyncpg"])
def test_no_message_shows_a_password(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    url = URL.create(f"postgresql+{driver}", "user", "correct-horse", "127.0.0.1", 1, "timers")
    with asyncio.Runner() as runner, caplog.at_level(0):
        store = Store(driver, open_engine(url, hide_parameters=False), runner)
        with pytest.raises(StoreUnavailableError, match="does not answer") as caught, store.timers() as timers:
            timers.schedule(ALPHA, "a", NOW)
        store.close()
    told: BaseException | None = caught.value
    texts = [caplog.text, repr(store.engine), repr(store.engine.url)]
    while told is not None:
        texts += [str(told), repr(told)]
        told = told.__cause__ or told.__context__
    assert not [text for text in texts if "correct-horse" in text]
