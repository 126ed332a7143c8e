from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from aion_timers import InvalidInputError, TimerStoreError
from aion_timers.testing import FakeClock, NoProgressError

START = datetime(2026, 1, 1, tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)


def test_it_stands_until_it_is_moved() -> None:
    clock = FakeClock(START)

    assert clock() == clock.now() == START
    assert clock.advance(timedelta(days=3)) == clock.now() == START + timedelta(days=3)
    clock.move_to(START)
    assert clock() == START
    assert repr(clock) == "<FakeClock 2026-01-01T00:00:00+00:00>"


def test_it_tells_utc_whatever_zone_it_is_given() -> None:
    clock = FakeClock(datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))))

    assert (clock.now(), clock.now().tzinfo) == (START, UTC)
    clock.move_to(datetime(2025, 12, 31, 20, tzinfo=timezone(timedelta(hours=-5))))
    assert (clock.now(), clock.now().tzinfo) == (START + timedelta(hours=1), UTC)


WRONG: dict[str, tuple[Callable[[FakeClock], Any], str, str]] = {
    "naive start": (lambda _: FakeClock(datetime(2026, 1, 1)), "start", "naive"),  # noqa: DTZ001 - it is refused
    "start before year 1": (
        lambda _: FakeClock(datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))),
        "start",
        "years 1 to 9999",
    ),
    "start that is a text": (lambda _: FakeClock("2026-01-01"), "start", "no instant"),  # type: ignore[arg-type] # refused
    "naive instant": (lambda clock: clock.move_to(datetime(2026, 1, 1)), "instant", "naive"),  # noqa: DTZ001 - refused
    "time that goes back": (lambda clock: clock.advance(-timedelta(microseconds=1)), "by", "move_to"),
    "time without end": (lambda clock: clock.advance(timedelta.max), "by", "after the year 9999"),
    "number of seconds": (lambda clock: clock.advance(60), "by", "timedelta"),  # type: ignore[arg-type] # refused
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_it_cannot_show_is_refused_and_moves_nothing(wrong: str) -> None:
    call, argument, words = WRONG[wrong]
    clock = FakeClock(START)

    with pytest.raises(InvalidInputError, match=words) as caught:
        call(clock)
    assert caught.value.argument == argument
    assert clock.now() == START


def test_it_reaches_the_last_instant_and_no_further() -> None:
    clock = FakeClock(START)

    assert clock.advance(LAST - START) == LAST
    with pytest.raises(InvalidInputError, match="after the year 9999"):
        clock.advance(timedelta(microseconds=1))
    assert clock.now() == LAST


def test_threads_move_it_together() -> None:
    clock = FakeClock(START)
    together = threading.Barrier(4)

    def move() -> None:
        together.wait(10)
        for _ in range(2000):
            clock.advance(timedelta(seconds=1))

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.now() == START + timedelta(seconds=8000)


def test_the_error_is_one_of_ours_and_reaches_another_process_whole() -> None:
    error = NoProgressError("a timer", "it fires again and again", "schedule it later")
    assert isinstance(error, TimerStoreError)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_it_needs_no_pytest_and_no_alembic() -> None:
    program = """
import sys
sys.modules["pytest"] = None
import aion_timers.testing
print("alembic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
