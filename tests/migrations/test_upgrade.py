"""The functions of `aion_timers.migrate`, on a connection and on an engine, sync and async."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import alembic.command
import pytest
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, create_async_engine
from sqlalchemy.orm import Session

from aion_timers import (
    DowngradeRefusedError,
    InvalidInputError,
    MigrationError,
    NotMigratedError,
    StoreUnavailableError,
    UnsupportedBindError,
    migrate,
)
from aion_timers.schema import metadata
from tests.migrations.conftest import HEAD, ROOT, Database

BROKEN = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "aion0003", "aion0002", None, None


def upgrade() -> None:
    op.create_table("halfway", sa.Column("id", sa.Integer()))
    op.execute("INSERT INTO halfway VALUES (1)")
    op.execute("SELECT nothing FROM nowhere")


def downgrade() -> None:
    op.drop_table("halfway")
"""


@pytest.fixture
def broken_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A version of the library whose second migration fails halfway."""
    scripts = tmp_path / "scripts"
    shutil.copytree(ROOT / "migrations", scripts)
    (scripts / "versions" / "0003_broken.py").write_text(BROKEN)
    monkeypatch.setattr(migrate, "_scripts", lambda: scripts)
    migrate._known_revisions.cache_clear()  # noqa: SLF001 - what a process has read once, it keeps
    yield
    migrate._known_revisions.cache_clear()  # noqa: SLF001 - as above


def test_up_down_and_up_again(database: Database) -> None:
    before = database.snapshot()
    assert database.run(migrate.current) is None

    database.run_on_engine(migrate.upgrade)
    migrated = database.snapshot()
    assert database.run(migrate.current) == HEAD
    database.run(migrate.check)
    database.run_on_engine(migrate.check)

    database.run_on_engine(migrate.downgrade)
    assert database.snapshot() == before
    assert database.run_on_engine(migrate.current) is None

    database.run(migrate.upgrade)
    assert database.snapshot() == migrated
    database.run(migrate.upgrade)
    database.run_on_engine(migrate.upgrade)
    assert database.snapshot() == migrated
    database.run(migrate.downgrade)
    database.run(migrate.downgrade)
    assert database.snapshot() == before


def test_the_migrations_make_what_the_metadata_describes(
    database: Database, new_database: Callable[..., Database]
) -> None:
    database.run(migrate.upgrade)
    described = new_database(database.backend)
    described.run(metadata.create_all)

    def without_version(catalog: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        rows = [tuple(" ".join(str(cell).split()) for cell in row) for row in catalog]
        return [row for row in rows if "aion_timers_version" not in " ".join(row)]

    assert without_version(database.snapshot()) == without_version(described.snapshot())
    assert len(without_version(described.snapshot())) >= 2


def test_on_a_connection_the_caller_commits(database: Database) -> None:
    before = database.snapshot()

    def upgrade_and_roll_back(connection: Connection) -> None:
        migrate.upgrade(connection)
        migrate.check(connection)
        assert migrate.current(connection) == HEAD
        connection.rollback()

    database.run(upgrade_and_roll_back)
    assert database.snapshot() == before


@pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg"])
def test_on_a_connection_that_has_begun_nothing(backend: str, new_database: Callable[..., Database]) -> None:
    database = new_database(backend)
    with database.engine.connect() as connection:
        migrate.upgrade(connection)
        connection.rollback()
        assert migrate.current(connection) is None
        connection.rollback()
        migrate.upgrade(connection)
        connection.commit()
    database.run(migrate.check)


def test_what_the_caller_did_before_is_in_the_same_transaction(database: Database) -> None:
    database.sql("CREATE TABLE orders (id INTEGER)")

    def write_and_upgrade(connection: Connection) -> None:
        connection.execute(text("SELECT count(*) FROM orders")).all()
        connection.execute(text("INSERT INTO orders VALUES (1)"))
        migrate.upgrade(connection)
        connection.execute(text("INSERT INTO orders VALUES (2)"))

    database.run(write_and_upgrade)
    assert database.sql("SELECT id FROM orders ORDER BY id") == [(1,), (2,)]
    database.run(migrate.check)


@pytest.mark.usefixtures("broken_scripts")
def test_a_failed_migration_leaves_nothing_behind(database: Database) -> None:
    before = database.snapshot()
    with pytest.raises(DatabaseError, match="nowhere"):
        database.run_on_engine(migrate.upgrade)
    assert database.snapshot() == before

    def go_on_after_the_error(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE orders (id INTEGER)"))
        with pytest.raises(DatabaseError, match="nowhere"):
            migrate.upgrade(connection)
        connection.execute(text("INSERT INTO orders VALUES (1)"))

    database.run(go_on_after_the_error)
    assert database.sql("SELECT id FROM orders") == [(1,)]
    assert database.run(migrate.current) is None
    database.sql("DROP TABLE orders")
    assert database.snapshot() == before
    database.run(migrate.upgrade, HEAD)
    assert database.run(migrate.current) == HEAD
    with pytest.raises(NotMigratedError, match="at revision aion0002, and this version works with aion0003"):
        database.run(migrate.check)


@pytest.mark.usefixtures("broken_scripts")
@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_a_failed_migration_leaves_nothing_behind_where_the_driver_is_in_its_default_mode(
    driver: str, tmp_path: Path
) -> None:
    url = f"{driver}:///{tmp_path / 'default.db'}"
    engine: Any = create_engine(url) if driver == "sqlite" else create_async_engine(url)
    database = Database(driver, engine.url, engine)
    with pytest.raises(DatabaseError, match="nowhere"):
        database.run_on_engine(migrate.upgrade)
    assert database.snapshot() == []

    def commit_after_the_error(connection: Connection) -> None:
        with pytest.raises(DatabaseError, match="nowhere"):
            migrate.upgrade(connection)

    database.run(commit_after_the_error)
    assert database.snapshot() == []
    database.run_on_engine(migrate.upgrade, HEAD)
    assert database.run(migrate.current) == HEAD
    if driver == "sqlite":
        engine.dispose()


def test_a_downgrade_that_would_drop_timers_is_refused(database: Database) -> None:
    database.run(migrate.upgrade)
    database.add_timer()
    migrated = database.snapshot()
    with pytest.raises(DowngradeRefusedError, match=r"would drop 1 timer; .*alembic -x force=true downgrade base"):
        database.run_on_engine(migrate.downgrade)
    with pytest.raises(DowngradeRefusedError):
        database.run(migrate.downgrade)
    assert database.snapshot() == migrated
    assert database.sql("SELECT count(*) FROM timers") == [(1,)]
    database.run_on_engine(migrate.downgrade, force=True)
    assert database.snapshot() == []


def test_a_database_of_a_newer_version_is_left_alone(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("UPDATE aion_timers_version SET version_num = 'aion9999'")
    before = database.snapshot()
    for work in (migrate.upgrade, migrate.downgrade, migrate.check):
        with pytest.raises(MigrationError, match=r"revision aion9999, which this .*; upgrade the library"):
            database.run(work)
    with pytest.raises(MigrationError, match="upgrade the library"):
        database.run_on_engine(migrate.upgrade)
    assert database.run(migrate.current) == "aion9999"
    assert database.snapshot() == before


@pytest.mark.parametrize("work", [migrate.upgrade, migrate.downgrade])
def test_a_revision_that_does_not_exist(work: Callable[[Engine, str], None], tmp_path: Path) -> None:
    engine = create_engine(f"sqlite+libsql:///{tmp_path / 'timers.db'}")
    with pytest.raises(InvalidInputError, match=r"revision 'aion0815': .*; pass 'head', 'base'"):
        work(engine, "aion0815")
    assert migrate.current(engine) is None
    engine.dispose()


def test_migrating_at_isolation_level_autocommit(database: Database) -> None:
    autocommit = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    other = Database(database.backend, database.url, autocommit)
    with pytest.raises(UnsupportedBindError, match=r"AUTOCOMMIT.*pass the engine"):
        other.run(migrate.upgrade)
    assert database.snapshot() == []
    other.run_on_engine(migrate.upgrade)
    other.run(migrate.check)
    other.run_on_engine(migrate.downgrade)
    assert database.snapshot() == []


def test_what_is_no_sync_connection_is_refused_with_the_line_to_write(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite+libsql:///{tmp_path / 'timers.db'}")
    async_engine = create_async_engine(f"sqlite+aiolibsql:///{tmp_path / 'timers.db'}")
    session = AsyncSession(async_engine)
    binds: list[tuple[Any, str]] = [
        (async_engine, r"not on an AsyncEngine; .*await connection.run_sync\(migrate.upgrade\)"),
        (async_engine.connect(), r"not on an AsyncConnection; .*await connection.run_sync\(migrate.upgrade\)"),
        (async_engine.sync_engine, r"not on an Engine; .*await connection.run_sync\(migrate.upgrade\)"),
        (session, r"not on an AsyncSession; .*await session.connection\(\)"),
        (async_scoped_session(lambda: session, lambda: 1), r"not on an async_scoped_session; .*session.connection\(\)"),  # type: ignore[arg-type]
        (Session(engine), r"not on a Session; pass session.connection\(\)"),
        ("sqlite://", "a str is no connection"),
        (None, "a NoneType is no connection"),
        (create_engine("sqlite://").raw_connection, "is no connection"),
    ]
    for bind, message in binds:
        for work in (migrate.upgrade, migrate.downgrade, migrate.check, migrate.current):
            with pytest.raises(UnsupportedBindError, match=message):
                work(bind)
    engine.dispose()


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    for driver in ("sqlite", "sqlite+libsql"):
        with pytest.raises(StoreUnavailableError, match="cannot be opened"):
            migrate.upgrade(create_engine(f"{driver}:///{tmp_path / 'missing' / 'timers.db'}"))


def test_an_engine_at_the_head_takes_no_lock(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite+libsql:///{tmp_path / 'timers.db'}", connect_args={"timeout": 0.1})
    migrate.upgrade(engine)
    with engine.connect() as writer:
        writer.exec_driver_sql("DELETE FROM timers")
        migrate.upgrade(engine)
        migrate.check(engine)
        with pytest.raises(MigrationError, match=r"a lock could not be had: .*; another program"):
            migrate.downgrade(engine)
    migrate.downgrade(engine)
    engine.dispose()


def test_a_lock_that_another_migration_holds(new_database: Callable[..., Database]) -> None:
    database = new_database("psycopg", connect_args={"options": "-c lock_timeout=50ms"})
    with database.engine.begin() as first:
        migrate.upgrade(first)
        with pytest.raises(MigrationError, match=r"a lock could not be had: .*lock timeout"):
            migrate.upgrade(database.engine)
    migrate.check(database.engine)
    with database.engine.begin() as reader:
        reader.execute(text("SELECT * FROM timers"))
        with pytest.raises(MigrationError, match=r"a lock could not be had: .*lock timeout"):
            migrate.downgrade(database.engine)
    migrate.check(database.engine)


@pytest.mark.parametrize("given", ["0", "7s"])
def test_the_lock_timeout_of_a_host_is_as_before(given: str, new_database: Callable[..., Database]) -> None:
    database = new_database("psycopg", connect_args={"options": f"-c lock_timeout={given}"})
    with database.engine.begin() as connection:
        migrate.upgrade(connection)
        assert connection.scalar(text("SHOW lock_timeout")) == given
    assert database.sql("SHOW lock_timeout") == [(given,)]


def test_an_engine_of_serializable_transactions_waits_for_the_other(new_database: Callable[..., Database]) -> None:
    database = new_database("psycopg", isolation_level="SERIALIZABLE")
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(migrate.upgrade, database.engine) for _ in range(4)]:
            done.result()
    migrate.check(database.engine)
    assert database.sql("SHOW transaction_isolation") == [("serializable",)]


@pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg"])
def test_threads_that_migrate_databases_of_their_own(backend: str, new_database: Callable[..., Database]) -> None:
    made = [new_database(backend) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda database: migrate.upgrade(database.engine), made))
        list(threads.map(lambda database: migrate.check(database.engine), made))
        list(threads.map(lambda database: migrate.downgrade(database.engine), made))
    assert [database.snapshot() for database in made] == [[]] * 4


@pytest.mark.parametrize("backend", ["aiolibsql", "aiosqlite", "psycopg_async", "asyncpg"])
def test_tasks_that_migrate_one_database_at_once(backend: str, new_database: Callable[..., Database]) -> None:
    engine = new_database(backend).engine

    async def upgrade() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(migrate.upgrade)

    async def all_at_once() -> None:
        await asyncio.gather(*(upgrade() for _ in range(4)))
        async with engine.connect() as connection:
            await connection.run_sync(migrate.check)
        await engine.dispose()

    asyncio.run(all_at_once())


# -- a host that has migrations of its own ----------------------------------------------------------------------------

HOST_ENV = """
from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
"""
HOST_REVISION = """
import sqlalchemy as sa
from alembic import context, op

