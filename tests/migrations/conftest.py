"""Databases that nothing has migrated yet, on every backend, and Alembic's command line."""

from __future__ import annotations

import asyncio
import io
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, text

from tests.conftest import Databases, _numbers, open_engine
from tests.forkserver import Program, fork_server
from tests.store import SERVERS

ROOT = Path(__file__).parents[2]
HEAD = "aion0002"
P = ParamSpec("P")
T = TypeVar("T")
Snapshot = list[tuple[Any, ...]]

POSTGRESQL_CATALOG = """
SELECT 'relation', c.relname::text, c.relkind::text || c.relpersistence::text,
    (SELECT string_agg(option, ' ' ORDER BY option) FROM unnest(c.reloptions) option) FROM pg_class c
WHERE c.relnamespace = 'public'::regnamespace
UNION ALL SELECT 'column', c.relname::text, a.attnum::text, a.attname || ' '
    || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' ' || coalesce(l.collname, '-') || ' '
    || coalesce(pg_get_expr(d.adbin, d.adrelid), '-')
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid LEFT JOIN pg_collation l ON l.oid = a.attcollation
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL SELECT 'constraint', c.conname::text, c.contype::text, pg_get_constraintdef(c.oid) FROM pg_constraint c
WHERE c.connamespace = 'public'::regnamespace
UNION ALL SELECT 'index', i.tablename::text, i.indexname::text, i.indexdef FROM pg_indexes i
WHERE i.schemaname = 'public'
ORDER BY 1, 2, 3, 4"""
SQLITE_CATALOG = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"


class Database:
    """A database of one backend, sync or async, that is worked on through sync connections."""

    def __init__(self, backend: str, url: URL, engine: Any) -> None:
        self.backend = backend
        self.url = url
        self.engine = engine
        self.is_async = not isinstance(engine, Engine)
        self.is_sqlite = url.get_backend_name() == "sqlite"

    def run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something on a connection, in a transaction that is committed if it goes well."""
        if not self.is_async:
            with self.engine.begin() as connection:
                return work(connection, *args, **kwargs)

        async def run() -> T:
            try:
                async with self.engine.begin() as connection:
                    done: T = await connection.run_sync(work, *args, **kwargs)
                    return done
            finally:
                await self.engine.dispose()

        return asyncio.run(run())

    def run_on_engine(self, work: Callable[Concatenate[Engine, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something with the engine, for an async one from within ``run_sync``."""
        if not self.is_async:
            return work(self.engine, *args, **kwargs)

        async def run() -> T:
            try:
                async with self.engine.connect() as connection:
                    done: T = await connection.run_sync(lambda its: work(its.engine, *args, **kwargs))
                    return done
            finally:
                await self.engine.dispose()

        return asyncio.run(run())

    def sql(self, *statements: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run plain SQL in one transaction; the rows of the last statement."""

        def work(connection: Connection) -> list[tuple[Any, ...]]:
            for statement in statements:
                result = connection.execute(text(statement), parameters)
            return [tuple(row) for row in result] if result.returns_rows else []

        return self.run(work)

    def snapshot(self) -> Snapshot:
        """All that the catalog says."""
        return self.sql(SQLITE_CATALOG if self.is_sqlite else POSTGRESQL_CATALOG)

    def add_timer(self) -> None:
        """Store one timer, as its SQL."""
        self.sql(ADD_TIMER if self.is_sqlite else ADD_TIMER.replace('"6', "6").replace('00ff"', "00ff"))


ADD_TIMER = """INSERT INTO timers (workflow_id, timer_id, fire_at)
VALUES ('"6f9619ff-8b86-4011-b42d-00cf4fc900ff"', '{"Named"\\:"wake-up"}', '2026-06-03T02:30:00.000000000Z')"""


@pytest.fixture
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Database]]:
    """Makes databases that nothing has migrated."""
    made: list[Database] = []
    dropped: list[URL] = []
    spaces: list[str] = []

    def make(backend: str, file: Path | None = None, **options: Any) -> Database:
        if backend.startswith(("psycopg", "asyncpg")):
            databases: Databases = request.getfixturevalue("databases")
            dropped.append(databases.create())
            url = dropped[-1].set(drivername=f"postgresql+{backend}")
        elif backend in SERVERS:
            spaces.append(f"migrations{next(_numbers)}")
            made_there = request.getfixturevalue("sqld").create(spaces[-1])
            url = made_there.set(drivername=f"sqlite+{backend.removesuffix('_server')}")
        else:
            file = file or tmp_path / f"{len(made)}.db"
            url = URL.create("sqlite" if backend == "sqlite" else f"sqlite+{backend}", database=str(file))
        made.append(Database(backend, url, open_engine(url, **options)))
        return made[-1]

    yield make
    for database in made:
        if not database.is_async:
            database.engine.dispose()
    for url in dropped:
        request.getfixturevalue("databases").drop(url)
    for space in spaces:
        request.getfixturevalue("sqld").drop(space)


@pytest.fixture
def database(backend: str, new_database: Callable[..., Database]) -> Database:
    """An empty database of each backend."""
    return new_database(backend)


def start_alembic(*arguments: str, cwd: Path = ROOT, url: URL | None = None, **environment: str) -> Program:
    """Start Alembic's command line in a process of its own."""
    x = [] if url is None else ["-x", f"url={url.render_as_string(hide_password=False)}"]
    inherited = {name: value for name, value in os.environ.items() if name != "AION_TIMERS_URL"}
    return fork_server().start(["-m", "alembic", *x, *arguments], cwd, inherited | environment)


def alembic(
    *arguments: str, status: int = 0, cwd: Path = ROOT, url: URL | None = None, **environment: str
) -> tuple[str, str]:
    """Run Alembic's command line; what it printed and what it reported."""
    process = start_alembic(*arguments, cwd=cwd, url=url, **environment)
    out, report = process.communicate(timeout=60)
    assert process.returncode == status, report
    return out, report


def in_process(work: Callable[..., None], *arguments: Any, x: Sequence[str] = (), **options: Any) -> str:
    """Run a command of Alembic's in this process, as a program without ``alembic.ini`` would; what it printed."""
    out = io.StringIO()
    config = Config(output_buffer=out, stdout=out, cmd_opts=Namespace(x=list(x)))
    config.set_main_option("script_location", str(ROOT / "migrations"))
    work(config, *arguments, **options)
    return out.getvalue()
