"""How to wait for a lock that only trying can get: SQLite has no queue.

Between processes, waiters try again and again. Within a process they stand in line, and only the first one tries: the
interpreter lets a thread run on that has just committed, and it would take the lock again and again while the others
sleep.
"""

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

# A rival that commits in a loop leaves the lock free for some microseconds only. Tries at that rate find the gap; a
# sleep alone, however short, nearly always wakes beside it.
_BURST = 100e-6  # seconds
_SLEEPS = (0.001, 0.002, 0.004)  # seconds; the last one repeats

# time.sleep(0) rounds up to the timer slack, about 80 microseconds
_yield_processor: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class LockWait:
    """The pauses between tries, until ``timeout`` seconds have passed.

    It begins with a burst of tries that only yield the processor; then come sleeps of 1, 2, 4, 4, ... milliseconds,
    shortened by up to a half so that waiters don't move in step, with a burst after each. A sleep leaves the
    interpreter to other threads.

    Args:
        timeout: seconds.
        sleep: how to sleep; it may end early.
    """

    __slots__ = ("_burst_end", "_deadline", "_sleep", "_sleeps")

    def __init__(self, timeout: float, sleep: Callable[[float], object] = time.sleep) -> None:
        now = time.monotonic()
        self._deadline = now + timeout
        self._burst_end = now + _BURST
        self._sleep = sleep
        self._sleeps = 0

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._deadline - time.monotonic())

    def pause(self) -> bool:
        """Wait a moment; False, at once, when the time is over."""
        now = time.monotonic()
        if now >= self._deadline:
            return False
        if now < self._burst_end:
            _yield_processor()
            return True
        longest = _SLEEPS[min(self._sleeps, len(_SLEEPS) - 1)]
        self._sleeps += 1
        self._sleep(min(random.uniform(longest / 2, longest), self._deadline - now))  # noqa: S311 - jitter, no secret
        self._burst_end = time.monotonic() + _BURST
        return True


class Place:
    """A place in a line."""

    def __init__(self, line: "Line") -> None:
        self._line = line
        self._called = threading.Event()

    @property
    def first(self) -> bool:
        """Whether it is this one's turn to try."""
        return self._line.first is self

    def sleep(self, seconds: float) -> None:
        """Sleep until it is called, or for so long."""
        self._called.wait(seconds)
        self._called.clear()

    def call(self) -> None:
        """End its sleep."""
        self._called.set()


class Line:
    """Who waits in this process for the write lock of one file: first come, first served."""

    def __init__(self) -> None:
        self._places: deque[Place] = deque()
        self._mutex = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def first(self) -> Place | None:
        """Whose turn it is."""
        try:
            return self._places[0]
        except IndexError:
            return None

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Stand in line."""
        place = Place(self)
        with self._mutex:
            self._places.append(place)
        try:
            yield place
        finally:
            with self._mutex:
                self._places.remove(place)
            self.call()

    def call(self) -> None:
        """Tell the first one that the lock may be free, or that it is the first now."""
        if first := self.first:
            first.call()


_lines: "WeakValueDictionary[str, Line]" = WeakValueDictionary()
_lines_mutex = threading.Lock()


def line_of(name: str) -> Line:
    """The line for a file."""
    with _lines_mutex:
        line = _lines.get(name)
        if line is None:
            line = _lines[name] = Line()
        return line


def _forget_lines() -> None:
    """After a fork: those who wait are threads of the parent."""
    global _lines_mutex  # noqa: PLW0603 - the parent may have held it
    _lines_mutex = threading.Lock()
    _lines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lines)
