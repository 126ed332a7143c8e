"""The command line, run in this process where that tells as much, else as a program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import URL, Engine, create_engine

from aion_timers import prepare_sqlite
from aion_timers.cli.app import run
from tests.conftest import Databases
from tests.forkserver import Program, fork_server

VARIABLES = ("AION_TIMERS_URL", "AION_TIMERS_TRACEBACK")


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        """The lines that it printed, as cells."""
        return [line.split("\t") for line in self.out.splitlines()]


Cli = Callable[..., Result]
NewUrl = Callable[[str], URL]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object, url: URL | None = None, code: int | None = 0) -> Result:
        given = [str(argument) for argument in arguments]
        if url is not None:
            given += ["--url", text(url)]
        monkeypatch.setattr(sys, "argv", ["aion-timers", *given])
        ended = run()
        result = Result(ended, *capsys.readouterr())
        assert code in {None, ended}, result
        return result

    return call


def text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1", **variables}


MAIN = "import aion_timers.cli as cli; cli.main()"


def start(*arguments: object, cwd: Path, code: str = MAIN, **variables: str) -> Program:
    """The command line as a program of its own."""
    return fork_server().start(["-c", code, *map(str, arguments)], cwd, environment(**variables))


def start_with_pipes(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """The same, for what is to be read while it runs."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sync_engine(url: URL) -> Engine:
    """An engine of a sync driver."""
    engine = create_engine(url)
    if url.get_driver_name() == "pysqlite":
        prepare_sqlite(engine)
    return engine


@pytest.fixture
def new_url(
    request: pytest.FixtureRequest, tmp_path: Path, libsql_template: Path, sqlite_template: Path
) -> Iterator[NewUrl]:
    """Makes fresh migrated databases of a sync driver."""
    made: list[URL] = []

    def make(kind: str) -> URL:
        if kind == "psycopg":
            databases: Databases = request.getfixturevalue("databases")
            made.append(databases.create(template=request.getfixturevalue("postgres_template")))
            return made[-1].set(drivername="postgresql+psycopg")
        path = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}.db"
        shutil.copy(libsql_template if kind == "libsql" else sqlite_template, path)
        return URL.create("sqlite+libsql" if kind == "libsql" else "sqlite", database=str(path))

    yield make
    for url in made:
        request.getfixturevalue("databases").drop(url)


@pytest.fixture
def engine_of() -> Iterator[Callable[[URL], Engine]]:
    """Makes engines that are disposed of in the end."""
    engines: list[Any] = []

    def make(url: URL) -> Engine:
        engines.append(sync_engine(url))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
