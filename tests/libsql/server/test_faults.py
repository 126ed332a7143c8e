"""What a server and the way to it can do to a client, each of it a test."""

import asyncio
import json
import signal
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from aion_timers import libsql
from aion_timers.libsql.hrana import dbapi
from tests.libsql.conftest import SyncWorld, World
from tests.proxy import Answer, Front, Mood, Proxy
from tests.sqld import Sqld

from .conftest import ServerDatabase
from .test_dialect import numbers

MakeWorld = Callable[..., World]
CERTIFICATE = str(Path(__file__).parent / "localhost.pem")
TOKEN = "very-secret-token"  # noqa: S105 - of these tests


def increment(connection: sa.Connection) -> None:
    connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
    connection.commit()


def value(database: ServerDatabase) -> int:
    ((n,),) = database.run("SELECT n FROM items WHERE id = 1")
    return int(n)


# -- the server forgets, dies, or is silent ----------------------------------------------------------------------------


@pytest.mark.slow  # 12 seconds of silence
def test_idle_for_12_seconds(make_world: MakeWorld, database: ServerDatabase) -> None:
    world = make_world(database.address, pool_size=1, max_overflow=0)
    world.connection(increment)

    def open_for_12_seconds(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        time.sleep(12)
        with pytest.raises(sa.exc.OperationalError, match="10 s") as caught:
            connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        assert caught.value.connection_invalidated
        assert isinstance(caught.value.orig, libsql.DisconnectError)
        assert caught.value.orig.code == "STREAM_EXPIRED"

    world.connection(open_for_12_seconds)
    time.sleep(12)
    # the pool's connection has no stream that could have expired
    world.connection(increment)
    assert value(database) == 2


def test_a_writer_that_holds_the_lock_for_too_long_is_ended(database: ServerDatabase) -> None:
    # 5 seconds of waiting, so only the sync form
    world = SyncWorld(database.address)

    def hold(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = 100 WHERE id = 1")
        # it waits until the server takes the lock away from the first one, which it does after 5 seconds
        database.run("UPDATE items SET n = n + 1 WHERE id = 1")
        with pytest.raises(sa.exc.OperationalError, match="keep it shorter") as caught:
            connection.exec_driver_sql("UPDATE items SET n = 200 WHERE id = 1")
        assert caught.value.connection_invalidated
        assert caught.value.orig.code == "TRANSACTION_TIMEOUT"  # type: ignore[union-attr] # an error of ours

    world.connection(hold)
    world.connection(increment)
    world.close()
    assert value(database) == 2


def test_a_server_that_is_killed_in_a_transaction(make_world: MakeWorld) -> None:
    with Sqld.started() as server:
        database = ServerDatabase(server.create("own"))
        database.run("CREATE TABLE items (id INTEGER PRIMARY KEY, n INTEGER)")
        database.run("INSERT INTO items VALUES (1, 0)")
        world = make_world(database.address)
        world.connection(increment)

        def body(connection: sa.Connection) -> None:
            connection.exec_driver_sql("UPDATE items SET n = 100 WHERE id = 1")
            server.kill()
            with pytest.raises(sa.exc.OperationalError, match=r"can't be reached|broke the connection") as caught:
                connection.exec_driver_sql("UPDATE items SET n = 200 WHERE id = 1")
            assert caught.value.connection_invalidated

        world.connection(body)
        with pytest.raises(sa.exc.OperationalError, match="can't be reached"):
            world.connection(increment)
        server.restart()
        world.connection(increment)

        def lost_baton(connection: sa.Connection) -> None:
            connection.exec_driver_sql("UPDATE items SET n = 100 WHERE id = 1")
            server.restart()
            with pytest.raises(sa.exc.OperationalError) as caught:
                connection.commit()
            # the server says that it doesn't know the stream: nothing was committed
            assert isinstance(caught.value.orig, libsql.DisconnectError)
            assert caught.value.connection_invalidated

        world.connection(lost_baton)
        world.connection(increment)
        assert value(database) == 3


def test_a_server_that_never_answers_ends_in_our_timeout_while_threads_run_on(
    database: ServerDatabase, proxy: Proxy
) -> None:
    engine = sa.create_engine(f"sqlite+libsql://{database.behind(proxy)}", connect_args={"read_timeout": 0.5})
    beats, stop = [0], threading.Event()

    def beat() -> None:
        while not stop.wait(0.002):
            beats[0] += 1

    thread = threading.Thread(target=beat)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        proxy.meddle = lambda _: Mood.SWALLOW
        thread.start()
        began = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match=r"silent for 0\.5 s") as caught:
            connection.exec_driver_sql("SELECT 1")
        took = time.monotonic() - began
        stop.set()
        thread.join()
    assert caught.value.connection_invalidated
    assert 0.5 <= took < 20
    assert beats[0] > 20
    # not at connect either
    with pytest.raises(sa.exc.OperationalError, match="silent"):
        engine.connect()
    engine.dispose()


def test_a_server_that_never_answers_leaves_the_event_loop_alone(database: ServerDatabase, proxy: Proxy) -> None:
    async def run() -> tuple[int, bool]:
        url = f"sqlite+aiolibsql://{database.behind(proxy)}"
        engine = create_async_engine(url, connect_args={"read_timeout": 0.5})
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
            await connection.rollback()
            proxy.meddle = lambda _: Mood.SWALLOW
            waiting = asyncio.ensure_future(connection.exec_driver_sql("SELECT 1"))
            beats = 0
            while not waiting.done():
                await asyncio.sleep(0.002)
                beats += 1
            with pytest.raises(sa.exc.OperationalError, match="silent"):
                await waiting
        await engine.dispose()
        return beats, waiting.done()

    beats, _ = asyncio.run(run())
    assert beats > 20


def test_a_cancelled_task_ends_its_request(database: ServerDatabase, proxy: Proxy) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiolibsql://{database.behind(proxy)}", pool_size=1, max_overflow=0)
        async with engine.connect() as connection:
            await connection.exec_driver_sql("UPDATE items SET n = 100 WHERE id = 1")
            proxy.meddle = lambda _: Mood.SWALLOW
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await connection.exec_driver_sql("SELECT 1")
            proxy.meddle = lambda _: Mood.HELP
        # the connection that was cut off is not used again, and the pool has another
        async with engine.connect() as connection:
            assert (await connection.exec_driver_sql("SELECT 1")).scalar() == 1
        await engine.dispose()

    asyncio.run(run())


def test_ctrl_c_ends_a_wait_for_the_server(start: Any, database: ServerDatabase, proxy: Proxy) -> None:
    asked = threading.Event()

    def swallow(request: bytes) -> Mood:
        if b"4711" not in request:
            return Mood.HELP
        asked.set()
        return Mood.SWALLOW

    proxy.meddle = swallow
    code = (
        "import sys, aion_timers, sqlalchemy\n"
        f"engine = sqlalchemy.create_engine('sqlite+libsql://{database.behind(proxy)}')\n"
        "connection = engine.connect()\n"
        "try: connection.exec_driver_sql('SELECT 4711')\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "connection.close(); engine.dispose()\n"
    )
    process = start("-c", code)
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "interrupted\n", err


def test_an_answer_that_takes_too_long_as_a_whole(database: ServerDatabase, proxy: Proxy) -> None:
    rows = f"{numbers(40)} SELECT i, randomblob(100000) FROM c"
    connection = dbapi.connect(
        f"http://{database.behind(proxy)}", isolation_level=None, read_timeout=30, request_timeout=3
    )
    proxy.delay = 0.2  # for each piece of the answer, so that it is never silent for long
    with pytest.raises(libsql.DisconnectError, match="longer than 3 s"):
        connection.execute(rows)
    proxy.delay = 0.0
    assert connection.execute("SELECT 1").fetchall() == [(1,)]
    connection.close()


def test_nothing_listens(make_world: MakeWorld) -> None:
    with Front.answering(lambda *_: (200, {}, b"")) as front:
        port = front.port
    with pytest.raises(sa.exc.OperationalError, match=f"localhost:{port} can't be reached"):
        make_world(f"localhost:{port}").connection(increment)


# -- the connection breaks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True])
def test_commit_is_cut_off(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy, done: bool) -> None:
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        proxy.once(Mood.CUT_AFTER if done else Mood.CUT_BEFORE, b"COMMIT")
        with pytest.raises(sa.exc.OperationalError, match="not known") as caught:
            connection.commit()
        assert isinstance(caught.value.orig, libsql.OutcomeUnknownError)
        assert caught.value.connection_invalidated

    world.connection(body)
    assert value(database) == done


@pytest.mark.parametrize("done", [False, True])
def test_a_write_at_autocommit_is_cut_off(
    make_world: MakeWorld, database: ServerDatabase, proxy: Proxy, done: bool
) -> None:
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> None:
        proxy.once(Mood.CUT_AFTER if done else Mood.CUT_BEFORE, b"UPDATE")
        with pytest.raises(sa.exc.OperationalError) as caught:
            connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        assert isinstance(caught.value.orig, libsql.OutcomeUnknownError)

    world.connection(body, isolation_level="AUTOCOMMIT")
    assert value(database) == done


@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
def test_what_can_be_done_twice_is_sent_again(
    make_world: MakeWorld, database: ServerDatabase, proxy: Proxy, level: str
) -> None:
    # as after an HTTP connection that was kept alive has been closed by the other side
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> None:
        proxy.once(Mood.CUT_BEFORE, b"items")
        assert connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar() == 0
        connection.rollback()
        if level == "SERIALIZABLE":
            proxy.once(Mood.CUT_BEFORE, b"items")
            increment(connection)

    world.connection(body, isolation_level=level)
    assert value(database) == (level == "SERIALIZABLE")


def test_a_statement_in_a_transaction_is_cut_off(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy) -> None:
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        proxy.once(Mood.CUT_BEFORE, b"id = 2")
        with pytest.raises(sa.exc.OperationalError) as caught:
            connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 2")
        assert isinstance(caught.value.orig, libsql.DisconnectError)
        assert caught.value.connection_invalidated

    world.connection(body)


def test_after_a_lost_stream_nothing_runs_before_a_rollback(database: ServerDatabase, proxy: Proxy) -> None:
    connection = dbapi.connect(f"http://{database.behind(proxy)}")
    connection.execute("UPDATE items SET n = n + 1 WHERE id = 1")
    proxy.once(Mood.CUT_BEFORE, b"id = 2")
    with pytest.raises(libsql.DisconnectError):
        connection.execute("UPDATE items SET n = n + 1 WHERE id = 2")
    with pytest.raises(libsql.OperationalError, match="call rollback"):
        connection.execute("UPDATE items SET n = n + 1 WHERE id = 2")
    connection.rollback()
    assert connection.execute("SELECT n FROM items").fetchall() == [(0,), (0,)]
    connection.close()


def test_a_rollback_that_is_cut_off_is_one(make_world: MakeWorld, database: ServerDatabase, proxy: Proxy) -> None:
    world = make_world(database.behind(proxy))

    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        proxy.once(Mood.CUT_BEFORE, b"ROLLBACK")
        connection.rollback()
        assert connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar() == 0

    world.connection(body)


# -- answers that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "body", "match", "disconnects"),
    [
        (
            401,
            {},
            f"no such token: Bearer {TOKEN}".encode(),
            r"refuses access \(401.*\*\*\*.*another auth_token",
            False,
        ),
        (403, {}, json.dumps({"error": f"not {TOKEN}"}).encode(), r"403: not \*\*\*", False),
        (500, {}, b"<html><p>Internal\n<b>error</b></html>", r"failed \(500: Internal error\)", True),
        (503, {}, json.dumps({"message": "STREAM", "code": "STREAM_EXPIRED"}).encode(), "10 s", True),
        (301, {"location": f"https://other/?authToken={TOKEN}"}, b"", "redirects to https://other/, and", False),
        (404, {}, b"nothing here", r"no libSQL server, or has no such database \(404: nothing", False),
        (400, {}, b"bad", r"refuses the request \(400: bad", False),
        (200, {}, b"<html>", "isn't a libSQL server", True),
        (200, {}, f'{{"token": "{TOKEN}"}}'.encode(), "isn't a libSQL server", True),
        (200, {"content-encoding": "gzip"}, b"no gzip", "broke the connection off", True),
    ],
    ids=["401", "403", "500", "expired", "redirect", "404", "400", "html", "json", "gzip"],
)
def test_refusals(
    make_world: MakeWorld, *, status: int, headers: dict[str, str], body: bytes, match: str, disconnects: bool
) -> None:
    seen: list[str] = []

    def answer(_: str, sent: dict[str, str], __: bytes) -> Answer:
        seen.append(sent["authorization"])
        return status, headers, body

    with Front.answering(answer) as front:
        world = make_world(f"localhost:{front.port}", connect_args={"auth_token": TOKEN})
        with pytest.raises(sa.exc.OperationalError, match=match) as caught:
            world.connection(increment)
    assert TOKEN not in f"{caught.value} {caught.value!r} {caught.value.orig!r} {world.sync_engine!r}"
    assert isinstance(caught.value.orig, libsql.DisconnectError) is disconnects
    assert set(seen) == {f"Bearer {TOKEN}"}


