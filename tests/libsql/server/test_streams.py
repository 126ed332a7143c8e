"""How long a stream lives: one that serves several transactions must not show in any of them."""

import json
import math
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from aion_timers import libsql
from aion_timers.libsql.hrana import network, stream
from tests.libsql.conftest import AsyncWorld, SyncWorld, World
from tests.proxy import Answer, Front, Mood, Proxy
from tests.sqld import Sqld

from .conftest import FAR, HeldEnds, ServerDatabase, is_end
from .test_faults import CERTIFICATE, MakeWorld, forwarding, increment, value

PAUSE = 0.3  # seconds: longer than what lies between two transactions that follow each other


def read(connection: sa.Connection) -> Any:
    return connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar()


class Watched:
    """A world whose requests are read on their way."""

    def __init__(self, world: World, proxy: Proxy) -> None:
        self.world = world
        self.proxy = proxy
        self.requests: list[bytes] = []
        proxy.meddle = self._read

    def _read(self, request: bytes) -> Mood:
        self.requests.append(request)
        return Mood.HELP

    @property
    def begun(self) -> int:
        """How many requests have asked for a new stream."""
        return sum(b'"baton":null' in request for request in self.requests)

    @property
    def closed(self) -> int:
        """How many have closed one."""
        return sum(b'"type":"close"' in request for request in self.requests)


@pytest.fixture
def watched(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy) -> Watched:
    """An engine with one connection, which has no stream."""
    world = make_world(database.behind(proxy), pool_size=1, max_overflow=0)
    world.connection(lambda _: None)
    time.sleep(PAUSE)
    world.connection(read, isolation_level="AUTOCOMMIT")
    return Watched(world, proxy)


def test_transactions_that_follow_each_other_share_a_stream(watched: Watched, database: ServerDatabase) -> None:
    for _ in range(10):
        watched.world.connection(increment)
    assert len(watched.requests) == 20
    # a machine that stands still for a moment makes another one necessary
    assert 1 <= watched.begun <= 3
    assert value(database) == 10


def test_a_transaction_alone_leaves_no_stream_behind(watched: Watched, database: ServerDatabase) -> None:
    for _ in range(3):
        time.sleep(PAUSE)
        watched.world.connection(increment)
    assert len(watched.requests) == 6
    assert watched.begun == watched.closed == 3
    assert value(database) == 3


def test_the_first_transaction_after_a_series_closes_its_stream(watched: Watched) -> None:
    for _ in range(3):
        watched.world.connection(increment)
    time.sleep(PAUSE)
    closed = watched.closed
    watched.world.connection(increment)
    assert watched.closed == closed + 1


def test_connections_that_come_and_go_leave_no_stream_behind(database: ServerDatabase) -> None:
    # more than the 128 that the server allows at a time, each of which it would hold for 10 seconds
    for _ in range(200):
        database.run("UPDATE items SET n = n + 1 WHERE id = 1")
    assert value(database) == 200


def test_statements_that_fail_leave_no_stream_behind(watched: Watched) -> None:
    def fail(connection: sa.Connection) -> None:
        for _ in range(200):
            with pytest.raises(sa.exc.IntegrityError):
                connection.exec_driver_sql("INSERT INTO items (id, n) VALUES (1, 0)")

    watched.world.connection(fail, isolation_level="AUTOCOMMIT")


@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
def test_a_series_goes_on_after_the_server_was_started_again(make_world: MakeWorld, level: str) -> None:
    with Sqld.started() as server:
        database = ServerDatabase(server.create("own"))
        database.run("CREATE TABLE items (id INTEGER PRIMARY KEY, n INTEGER)")
        database.run("INSERT INTO items (id, n) VALUES (1, 0)")
        world = make_world(database.address, pool_size=1, max_overflow=0)
        for number in range(1, 4):
            world.connection(increment, isolation_level=level)
            world.connection(increment, isolation_level=level)
            server.restart()
            assert value(database) == 2 * number


def failing_commit(connection: sa.Connection) -> None:
    connection.exec_driver_sql("INSERT INTO parts VALUES (404)")
    connection.commit()


def count_and_write(connection: sa.Connection) -> int:
    total: int = connection.exec_driver_sql("SELECT count(*) FROM parts").scalar_one()
    connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
    connection.commit()
    return total


def test_a_commit_that_fails_leaves_nothing_to_the_next_transaction(watched: Watched, database: ServerDatabase) -> None:
    database.run("CREATE TABLE parts (item REFERENCES items DEFERRABLE INITIALLY DEFERRED)")
    start = time.monotonic()
    for _ in range(3):
        watched.world.connection(increment)
        with pytest.raises(sa.exc.IntegrityError):
            watched.world.connection(failing_commit)
        assert watched.world.connection(count_and_write) == 0
    # what is left open has the lock until the server takes it away, which it does after 5 seconds
    assert time.monotonic() - start < 4
    assert database.run("SELECT count(*) FROM parts") == [(0,)]
    assert value(database) == 6


