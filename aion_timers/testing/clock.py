"""`FakeClock`: a clock that stands until a test moves it."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta

from aion_timers.errors import InvalidInputError
from aion_timers.values import utc


class FakeClock:
    """A clock that stands until it is moved, to be given as ``clock`` to repositories and dispatchers.

    By it timers become due and leases run out. Give the same clock to every repository and dispatcher of a test: what
    has none goes by the database's clock. Threads may read and move it at once.

    Args:
        start: an aware datetime, any zone.

    Raises:
        InvalidInputError: a naive datetime, or one outside the years 1 to 9999 in UTC.
    """

    def __init__(self, start: datetime) -> None:
        self._lock = threading.Lock()
        self._now = utc("start", start, up=False)

    def __call__(self) -> datetime:
        """What time it is, in UTC."""
        return self._now

    def now(self) -> datetime:
        """What time it is, in UTC."""
        return self._now

    def advance(self, by: timedelta) -> datetime:
        """Let this much time go by; what time it is then.

        Raises:
            InvalidInputError: a negative time, or one that ends after the year 9999; the clock stands as before.
        """
        if not isinstance(by, timedelta):
            raise InvalidInputError(
                "by", by, f"a {type(by).__name__} is no length of time", "pass a timedelta, as in timedelta(days=3)"
            )
        if by < timedelta(0):
            raise InvalidInputError("by", by, "time does not go back", "use move_to() to set the clock back")
        with self._lock:
            try:
                self._now += by
            except OverflowError as error:
                raise InvalidInputError(
                    "by", by, f"it is {self._now}, so that would be after the year 9999", "pass a shorter time"
                ) from error
            return self._now

    def move_to(self, instant: datetime) -> None:
        """Set the clock, to an earlier instant too.

        Args:
            instant: an aware datetime, any zone.

        Raises:
            InvalidInputError: a naive datetime, or one outside the years 1 to 9999 in UTC; the clock stands as before.
        """
        moved = utc("instant", instant, up=False)
        with self._lock:
            self._now = moved

    def __repr__(self) -> str:
        return f"<FakeClock {self._now.isoformat()}>"
