"""The fixtures for applications' tests, used by a pytest of its own in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Callable

import psycopg
import pytest
from sqlalchemy import URL

VARIABLE = "AION_TIMERS_TEST_POSTGRES"
CONFTEST = 'pytest_plugins = ["aion_timers.testing.pytest_plugin"]\n'

# writes down which databases are made, for others may be making some on the same server
RECORDING = """
import pytest

@pytest.fixture(scope="session")
def record(request):
    def record(engine):
        with request.config.rootpath.joinpath("made.txt").open("a") as file:
            file.write(f"{engine.url.database}\\n")
    return record

@pytest.fixture(scope="session")
def timers_prepare(record):
    return record
"""
INI = """
[pytest]
filterwarnings = error
"""

# a test for each database, sync and async, that would fail if another one's timers were there
MODULE = """
import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aion_timers import AsyncDispatcher, AsyncTimerRepository, Dispatcher, TimerRepository, migrate
from aion_timers.testing import run_due

DAY = timedelta(days=1)

@pytest.fixture
def engine(timers_DATABASE_engine, record):
    record(timers_DATABASE_engine)
    return timers_DATABASE_engine

@pytest.mark.parametrize("number", range(3))
def test_sync(number, engine, timers_clock):
    migrate.check(engine)
    with Session(engine) as session, session.begin():
        timers = TimerRepository(session, clock=timers_clock)
        assert timers.next_fire_at() is None
        timers.schedule(uuid4(), "reminder", timers.now() + DAY)
    fired = run_due(Dispatcher(engine, lambda _: None, clock=timers_clock), until=timers_clock.now() + 3 * DAY)
    assert [one.timer.timer_id.value for one in fired] == ["reminder"]

@pytest.mark.parametrize("number", range(2))
def test_async(number, timers_DATABASE_async_engine, timers_clock):
    async def handle(delivery):
        async with delivery.transaction():
            pass

    async def use(engine):
        async with AsyncSession(engine) as session, session.begin():
            timers = AsyncTimerRepository(session, clock=timers_clock)
            assert await timers.next_fire_at() is None
            await timers.schedule(uuid4(), "reminder", timers_clock.now() + DAY)
        dispatcher = AsyncDispatcher(engine, handle, clock=timers_clock)
        assert len(await run_due(dispatcher, until=timers_clock.now() + 3 * DAY)) == 1

    for _ in range(2):  # in one event loop after the other
        asyncio.run(use(timers_DATABASE_async_engine))
    assert timers_DATABASE_async_engine.url.drivername == DRIVER

def test_both_engines_have_one_database(engine, timers_DATABASE_async_engine, timers_DATABASE_url, timers_clock):
    async def schedule():
        async with timers_DATABASE_async_engine.begin() as connection:
            await AsyncTimerRepository(connection).schedule(uuid4(), "a", timers_clock.now())

    asyncio.run(schedule())
    with Session(engine) as session:
        assert TimerRepository(session).next_fire_at() == timers_clock.now()
    assert engine.url.database == timers_DATABASE_url.database
"""

UNTIDY = """
kept = []

def test_that_fails(engine):
    assert engine.url.database.startswith("aion_timers_test_")
    assert not engine.url.database, "in vain"