def test_what_was_not_committed_is_gone_in_the_same_stream(watched: Watched, database: ServerDatabase) -> None:
    def rolled_back(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = 100 WHERE id = 1")
        connection.rollback()
        assert connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar_one() < 100

    def left(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = 100 WHERE id = 1")

    for body in (increment, rolled_back, left, increment):
        watched.world.connection(body)
    assert watched.begun <= 3
    assert value(database) == 2


def test_a_series_does_not_hold_the_write_lock(watched: Watched, database: ServerDatabase) -> None:
    for _ in range(3):
        watched.world.connection(increment)
        start = time.monotonic()
        database.run("UPDATE items SET n = n + 1 WHERE id = 1")
        # the server would take a lock away after 5 seconds
        assert time.monotonic() - start < 4
    assert value(database) == 6


def test_a_stream_between_two_transactions_that_is_cut_off(watched: Watched, proxy: Proxy, database: Any) -> None:
    watched.world.connection(increment)
    watched.world.connection(increment)
    # the beginning of a transaction can be sent again, in a new stream
    proxy.once(Mood.CUT_BEFORE, b"BEGIN")
    watched.world.connection(increment)
    assert value(database) == 3


def test_a_commit_has_been_one_wherever_the_stream_shall_go_on(
    make_world: MakeWorld, database: ServerDatabase, sqld: Sqld
) -> None:
    forward = forwarding(sqld)

    def answer(path: str, headers: dict[str, str], body: bytes) -> Answer:
        status, told, content = forward(path, headers, body)
        if b"COMMIT" in body:
            content = json.dumps(json.loads(content) | {"base_url": "http://elsewhere"}).encode()
        return status, told, content

    with Front.answering(answer, certificate=CERTIFICATE) as front:
        context = ssl.create_default_context(cafile=CERTIFICATE)
        address = f"localhost:{front.port}/{database.url.database}?secure=true"
        world = make_world(address, connect_args={"ssl_context": context}, pool_size=1, max_overflow=0)
        world.connection(increment)
        world.connection(increment)
    assert value(database) == 2


# -- the end of a transaction that has only read -----------------------------------------------------------------------


def test_nobody_waits_for_the_end_of_a_transaction_that_has_only_read(
    make_world: MakeWorld, database: ServerDatabase, proxy: Proxy
) -> None:
    proxy.delay = FAR
    world = make_world(database.behind(proxy), pool_size=1, max_overflow=0)
    world.connection(increment)
    with HeldEnds(proxy) as ends:
        assert world.connection(read) == 1
        # the connection goes on while the end before has no answer yet
        world.connection(increment)
        assert ends.others == 3
    world.dispose()
    # the stream in which the writes were may be kept until now
    assert ends.sent in (1, 2)
    assert value(database) == 2


def test_one_end_at_a_time_is_on_its_way(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy) -> None:
    proxy.delay = FAR
    world = make_world(database.behind(proxy), connect_args={"read_timeout": 1}, pool_size=1, max_overflow=0)
    world.connection(increment)
    ends = []

    def meddle(request: bytes) -> Mood:
        if not is_end(request):
            return Mood.HELP
        ends.append(time.monotonic())
        return Mood.SWALLOW

    proxy.meddle = meddle
    for _ in range(3):
        # what became of the end before is nothing to them
        assert world.connection(read) == 1
    world.dispose()
    first, second, third = ends
    assert second - first > 0.5
    assert third - second > 0.5


def test_ends_that_nobody_waits_for_leave_no_stream_behind(
    make_world: MakeWorld, database: ServerDatabase, proxy: Proxy
) -> None:
    proxy.delay = FAR
    watched = Watched(make_world(database.behind(proxy), pool_size=1, max_overflow=0), proxy)
    for _ in range(20):
        watched.world.connection(read)
    watched.world.dispose()
    assert watched.begun == watched.closed


def test_reads_that_follow_each_other_on_a_near_server_share_a_stream(
    monkeypatch: pytest.MonkeyPatch, watched: Watched
) -> None:
    # what a round trip takes on this machine is not what is tested
    monkeypatch.setattr(stream, "_NEAR", math.inf)
    time.sleep(PAUSE)
    for _ in range(10):
        assert watched.world.connection(read) == 0
    # that of the first one, that of the others; a machine that stands still for a moment makes another one necessary
    assert 2 <= watched.begun <= 4


def test_nobody_waits_for_the_end_of_a_transaction_alone_that_has_only_read(watched: Watched) -> None:
    time.sleep(PAUSE)
    with HeldEnds(watched.proxy) as ends:
        watched.world.connection(read)
        assert ends.others == 1
    watched.world.dispose()
    assert ends.sent == 1


def test_a_read_is_good_whatever_becomes_of_its_end(make_world: MakeWorld) -> None:
    with Sqld.started() as server:
        database = ServerDatabase(server.create("own"))
        database.run("CREATE TABLE items (id INTEGER PRIMARY KEY, n INTEGER)")
        world = make_world(database.address, pool_size=1, max_overflow=0)
        world.connection(read)
        time.sleep(PAUSE)

        def read_the_last(connection: sa.Connection) -> None:
            assert read(connection) is None
            server.kill()
            connection.commit()

        world.connection(read_the_last)
        with pytest.raises(sa.exc.OperationalError, match="can't be reached"):
            world.connection(read)
        server.restart()
        assert world.connection(read) is None


def test_what_a_function_in_a_select_has_written_is_committed(make_world: MakeWorld, database: ServerDatabase) -> None:
    database.run("CREATE VIRTUAL TABLE texts USING fts4(body)")
    for _ in range(3):
        database.run("INSERT INTO texts VALUES ('a letter')")
    assert database.run("SELECT count(*) FROM texts_segdir") == [(3,)]
    world = make_world(database.address)
    world.connection(read)
    time.sleep(PAUSE)

    def optimize(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT optimize(texts) FROM texts LIMIT 1").all()
        connection.commit()

    world.connection(optimize)
    world.dispose()
    assert database.run("SELECT count(*) FROM texts_segdir") == [(1,)]


def test_an_end_is_sent_where_no_thread_can_begin(
    monkeypatch: pytest.MonkeyPatch, database: ServerDatabase, proxy: Proxy
) -> None:
    proxy.delay = FAR
    watched = Watched(SyncWorld(database.behind(proxy)), proxy)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "aion_timers.libsql":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    watched.world.connection(read)
    assert is_end(watched.requests[-1])
    watched.world.close()


def test_a_fork_waits_for_the_end_that_is_on_its_way(run_python: Any, proxy: Proxy, database: ServerDatabase) -> None:
    proxy.delay = 0.3
    code = f"""
import os, threading
import aion_timers, sqlalchemy as sa
engine = sa.create_engine("sqlite+libsql://{database.behind(proxy)}")
def read():
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1").all()
read()
child = os.fork()
if child == 0:
    import warnings
    warnings.simplefilter("ignore", ResourceWarning)  # it drops its parent's sockets
    read()
    os._exit(0)
assert threading.active_count() == 1, threading.enumerate()
assert os.waitpid(child, 0)[1] == 0
read()
engine.dispose()
"""
    run_python(code)


def test_an_exit_waits_a_moment_for_the_end_that_is_on_its_way(
    run_python: Any, proxy: Proxy, database: ServerDatabase
) -> None:
    proxy.delay = FAR
    ends = []
    proxy.meddle = lambda request: ends.append(is_end(request)) or Mood.HELP  # type: ignore[func-returns-value] # None
    code = f"""
import warnings
warnings.simplefilter("ignore", ResourceWarning)  # nothing is closed
import aion_timers, sqlalchemy as sa
engine = sa.create_engine("sqlite+libsql://{database.behind(proxy)}")
with engine.connect() as connection:
    connection.exec_driver_sql("SELECT 1").all()
"""
    run_python(code)
    assert ends[-1]


def test_an_interpreter_that_ends_begins_no_thread(run_python: Any, proxy: Proxy, database: ServerDatabase) -> None:
    proxy.delay = FAR
    code = f"""
import aion_timers
from aion_timers.libsql.hrana import dbapi
class Last:
    def __init__(self):
        self.connection = dbapi.connect("http://{database.behind(proxy)}")
        self.connection.execute("SELECT 1")
    def __del__(self, print=print):
        try:
            self.connection.commit()
        finally:
            print("over", flush=True)
last = Last()
last.itself = last
"""
    assert run_python(code) == "over"


def test_an_end_on_its_way_does_not_stop_the_exit(run_python: Any, proxy: Proxy, database: ServerDatabase) -> None:
    proxy.delay = FAR
    proxy.meddle = lambda request: Mood.SWALLOW if is_end(request) else Mood.HELP
    code = f"""
import asyncio, warnings
warnings.simplefilter("ignore", ResourceWarning)  # nothing is closed
import aion_timers, sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
engine = sa.create_engine("sqlite+libsql://{database.behind(proxy)}")
with engine.connect() as connection:
    connection.exec_driver_sql("SELECT 1").all()
async def run():
    engine = create_async_engine("sqlite+aiolibsql://{database.behind(proxy)}")
    async with engine.connect() as connection:
        (await connection.exec_driver_sql("SELECT 1")).all()
asyncio.run(run())
"""
    start = time.monotonic()
    assert run_python(code) == ""
    # the server would be waited for for 30 seconds
    assert time.monotonic() - start < 25


# -- the way to the server ---------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment without proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_a_proxy_of_the_environment_is_used(
    environment: pytest.MonkeyPatch, make_world: MakeWorld, database: ServerDatabase, proxy: Proxy
) -> None:
    environment.setenv("http_proxy", f"localhost:{proxy.port}")
    # only the proxy knows where this is
    world = make_world(f"no-such-host:80/{database.url.database}")
    world.connection(increment)
    assert value(database) == 1
    environment.setenv("no_proxy", "no-such-host")
    with pytest.raises(sa.exc.OperationalError, match="can't be reached"):
        make_world(f"no-such-host:80/{database.url.database}").connection(increment)


def test_an_idle_connection_that_the_server_has_closed_is_not_used(
    watched: Watched, proxy: Proxy, database: ServerDatabase
) -> None:
    watched.world.connection(increment, isolation_level="AUTOCOMMIT")
    made = proxy.connections
    proxy.cut()
    # a write at AUTOCOMMIT can't be sent twice, so it must not be sent in vain
    watched.world.connection(increment, isolation_level="AUTOCOMMIT")
    assert proxy.connections == made + 1
    assert value(database) == 2


def test_async_engines_go_by_the_streams_of_asyncio(monkeypatch: pytest.MonkeyPatch, database: ServerDatabase) -> None:
    connect: Callable[..., Any] = network.AsyncioBackend.connect_tcp
    hosts = []

    async def connect_tcp(backend: object, host: str, *arguments: Any, **options: Any) -> network.AsyncioStream:
        hosts.append(host)
        made: network.AsyncioStream = await connect(backend, host, *arguments, **options)
        return made

    monkeypatch.setattr(network.AsyncioBackend, "connect_tcp", connect_tcp)
    world = AsyncWorld(database.address)
    world.connection(increment)
    world.close()
    assert hosts == [database.url.host]


def test_a_server_that_is_lost_is_a_disconnect_also_in_a_series(make_world: MakeWorld) -> None:
    with Sqld.started() as server:
        database = ServerDatabase(server.create("own"))
        world = make_world(database.address, pool_size=1, max_overflow=0)
        world.connection(lambda connection: connection.exec_driver_sql("SELECT 1").all())
        server.kill()
        with pytest.raises(sa.exc.OperationalError, match="can't be reached") as caught:
            world.connection(lambda connection: connection.exec_driver_sql("SELECT 1").all())
        assert caught.value.connection_invalidated
        assert isinstance(caught.value.orig, libsql.DisconnectError)


def test_a_forked_process_does_not_go_on_in_the_stream_of_its_parent(
    run_python: Any, proxy: Proxy, database: ServerDatabase
) -> None:
    requests: list[bytes] = []

    def read(request: bytes) -> Mood:
        requests.append(request)
        return Mood.HELP

    proxy.meddle = read
    code = f"""
import os, warnings
warnings.simplefilter("ignore", ResourceWarning)  # the child drops its parent's sockets
import aion_timers, sqlalchemy as sa
engine = sa.create_engine("sqlite+libsql://{database.behind(proxy)}", pool_size=1)
def add(number):
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE items SET n = n + %d WHERE id = 1" % number)
add(1)
add(1)
child = os.fork()
if child == 0:
    try:
        add(10)
    finally:
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
add(100)
engine.dispose()
"""
    run_python(code)
    assert value(database) == 112
    (of_child,) = [request for request in requests if b"n + 10 " in request]
    assert b'"baton":null' in of_child


@pytest.mark.slow  # 6 seconds of silence
def test_a_stream_that_was_silent_for_long_is_not_tried(watched: Watched, database: ServerDatabase) -> None:
    watched.world.connection(increment)
    watched.world.connection(increment)
    begun = watched.begun
    time.sleep(6)
    watched.world.connection(increment)
    assert watched.begun == begun + 1
    assert value(database) == 3


def test_a_server_has_no_version_of_its_file(database: ServerDatabase) -> None:
    connection = database.connect()
    with pytest.raises(libsql.NotSupportedError, match="its own"):
        connection.data_version()
    connection.close()
