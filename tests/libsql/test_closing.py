"""Closing a connection touches no memory that was freed before."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.forkserver import fork_server

# freed memory is filled with the byte that SQLite takes for an open database, so that a second close goes astray
FILLED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=118"}

WAYS = {
    "closed": "c = dbapi.connect(path); c.execute('SELECT 1'); c.close()",
    "with a table written": "c = dbapi.connect(path); c.execute('CREATE TABLE t (a)'); c.commit(); c.close()",
    "dropped": "c = dbapi.connect(path); c.execute('SELECT 1'); del c",
    "dropped in a cycle": "c = dbapi.connect(path); c.me = c; del c; gc.collect()",
    "while a cursor lives": "c = dbapi.connect(path); k = c.execute('SELECT 1'); c.close(); k.fetchall(); del k",
    "after an error": "c = dbapi.connect(path); refused(lambda: c.execute('SELECT * FROM missing')); c.close()",
    "after a panic": "c = dbapi.connect(path); refused(lambda: c.execute(\"SELECT CAST(x'ff' AS TEXT)\")); c.close()",
    "not a database": "open(path, 'wb').write(b'x' * 5000); refused(lambda: dbapi.connect(path))",
    "in memory": "c = dbapi.connect(':memory:'); c.execute('SELECT 1'); c.close()",
    "by a pool": "e = create_engine('sqlite+libsql:///' + path); e.connect().close(); e.dispose()",
    "by an async pool": """
async def work():
    engine = create_async_engine('sqlite+aiolibsql:///' + path)
    async with engine.connect() as connection:
        await connection.exec_driver_sql('SELECT 1')
    await engine.dispose()
asyncio.run(work())
""",
}

PROGRAM = """
import asyncio, gc, sys
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
import aion_timers.libsql
from aion_timers.libsql import dbapi
aion_timers.libsql.register()
path = sys.argv[1]
def refused(work):
    try:
        work()
    except dbapi.Error:
        return
    raise SystemExit("no error")
"""


def run(program: str, folder: Path) -> int | None:
    started = fork_server(**FILLED).start(["-c", program, str(folder / "file.db")], folder, os.environ)
    started.communicate(60)
    return started.returncode


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_connection_is_closed_once(way: str, tmp_path: Path) -> None:
    assert run(PROGRAM + way, tmp_path) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is filled by glibc")
def test_the_driver_alone_closes_twice(tmp_path: Path) -> None:
    """Proves that the tests above would see it."""
    program = (
        "import sys, libsql_experimental as driver; c = driver.connect(sys.argv[1]); c.execute('SELECT 1'); c.close()"
    )
    assert run(program, tmp_path) == -signal.SIGSEGV