def test_that_keeps_a_connection(engine):
    kept.append(engine.connect())
    kept[0].execute(text("SELECT * FROM timers"))
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs pytest in a process of its own, where nobody has named a server unless the test does."""
    pytester.makeini(INI)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*arguments: str, server: URL | str | None = None) -> pytest.RunResult:
        if server is not None:
            url = server if isinstance(server, str) else server.render_as_string(hide_password=False)
            monkeypatch.setenv(VARIABLE, url)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)

    return run


def module(database: str, driver: str) -> str:
    return MODULE.replace("DATABASE", database).replace("DRIVER", repr(driver))


def existing(server: URL) -> set[str]:
    with psycopg.connect(server.render_as_string(hide_password=False)) as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}


@pytest.mark.parametrize(
    ("arguments", "driver"),
    [([], "postgresql+psycopg"), (["-p", "xdist.plugin", "-n", "2"], "postgresql+asyncpg")],
    ids=["alone", "xdist"],
)
def test_each_test_has_a_migrated_database_of_its_own_and_none_is_left(
    pytester: pytest.Pytester,
    run: Callable[..., pytest.RunResult],
    postgres_server: URL,
    arguments: list[str],
    driver: str,
) -> None:
    pytester.makeconftest(CONFTEST + RECORDING)
    pytester.makepyfile(
        test_libsql=module("libsql", "sqlite+aiolibsql"), test_postgres=module("postgres", driver) + UNTIDY
    )
    result = run(*arguments, server=postgres_server.set(drivername=driver.removesuffix("+psycopg")))
    result.assert_outcomes(passed=13, failed=1)
    result.stdout.fnmatch_lines(["*in vain*"])
    made = pytester.path.joinpath("made.txt").read_text(encoding="utf-8").split()
    # sync tests of both databases, and at least a template of each
    assert len(set(made)) == len(made) >= 10 + 2
    assert not existing(postgres_server) & set(made)


def test_without_a_server_the_message_says_what_to_do(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_it(timers_postgres_engine): ...\ndef test_file(timers_libsql_engine): ...")
    result = run()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"no PostgreSQL server to test on: set {VARIABLE} to the URL*timers_postgres_server"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py:*")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "postgresql://ada:sesame@127.0.0.1:1/postgres",
            "*the PostgreSQL server at 127.0.0.1:1 did not do it (*refused*",
        ),
        ("postgresql://ada:sesame@127.0.0.1:one/postgres", "*not a URL as in postgresql://*"),
        ("mysql://ada:sesame@127.0.0.1/postgres", "*not a URL as in postgresql://*"),
    ],
    ids=["no server", "no port", "no PostgreSQL"],
)
def test_a_server_that_does_not_answer_is_named_without_its_password(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], url: str, message: str
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_it(timers_postgres_engine): ...")
    result = run("--tb=long", "--showlocals", "--full-trace", server=url)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    assert "sesame" not in result.stdout.str() + result.stderr.str()


def test_the_server_may_come_from_a_fixture_and_tables_of_the_application_into_every_copy(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], postgres_server: URL
) -> None:
    url = postgres_server.render_as_string(hide_password=False)
    pytester.makeconftest(
        CONFTEST
        + f"""
import pytest
from sqlalchemy import text

prepared = []

@pytest.fixture(scope="session")
def timers_postgres_server():
    return {url!r}

@pytest.fixture(scope="session")
def timers_prepare():
    def prepare(engine):
        prepared.append(engine.dialect.name)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE orders (id INTEGER)"))
            connection.execute(text("INSERT INTO orders VALUES (7)"))
    return prepare

@pytest.fixture(params=["libsql", "postgres"])
def engine(request):
    return request.getfixturevalue(f"timers_{{request.param}}_engine")

@pytest.fixture(scope="session", autouse=True)
def once():
    yield
    assert sorted(prepared) == ["postgresql", "sqlite"]
"""
    )
    pytester.makepyfile(
        """
import pytest
from sqlalchemy import text

@pytest.mark.parametrize("number", range(2))
def test_it(engine, number):
    with engine.begin() as connection:
        assert connection.scalar(text("DELETE FROM orders RETURNING id")) == 7
"""
    )
    run().assert_outcomes(passed=4)


@pytest.mark.parametrize(
    "database",
    # the server waits for five seconds
    ["libsql", pytest.param("postgres", marks=pytest.mark.slow)],
)
def test_a_template_that_is_still_open_is_refused(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], postgres_server: URL, database: str
) -> None:
    pytester.makeconftest(
        CONFTEST
        + """
import pytest

kept = []

@pytest.fixture(scope="session")
def timers_prepare():
    return lambda engine: kept.append(engine.connect())
"""
    )
    pytester.makepyfile(f"def test_it(timers_{database}_engine): ...")
    result = run("-W", "ignore", server=postgres_server)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["timers_prepare has left a connection open*"])


def test_an_error_of_the_applications_own_preparation_is_shown_with_its_line(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], postgres_server: URL
) -> None:
    pytester.makeconftest(
        CONFTEST
        + """
import pytest

@pytest.fixture(scope="session")
def timers_prepare():
    def prepare(engine):
        raise LookupError(engine.url.database)
    return prepare
"""
    )
    pytester.makepyfile("def test_one(timers_libsql_engine): ...\ndef test_other(timers_postgres_engine): ...")
    result = run(server=postgres_server)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*raise LookupError*"])
    (made,) = set(re.findall(r"aion_timers_test_\w+", result.stdout.str()))
    assert made not in existing(postgres_server)
