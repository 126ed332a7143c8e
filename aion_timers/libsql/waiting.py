"""How to wait for a lock that only trying can get: SQLite has no queue."""

import os
import random
import time
from collections.abc import Callable

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
    """

    __slots__ = ("_burst_end", "_deadline", "_sleeps")

    def __init__(self, timeout: float) -> None:
        now = time.monotonic()
        self._deadline = now + timeout
        self._burst_end = now + _BURST
        self._sleeps = 0

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
        time.sleep(min(random.uniform(longest / 2, longest), self._deadline - now))  # noqa: S311 - jitter, no secret
        self._burst_end = time.monotonic() + _BURST
        return True
