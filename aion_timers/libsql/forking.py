"""What a forked process does with what its parent has open.

SQLite keeps one record of each open file for the whole process, with the locks on it. A forked child inherits the
record and none of the locks: a new connection there that finds the record runs without locks, and loses commits. So the
child first closes what it has inherited, and SQLite forgets the record. What was in the middle of a write can't be
closed, since that would roll back in the file what the parent goes on writing; it is kept for ever, and the child may
not open that file. The parent notices nothing.

The driver holds the interpreter's lock through each of its calls, so a fork is never in the middle of one.
"""

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, Protocol
from weakref import WeakSet

from aion_timers.libsql.errors import OperationalError


class Source(Protocol):
    """What the driver opens."""

    @property
    def name(self) -> str:
        """Its path or address."""

    @property
    def is_on_disk(self) -> bool:
        """Whether it is a file, or has one."""

    @property
    def is_networked(self) -> bool:
        """Whether it has a server."""


class Opened(Protocol):
    """A connection to something that is shared with other processes."""

    def leave_to_parent(self) -> Iterable[str]:
        """Close it in a child, or keep it; the paths of the files that had to be kept open are returned."""


CURE: Final = "fork before the first connection is made, or start processes with spawn or forkserver"
"""What to do where a fork can't be made good."""

_Identity = tuple[int, int]

# weak: what has gone is closed
_sources: WeakSet[Source] = WeakSet()
_connections: WeakSet[Opened] = WeakSet()
_driver_used = False
_driver_lost = False
_off_limits: frozenset[_Identity] = frozenset()


def require_openable(source: Source) -> None:
    """Note that the driver is about to open something, if it can in this process.

    Raises:
        OperationalError: a fork left too little of the driver, or too much of the file.
    """
    global _driver_used  # noqa: PLW0603 - a fact of the whole process
    _driver_used = True
    if _driver_lost and source.is_networked:
        raise OperationalError(
            f"{source.name} can't be opened here: this process was forked after the libSQL driver had been used, and"
            f" the driver would wait for ever for threads that only the parent has; {CURE}"
        )
    if source.is_on_disk:
        if _off_limits and _identity(source.name) in _off_limits:
            raise OperationalError(
                f"{source.name} can't be opened here: this process was forked while a connection of the parent wrote"
                f" the file, and SQLite takes it for open; {CURE}"
            )
        _sources.add(source)


def remember(connection: Opened) -> None:
    """Have a connection closed in children."""
    _connections.add(connection)


def keep(thing: object) -> None:
    """Let an object live as long as the process, and not be finalized even then."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _leave_to_parent() -> None:
    global _driver_lost, _off_limits  # noqa: PLW0603 - facts of the whole process
    _driver_lost = _driver_used
    sources, connections = list(_sources), list(_connections)
    _sources.clear()
    _connections.clear()
    off_limits: set[_Identity | None] = set()
    for connection in connections:
        # one that fails leaves its file open, which is seen below
        with suppress(Exception):
            off_limits.update(map(_identity, connection.leave_to_parent()))
    if sources:
        # a frame of another thread, which is gone and never ends, may hold a cursor that keeps its file open
        off_limits |= _open_files() & {_identity(source.name) for source in sources}
    _off_limits = _off_limits.union(found for found in off_limits if found)


def _identity(path: str) -> _Identity | None:
    # looking doesn't open: closing any handle on the file would drop the locks of this process on it
    with suppress(OSError, ValueError):
        found = os.stat(path)  # noqa: PTH116 - a Path costs more than the call
        return found.st_dev, found.st_ino
    return None


def _open_files() -> set[_Identity | None]:
    found: set[_Identity | None] = set()
    for descriptor in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not files
        with suppress(OSError):
            status = os.fstat(int(descriptor))
            found.add((status.st_dev, status.st_ino))
    return found


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
