import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Self

import pytest
import sqlalchemy as sa
from sqlalchemy import URL

from aion_timers.libsql.hrana import dbapi
from tests.libsql.conftest import AsyncWorld, Base, Item, SyncWorld, World
from tests.proxy import Mood, Proxy
from tests.sqld import Sqld

_numbers = count()


class ServerDatabase:
    """A database on the server, and what another program may do to it meanwhile."""

    def __init__(self, url: URL) -> None:
        self.url = url

    @property
    def address(self) -> str:
        """What follows the two slashes of a URL."""
        return f"{self.url.host}:{self.url.port}/{self.url.database}"

    def behind(self, proxy: Proxy) -> str:
        """The address by way of a proxy."""
        return f"{self.url.host}:{proxy.port}/{self.url.database}"

    def connect(self, **options: Any) -> dbapi.Connection:
        """A connection that the test closes."""
        return dbapi.connect(f"http://{self.address}", **options)

    def run(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Run and commit a statement on a connection of its own."""
        connection = self.connect()
        try:
            cursor = connection.execute(sql, parameters)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
            return rows
        finally:
            connection.close()


@pytest.fixture(scope="session")
def items_template(sqld: Sqld) -> str:
    """The name of a database with two rows, 1 and 2, to be forked."""
    engine = sa.create_engine(sqld.create("items"))
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Item), [{"id": 1, "n": 0}, {"id": 2, "n": 0}])
    engine.dispose()
    return "items"


@pytest.fixture
def database(sqld: Sqld, items_template: str) -> Iterator[ServerDatabase]:
    """A database on the server with two rows, 1 and 2."""
    name = f"items{next(_numbers)}"
    yield ServerDatabase(sqld.fork(items_template, name))
    sqld.drop(name)


@pytest.fixture
def proxy(sqld: Sqld) -> Iterator[Proxy]:
    """A proxy before the server."""
    with Proxy.started(sqld.port) as made:
        yield made


FAR = 0.01  # seconds that make a server one that is far away


def is_end(request: bytes) -> bool:
    """Whether a request ends a transaction that has only read, and closes its stream."""
    # one without a stream is that of a connection which is made; a COMMIT that can fail has a ROLLBACK behind it
    return b'"type":"close"' in request and b'"baton":null' not in request and b'"condition"' not in request


class HeldEnds:
    """Within it the requests that end a transaction which has only read go no further than the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self.sent = 0
        self.others = 0
        self._proxy = proxy
        self._let_go = threading.Event()

    def __enter__(self) -> Self:
        self._proxy.meddle = self._meddle
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go.set()
        # read_timeout, which is how long one waits for an answer
        assert time.monotonic() - self._start < 30

    def _meddle(self, request: bytes) -> Mood:
        if is_end(request):
            self.sent += 1
            self._let_go.wait()
        else:
            self.others += 1
        return Mood.HELP


@pytest.fixture(params=[SyncWorld, AsyncWorld], ids=["sync", "async"])
def make_world(request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """Makes an engine for an address, and disposes of it."""
    worlds: list[World] = []

    def make(address: str, **options: Any) -> World:
        worlds.append(request.param(address, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World], database: ServerDatabase) -> World:
    """An engine on the database."""
    return make_world(database.address)