def test_a_server_that_takes_no_more_connections_is_asked_again(
    make_world: MakeWorld, database: ServerDatabase, sqld: Sqld
) -> None:
    through, refused = forwarding(sqld), []

    def both(connection: sa.Connection) -> None:
        for number in (1, 2):
            connection.exec_driver_sql(f"UPDATE items SET n = n + 1 WHERE id = {number}")
        connection.commit()

    def answer(path: str, headers: dict[str, str], body: bytes) -> Answer:
        # as a new connection, as the first statement of a transaction, and within one
        awaited = [b"", b"", b"id = 1", b"id = 1", b"id = 2", b"id = 2"]
        if len(refused) < len(awaited) and awaited[len(refused)] in body:
            refused.append(body)
            return 429, {}, b"Timed out while opening database connection"
        return through(path, headers, body)

    with Front.answering(answer) as front:
        world = make_world(f"localhost:{front.port}/{database.url.database}")
        world.connection(both)
    assert len(refused) == 6
    assert value(database) == 1


def test_a_server_that_takes_no_connections_for_too_long_is_busy(make_world: MakeWorld) -> None:
    with Front.answering(lambda *_: (429, {}, b"too many")) as front:
        world = make_world(f"localhost:{front.port}", connect_args={"timeout": 0.3})
        with pytest.raises(sa.exc.OperationalError, match=r"429: too many.*busy for longer than 0\.3 s") as caught:
            world.connection(increment)
    assert isinstance(caught.value.orig, libsql.BusyError)


