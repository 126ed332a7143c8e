"""Programs that need not import what nearly all of them do: of a run's time, a tenth would go there.

A process of an interpreter imports `PACKAGES`, which are all of other people, and is forked for each program. That one
imports what is tested by itself, and ends as if it had been started in the usual way.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

PACKAGES = ("aiosqlite", "alembic.config", "asyncpg", "psycopg", "sqlalchemy.ext.asyncio", "sqlalchemy.orm", "typer")


class Program:
    """A program that was started."""

    def __init__(self, status: socket.socket, out: IO[str], report: IO[str]) -> None:
        self.returncode: int | None = None
        self._status = status
        self._lines = status.makefile()
        self._pid = int(self._lines.readline())
        self._files = out, report

    def poll(self, seconds: float = 0) -> int | None:
        """How it ended, if it does so within these seconds: its status, or the negative number of a signal."""
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed and what it reported, once it has ended.

        Raises:
            TimeoutError: it has not, and was killed.
        """
        if self.poll(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError
        return self._read(self._files[0]), self._read(self._files[1])

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            # it may end at this moment
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    @staticmethod
    def _read(file: IO[str]) -> str:
        with file:
            file.seek(0)
            return file.read()


class ForkServer:
    """Starts programs of an interpreter, for which every warning is an error."""

    def __init__(self, python: Path, variables: dict[str, str]) -> None:
        self._mutex = threading.Lock()
        self._control, theirs = socket.socketpair()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with theirs:
            self._process = subprocess.Popen(
                [python, "-P", "-W", "error", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=inherited | variables,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, program: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Program:
        """Start the program of a file, of a module after ``-m``, or of a text after ``-c``."""
        status, theirs = socket.socketpair()
        out, report = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - the program closes them
        with theirs, self._mutex:
            socket.send_fds(self._control, [b"+"], [out.fileno(), report.fileno(), theirs.fileno()])
            request = json.dumps([list(map(str, program)), str(cwd), dict(environment)])
            self._control.sendall(f"{len(request):8}{request}".encode())
            assert self._control.recv(1) == b"+"
        return Program(status, out, report)

    def close(self) -> None:
        """Start no more."""
        self._control.close()
        self._process.wait(10)


@cache
def fork_server(python: Path = Path(sys.executable), **variables: str) -> ForkServer:
    """The one of an interpreter that was started with these variables, until this process ends."""
    made = ForkServer(python, variables)
    atexit.register(made.close)
    return made


# -- in the other process ---------------------------------------------------------------------------------------------


def wait_for_program(control: socket.socket) -> list[str]:
    """Wait for requests, and return in a child with the program that one asks for; else the process ends."""
    while True:
        begun, files, _, _ = socket.recv_fds(control, 1, 3)
        if not begun:
            raise SystemExit
        length = int(control.recv(8, socket.MSG_WAITALL))
        program, cwd, environment = json.loads(control.recv(length, socket.MSG_WAITALL))
        if os.fork() == 0 and fork_program(files):
            control.close()
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            return list(program)
        for file in files:
            os.close(file)
        control.sendall(b"+")


def fork_program(files: Sequence[int]) -> bool:
    """Fork the program, return true in it, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, report, status = files
    pid = os.fork()
    if pid == 0:
        os.dup2(out, 1)
        os.dup2(report, 2)
        for file in files:
            os.close(file)
        return True
    os.write(status, f"{pid}\n".encode())
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{ended}\n".encode())
    os._exit(0)


def main() -> None:
    """Become what is asked for, again and again."""
    for package in PACKAGES:
        importlib.import_module(package)
    # a program that ends looks through all objects, and would copy the pages that they are on: a quarter of a second
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as control:
        program = wait_for_program(control)
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    elif program[0] == "-c":
        sys.argv = ["-c", *program[2:]]
        sys.path.insert(0, "")
        exec(compile(program[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - as Python does
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).parent.resolve()))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
