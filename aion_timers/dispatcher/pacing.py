"""When to ask the database, for how much, and when to try again: pure functions that both loops share."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from aion_timers.errors import InvalidInputError, StoreUnavailableError

FLOOR: Final = timedelta(milliseconds=20)
"""How long nothing is asked after a claim that found nothing, though something is due."""

DEFAULT_BATCH: Final = 500
SHORTEST_TICK: Final = timedelta(milliseconds=50)
TICKS: Final = 3
"""How often a lease is extended before it runs out."""

STUCK: Final = 0.1
"""Seconds after which timers that wait here for a handler, of which none has started, are given back."""
CONFIRM_TRIES: Final = 10
YIELD: Final = 0.001
"""Seconds that a loop leaves a file to others between two transactions."""
HANDOVER: Final = 0.001
"""Seconds that handlers have to come to their end before the next instant is asked for: then it takes one transaction
to settle and to ask."""
LONG: Final = 3600.0

_AHEAD: Final = 0.02
_SHORTEST_RUN: Final = 1e-6
_WEIGHT: Final = 0.2
_FIRST_NAP: Final = timedelta(milliseconds=1)
_MILLISECOND: Final = timedelta(milliseconds=1)
_FIRST_OUTAGE_PAUSE: Final = timedelta(milliseconds=50)
_LONGEST_OUTAGE_PAUSE: Final = timedelta(seconds=5)
# what a transaction that runs again gets over: a conflict, a lost connection, a server that is full, stops or starts
_PASSING: Final = ("40001", "40P01", "55P03", "08", "53", "57", "58")

_chance: Final = random.Random()  # noqa: S311 - spreads load, keeps no secret


def backoff(
    attempt: int, *, first: timedelta, longest: timedelta, factor: float = 2.0, chance: float | None = None
) -> timedelta:
    """How long to wait after an attempt that failed: longer each time, spread by half, never above ``longest``.

    Args:
        attempt: which one failed, from 1 on.
        first: the longest wait after the first one.
        longest: the longest wait of all.
        factor: by how much the wait grows.
        chance: from 0 to 1, where in the spread the wait lies; by default at random.
    """
    try:
        whole = min(longest.total_seconds(), first.total_seconds() * factor ** max(0, attempt - 1))
    except OverflowError:
        whole = longest.total_seconds()
    spread = _chance.random() if chance is None else chance
    return min(longest, timedelta(seconds=whole * (0.5 + 0.5 * spread)))


@dataclass(frozen=True, slots=True)
class Backoff:
    """A ``retry`` for dispatchers: waits longer after each attempt that failed, spread by half, up to a cap.

    Attributes:
        first: the longest wait after the first attempt.
        longest: the longest wait of all.
        factor: by how much the wait grows, 1 or more.
        attempts: after so many failed attempts the timer is given up; None is never.

    Raises:
        InvalidInputError: a wait is negative, or the longest is shorter than the first, or a number is below 1.
    """

    first: timedelta = timedelta(seconds=1)
    longest: timedelta = timedelta(hours=1)
    factor: float = 2.0
    attempts: int | None = None

    def __post_init__(self) -> None:
        if self.first < timedelta(0):
            raise InvalidInputError("first", self.first, "a negative wait", "pass a timedelta of zero or more")
        if self.longest < self.first:
            raise InvalidInputError("longest", self.longest, f"less than first, {self.first}", "pass a longer one")
        if not self.factor >= 1:
            raise InvalidInputError("factor", self.factor, "the waits would shrink", "pass 1 or more")
        if self.attempts is not None and self.attempts < 1:
            raise InvalidInputError("attempts", self.attempts, "no number of attempts", "pass 1 or more, or None")

    def __call__(self, delivery: Any, error: BaseException) -> timedelta | None:  # noqa: ANN401, ARG002 - either kind of delivery, and any error
        """How long to wait after this attempt; None gives the timer up."""
        if self.attempts is not None and delivery.attempt >= self.attempts:
            return None
        return backoff(delivery.attempt, first=self.first, longest=self.longest, factor=self.factor)


def outage_pause(failures: int, chance: float | None = None) -> float:
    """Seconds until the database is asked again, after so many failures in a row."""
    pause = backoff(failures, first=_FIRST_OUTAGE_PAUSE, longest=_LONGEST_OUTAGE_PAUSE, chance=chance)
    return pause.total_seconds()


def tick(lease: timedelta) -> float:
    """Seconds between two extensions of a lease."""
    return max(SHORTEST_TICK, lease / TICKS).total_seconds()


def nap(
    wake: timedelta | None,
    *,
    empty: int,
    longest: timedelta,
    whole_milliseconds: bool,
    past: timedelta = timedelta(0),
) -> float:
    """Seconds until the next claim.

    Args:
        wake: how long until a timer can be claimed, by the database's clock; None if there is no timer.
        empty: how many claims in a row came back empty.
        longest: the longest sleep.
        whole_milliseconds: whether the database's clock shows no more; a timer is due when it shows its instant.
        past: how much of a millisecond has gone by since it moved on, as far as that is known.
    """
    if wake is None:
        return longest.total_seconds()
    if whole_milliseconds and wake > timedelta(0):
        wake = -(-wake // _MILLISECOND) * _MILLISECOND - past
    if empty == 0:
        least = timedelta(0)
    elif wake <= timedelta(0):
        # it is due, and yet it was not had: somebody's transaction has it locked
        least = FLOOR
    else:
        # a clock that stands, or runs slower than ours, must not make this a hot loop
        least = min(FLOOR, _FIRST_NAP * 2 ** min(empty - 1, 8))
    return min(longest, max(least, wake, timedelta(0))).total_seconds()


def room(*, concurrency: int, batch: int, busy: int, typical: float | None) -> int:
    """How many timers may be claimed now, at most.

    No more than can start: what is free, and what comes free within a moment as the handlers have shown so far. Slow
    handlers leave timers to other processes. For quick ones a whole batch is claimed while they work on the last half
    of another, so that they need few claims and do not wait for them; earlier, the claim, and those of other processes,
    would only have more rows to pass over.

    Args:
        concurrency: how many handlers run at once.
        batch: how many timers one claim takes at most.
        busy: how many timers are being handled, or wait here for it.
        typical: seconds that a handler takes, as `typical_run` has it; None if none has run.
    """
    ahead = 0 if typical is None else int(min(1.5 * batch, concurrency * _AHEAD / max(typical, _SHORTEST_RUN)))
    enough_wait = 2 * (busy - concurrency) > ahead
    return 0 if enough_wait else max(0, min(batch, concurrency + ahead - busy))


def typical_run(typical: float | None, seconds: float) -> float:
    """The moving average of how long handlers take."""
    seconds = max(0.0, seconds)
    return seconds if typical is None else typical + _WEIGHT * (seconds - typical)


def stuck(seconds: float) -> bool:
    """Whether timers that wait here for a handler, of which none has started for so long, are better given back."""
    return seconds >= STUCK


def passes(error: BaseException) -> bool:
    """Whether it is an outage or a conflict, so that the same transaction can succeed later."""
    # PoolExhaustedError is one of these too
    if isinstance(error, StoreUnavailableError | OSError):
        return True
    if getattr(error, "connection_invalidated", False):
        return True
    original = getattr(error, "orig", None) or error
    state = getattr(original, "sqlstate", None)
    if isinstance(state, str):
        return state.startswith(_PASSING)
    return type(error).__name__ in {"OperationalError", "InterfaceError"}


def conflicts(error: BaseException) -> bool:
    """Whether the database ended the transaction for another one's sake: a failed serialization, or a deadlock."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"40001", "40P01"}