def forwarding(sqld: Sqld, **change: Any) -> Callable[[str, dict[str, str], bytes], Answer]:
    """Answers as the server does, with some fields changed."""
    import httpx  # noqa: PLC0415 - for this alone

    def answer(path: str, _: dict[str, str], body: bytes) -> Answer:
        if change.get("version") == 2 and path.startswith("/dev/") and "/v3/" in path:
            return 404, {}, b""
        reply = httpx.post(f"http://localhost:{sqld.port}{path}", content=body, trust_env=False)
        if "base_url" in change and reply.status_code == 200:
            return 200, {}, json.dumps(reply.json() | {"base_url": change["base_url"]}).encode()
        return reply.status_code, {}, reply.content

    return answer


def test_version_2_of_the_protocol(make_world: MakeWorld, database: ServerDatabase, sqld: Sqld) -> None:
    with Front.answering(forwarding(sqld, version=2)) as front:
        world = make_world(f"localhost:{front.port}/{database.url.database}")
        world.connection(increment)
        world.connection(increment)
    assert value(database) == 2


def test_a_stream_moves_where_the_server_says(make_world: MakeWorld, database: ServerDatabase, sqld: Sqld) -> None:
    elsewhere = f"http://{database.address}"
    with Front.answering(forwarding(sqld, base_url=elsewhere)) as front:
        world = make_world(f"localhost:{front.port}/{database.url.database}")
        world.connection(increment)
    assert value(database) == 1


