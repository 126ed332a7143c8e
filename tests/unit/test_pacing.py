from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from aion_timers import InvalidInputError, NotMigratedError, PoolExhaustedError
from aion_timers.dispatcher import Backoff, pacing

SECOND = timedelta(seconds=1)
lengths = st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=365))
positive = st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=365))
chances = st.floats(min_value=0, max_value=1)


@given(st.integers(-3, 10**9), lengths, lengths, st.floats(1, 1e6), chances)
def test_a_backoff_is_never_negative_and_never_above_its_cap(
    attempt: int, first: timedelta, more: timedelta, factor: float, chance: float
) -> None:
    longest = first + more
    wait = pacing.backoff(attempt, first=first, longest=longest, factor=factor, chance=chance)
    assert timedelta(0) <= wait <= longest
    assert wait >= min(first, longest) / 2 - timedelta(microseconds=1)


@given(st.integers(1, 100), chances)
def test_a_backoff_grows_with_the_attempts(attempt: int, chance: float) -> None:
    first, second = (
        pacing.backoff(number, first=SECOND, longest=3600 * SECOND, chance=chance) for number in (attempt, attempt + 1)
    )
    assert second >= first


@given(st.none() | st.timedeltas(), st.integers(0, 10**6), positive, st.booleans())
def test_a_nap_is_never_negative_and_never_above_the_longest(
    wake: timedelta | None, empty: int, longest: timedelta, whole: bool
) -> None:
    seconds = pacing.nap(wake, empty=empty, longest=longest, whole_milliseconds=whole)
    assert 0 <= seconds <= longest.total_seconds()
    if wake is not None and timedelta(0) < wake <= longest:
        assert seconds >= wake.total_seconds() - 1e-6


@pytest.mark.parametrize(
    ("wake", "empty", "whole", "seconds"),
    [
        (None, 0, False, 1.0),  # no timer
        (timedelta(minutes=5), 0, False, 1.0),
        (timedelta(milliseconds=300), 0, False, 0.3),  # the exact instant
        (timedelta(microseconds=300_001), 0, True, 0.301),  # a clock of milliseconds shows it then
        (-SECOND, 0, False, 0.0),  # overdue: at once
        (-SECOND, 1, False, 0.02),  # and yet not to be had
        (timedelta(microseconds=10), 1, False, 0.001),
        (timedelta(microseconds=10), 9, False, 0.02),  # a clock that stands
    ],
)
def test_how_long_a_nap_is(wake: timedelta | None, empty: int, whole: bool, seconds: float) -> None:
    nap = pacing.nap(wake, empty=empty, longest=SECOND, whole_milliseconds=whole)
    assert nap == pytest.approx(seconds, abs=1e-6)


@given(st.integers(0, 10**9), st.integers(0, 10**7), st.integers(0, 10**3))
def test_a_nap_ends_when_a_clock_of_milliseconds_shows_the_instant(began: int, later: int, known_later: int) -> None:
    """All in microseconds: when the clock was read, the instant after that, and when the answer had come."""
    instant, ended = began + later, began + known_later
    shown, tick = began // 1000 * 1000, -(-instant // 1000) * 1000
    wake, past = timedelta(microseconds=instant - shown), timedelta(microseconds=ended % 1000)
    seconds = pacing.nap(wake, empty=0, longest=3600 * SECOND, whole_milliseconds=True, past=past)
    woken = ended + seconds * 1_000_000
    assert woken >= tick - 0.5
    # a millisecond more only if the clock moved on while the answer came
    assert woken <= max(ended, tick + 1000 * (ended // 1000 - began // 1000)) + 0.5


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 5000), st.none() | st.floats(0, 1e6))
def test_no_more_is_claimed_than_batch_and_concurrency_allow(
    concurrency: int, batch: int, busy: int, typical: float | None
) -> None:
    room = pacing.room(concurrency=concurrency, batch=batch, busy=busy, typical=typical)
    assert 0 <= room <= batch
    assert busy + room <= max(busy, concurrency + 1.5 * batch)


@pytest.mark.parametrize(
    ("busy", "typical", "room"),
    [
        (0, None, 4),  # nothing is known of the handlers
        (3, None, 1),
        (4, None, 0),
        (0, 1.0, 4),  # slow ones: what is free
        (0, 0.001, 84),  # quick ones: what comes free within 20 ms, too
        (40, 0.001, 44),
        (45, 0.001, 0),  # more than half of that wait still
        (5, 0.01, 7),
        (0, 0.0, 100),
        (50, 0.0, 100),  # the next batch, while they work on the last half of this one
        (79, 0.0, 75),
        (80, 0.0, 0),
        (154, 0.0, 0),
    ],
)
def test_how_much_is_claimed(busy: int, typical: float | None, room: int) -> None:
    assert pacing.room(concurrency=4, batch=100, busy=busy, typical=typical) == room


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_what_is_typical_lies_among_what_was_seen(runs: list[float]) -> None:
    typical = None
    for run in runs:
        typical = pacing.typical_run(typical, run)
    assert typical is not None
    assert min(runs) - 1e-6 <= typical <= max(runs) + 1e-6


@given(positive)
def test_a_lease_is_extended_well_before_it_runs_out(lease: timedelta) -> None:
    assert pacing.tick(lease) >= 0.05
    if lease >= pacing.SHORTEST_TICK * pacing.TICKS:
        assert pacing.tick(lease) <= lease.total_seconds() / 3 + 1e-6


@given(st.integers(1, 10**9), chances)
def test_an_outage_is_waited_out_in_bounded_steps(failures: int, chance: float) -> None:
    assert 0.025 <= pacing.outage_pause(failures, chance) <= 5


class Original(Exception):  # noqa: N818 - stands for a driver's
    """What a driver raised."""

    def __init__(self, sqlstate: str | None = None) -> None:
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OperationalError("", {}, Original()), True),
        (OperationalError("", {}, Original("57014")), True),
        (DBAPIError("", {}, Original("40001")), True),
        (DBAPIError("", {}, Original("08006")), True),
        (DBAPIError("", {}, Original(), connection_invalidated=True), True),
        (Original("57P03"), True),
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (PoolExhaustedError("", ""), True),
        (ProgrammingError("", {}, Original("42601")), False),
        (NotMigratedError("", ""), False),
        (ValueError(), False),
    ],
)
def test_which_errors_pass(error: BaseException, passes: bool) -> None:
    assert pacing.passes(error) is passes


class Delivery:
    """What a retry looks at."""

    attempt = 3


def test_the_default_retry_never_gives_up_and_another_does_when_told() -> None:
    wait = Backoff()(Delivery(), ValueError())
    assert wait is not None
    assert 2 * SECOND <= wait <= 4 * SECOND
    assert Backoff(attempts=4)(Delivery(), ValueError()) is not None
    assert Backoff(attempts=3)(Delivery(), ValueError()) is None


@pytest.mark.parametrize(
    "options",
    [{"first": -SECOND}, {"longest": SECOND / 2}, {"factor": 0.5}, {"factor": float("nan")}, {"attempts": 0}],
)
def test_a_backoff_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        Backoff(**options)