revision, down_revision, branch_labels, depends_on = "host1", None, None, {depends_on}


def upgrade() -> None:
    {upgrade}
    op.create_table("orders", sa.Column("id", sa.Integer()))
    assert not context.is_offline_mode()


def downgrade() -> None:
    op.drop_table("orders")
    {downgrade}
"""


def host(connection: Connection, scripts: Path, *, ours: bool = False) -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("path_separator", "newline")
    if ours:
        versions = f"{scripts / 'versions'}\n{ROOT / 'migrations' / 'versions'}"
        config.set_main_option("version_locations", versions)
    config.attributes["connection"] = connection
    return config


def write_host(scripts: Path, **parts: str) -> None:
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(HOST_ENV)
    (scripts / "versions" / "host1.py").write_text(HOST_REVISION.format(**parts))


def test_a_migration_of_the_host_calls_ours(database: Database, tmp_path: Path) -> None:
    scripts = tmp_path / "host"
    write_host(
        scripts,
        depends_on="None",
        upgrade="from aion_timers import migrate; migrate.upgrade(op.get_bind())",
        downgrade="from aion_timers import migrate; migrate.downgrade(op.get_bind())",
    )
    database.run(lambda connection: alembic.command.upgrade(host(connection, scripts), "head"))
    database.run(migrate.check)
    assert database.sql("SELECT version_num FROM alembic_version") == [("host1",)]
    database.run(lambda connection: alembic.command.downgrade(host(connection, scripts), "base"))
    database.sql("DROP TABLE alembic_version")
    assert database.snapshot() == []


@pytest.mark.parametrize(("needed", "versions"), [("aion0001", [HEAD, "host1"]), (HEAD, ["host1"])])
def test_a_host_runs_ours_among_its_own(needed: str, versions: list[str], database: Database, tmp_path: Path) -> None:
    scripts = tmp_path / "host"
    write_host(scripts, depends_on=repr(needed), upgrade="pass", downgrade="pass")
    database.run(lambda connection: alembic.command.upgrade(host(connection, scripts, ours=True), "heads"))
    assert database.sql("SELECT count(attempts) FROM timers") == [(0,)]
    found = database.sql("SELECT version_num FROM alembic_version ORDER BY version_num")
    assert [version for (version,) in found] == versions
    database.run(lambda connection: alembic.command.downgrade(host(connection, scripts, ours=True), "base"))
    database.sql("DROP TABLE alembic_version")
    assert database.snapshot() == []


@pytest.mark.parametrize("backend", ["libsql", "sqlite", "psycopg", "asyncpg"])
def test_a_schema_that_the_host_translates_to(
    backend: str, new_database: Callable[..., Database], tmp_path: Path
) -> None:
    database = new_database(backend)
    if database.is_sqlite:
        prepare = f"ATTACH DATABASE '{tmp_path / 'tenant.db'}' AS tenant"
    else:
        prepare = "CREATE SCHEMA tenant"
        database.sql("CREATE TABLE public.timers (ours_is_another INTEGER)")
    before = database.snapshot()

    def up_and_down(connection: Connection) -> None:
        connection.exec_driver_sql(prepare)
        tenant = connection.execution_options(schema_translate_map={None: "tenant"})
        migrate.upgrade(tenant)
        migrate.check(tenant)
        assert migrate.current(tenant) == HEAD
        assert tenant.exec_driver_sql("SELECT count(*) FROM tenant.timers").scalar() == 0
        assert tenant.exec_driver_sql("SELECT version_num FROM tenant.aion_timers_version").scalar() == HEAD
        migrate.downgrade(tenant)
        with pytest.raises(NotMigratedError):
            migrate.check(tenant)

    database.run(up_and_down)
    assert database.snapshot() == before