# -- TLS ---------------------------------------------------------------------------------------------------------------


def test_a_certificate_is_checked(make_world: MakeWorld, database: ServerDatabase, sqld: Sqld) -> None:
    with Front.answering(forwarding(sqld), certificate=CERTIFICATE) as front:
        address = f"localhost:{front.port}/{database.url.database}?secure=true"
        with pytest.raises(sa.exc.OperationalError, match=r"(?i)certificate"):
            make_world(address).connection(increment)
        context = ssl.create_default_context(cafile=CERTIFICATE)
        world = make_world(address, connect_args={"ssl_context": context})
        world.connection(increment)
    assert value(database) == 1


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_forked_process_has_connections_of_its_own(run_python: Any, database: ServerDatabase, proxy: Proxy) -> None:
    code = f"""
import os, sys, warnings
warnings.simplefilter("ignore", ResourceWarning)  # a child drops its parent's sockets
import aion_timers, sqlalchemy as sa
from aion_timers import libsql
engine = sa.create_engine("sqlite+libsql://{database.behind(proxy)}")
with engine.begin() as connection:
    connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
opened = engine.connect()
opened.exec_driver_sql("UPDATE items SET n = n + 10 WHERE id = 1")
child = os.fork()
if child == 0:
    try:
        try:
            opened.exec_driver_sql("SELECT 1")
        except sa.exc.OperationalError as error:
            assert isinstance(error.orig, libsql.DisconnectError) and "forked" in str(error), error
        else:
            raise SystemExit("the parent's transaction was used")
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT n FROM items WHERE id = 1").scalar() == 1
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
opened.commit()
opened.close()
engine.dispose()
"""
    run_python(code)
    assert value(database) == 11
    assert proxy.connections == 2


def test_an_engine_that_is_not_disposed_of_does_not_stop_the_exit(run_python: Any, database: ServerDatabase) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore', ResourceWarning)\n"
        "import aion_timers, sqlalchemy\n"
        f"engine = sqlalchemy.create_engine('sqlite+libsql://{database.address}')\n"
        "connection = engine.connect(); connection.exec_driver_sql('UPDATE items SET n = 7')\n"
    )
    assert run_python(code) == ""


def test_nothing_is_opened_at_import(run_python: Any) -> None:
    code = "import os, aion_timers, aion_timers.libsql.hrana.aio; print(len(os.listdir('/proc/self/fd')))"
    assert run_python(code) == run_python("import os; print(len(os.listdir('/proc/self/fd')))")


def test_an_engine_serves_one_event_loop_after_the_other(database: ServerDatabase) -> None:
    engine = create_async_engine(f"sqlite+aiolibsql://{database.address}")

    async def run() -> None:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("UPDATE items SET n = n + 1 WHERE id = 1")
        await engine.dispose()

    asyncio.run(run())
    asyncio.run(run())
    assert value(database) == 2
