"""`run_due`: fire what is due, one timer after the other, with a `FakeClock` that moves along.

What is done is written once, as a generator that yields calls of a round and is sent their results. The two rounds are
those of the dispatchers, without their threads, tasks and sleeps.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

from sqlalchemy.exc import OperationalError

from aion_timers.dispatcher import AsyncDispatcher, Dispatcher, pacing
from aion_timers.dispatcher.core import Books, Call, Calls, InFlight, Move, Turn
from aion_timers.dispatcher.tasks import Round as TaskRound
from aion_timers.dispatcher.threads import Round as ThreadRound
from aion_timers.errors import InvalidInputError, LeaseLost, NoProgressError, UnsupportedBindError
from aion_timers.testing.clock import FakeClock
from aion_timers.values import TimerEntry, utc

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from aion_timers.dispatcher.tasks import AsyncDelivery
    from aion_timers.dispatcher.threads import Delivery

_PATIENCE: Final = 5.0
_LOOKED_AT: Final = 100
_OPEN_TRANSACTION: Final = (
    "run_due() waits for nobody: if the test has a session that has written and is still open, "
    "commit or close it before the call"
)


@dataclass(frozen=True, slots=True)
class Fired:
    """One firing: a handler was called for a timer.

    Attributes:
        timer: the timer, with the ``fire_at`` that it had then.
        attempt: how often it had been claimed since it was scheduled, 1 for the first time.
        at: what time it was by the clock, in UTC.
        error: what the handler raised.
    """

    timer: TimerEntry
    attempt: int
    at: datetime
    error: BaseException | None = None


@overload
def run_due(
    dispatcher: Dispatcher,
    *,
    until: datetime | None = None,
    raise_handler_errors: bool = True,
    max_firings: int = 1000,
) -> list[Fired]: ...


@overload
def run_due(
    dispatcher: AsyncDispatcher,
    *,
    until: datetime | None = None,
    raise_handler_errors: bool = True,
    max_firings: int = 1000,
) -> Coroutine[Any, Any, list[Fired]]: ...


def run_due(
    dispatcher: Dispatcher | AsyncDispatcher,
    *,
    until: datetime | None = None,
    raise_handler_errors: bool = True,
    max_firings: int = 1000,
) -> list[Fired] | Coroutine[Any, Any, list[Fired]]:
    """Fire what becomes due up to an instant, in order, and let the dispatcher's clock move along.

    The clock jumps to the next instant at which the dispatcher can claim a timer, whose handler is then called; and so
    on, until nothing more is due by ``until``. Then the clock stands at ``until``. Retries, timers that handlers
    schedule meanwhile, and timers of claims whose leases run out are fired in their turn. Handlers run one at a time,
    whatever the dispatcher's ``concurrency`` is, in the order of ``fire_at``, workflow id and timer id; those of a
    `Dispatcher` in the calling thread, those of an `AsyncDispatcher` in the calling task. The claims, the transactions
    and ``retry`` are those of ``run()``; but no outage of the database is waited for, and its errors are raised.

    A handler may move the clock, as slow work would; at the end it then stands at ``until`` or later, and what is due
    by it has been fired. If a handler calls the dispatcher's ``stop()``, the call ends with that handler, and the clock
    stands where it is.

    Args:
        dispatcher: one that was made with a `FakeClock` as its clock. With an `AsyncDispatcher` await the result.
        until: an aware datetime, not before what time it is by the clock; by default that, so that the clock stands.
        raise_handler_errors: whether an error that a handler raises is raised here, with a note that names the timer.
            Its timer has been settled by then as ``retry`` decided, and the clock stands at that instant, so another
            call goes on from there. If False, only ``retry`` decides, as in production, and the result tells of the
            errors; what is no `Exception`, such as a KeyboardInterrupt, is raised even so. A `LeaseLost` of the
            handler's own timer is never raised, since it is no failure.
        max_firings: how many firings are taken for no endless loop.

    Returns:
        What was fired, in order.

    Raises:
        InvalidInputError: the dispatcher has another clock, or none; or ``until`` is naive or over already.
        NoProgressError: more than ``max_firings`` timers fired, or a due timer cannot be had, since a transaction that
            is open somewhere else has it locked. What was fired before is committed.
        UnsupportedBindError: the dispatcher runs already.
    """
    if not isinstance(dispatcher, Dispatcher | AsyncDispatcher):
        raise UnsupportedBindError(
            f"run_due() does not take a value of type {type(dispatcher).__name__}", "pass a dispatcher"
        )
    clock = dispatcher._settings.clock  # noqa: SLF001 - no user of a dispatcher but this one has to know
    if not isinstance(clock, FakeClock):
        raise InvalidInputError(
            "dispatcher", dispatcher, "its clock cannot be moved", "make it with clock=FakeClock(...)"
        )
    if isinstance(max_firings, bool) or not isinstance(max_firings, int) or max_firings < 1:
        raise InvalidInputError("max_firings", max_firings, "no number of firings", "pass an int from 1 on")
    now = clock.now()
    end = now if until is None else utc("until", until, up=False)
    if end < now:
        raise InvalidInputError(
            "until", until, f"over already, since it is {now} by the clock", "pass a later instant, or move the clock"
        )
    course = _Course(clock, end, max_firings, raise_handler_errors=raise_handler_errors)
    return _run(dispatcher, course) if isinstance(dispatcher, Dispatcher) else _run_async(dispatcher, course)


# -- what is done, whichever dispatcher does it -----------------------------------------------------------------------


class _End(NamedTuple):
    fired: list[Fired]
    error: BaseException | None = None


@dataclass
class _Course:
    """One call of `run_due`: how far, and what has been fired so far."""

    clock: FakeClock
    until: datetime
    max_firings: int
    raise_handler_errors: bool = field(kw_only=True)
    fired: list[Fired] = field(default_factory=list)
    _waiting_since: float | None = None

    def steps(self, books: Books[Any], stopped: Callable[[], bool]) -> Calls[_End]:
        """Claim, fire and settle one timer after the other; move the clock where there is none."""
        while not stopped():
            turn: Turn[Any] = yield Call("transact", (books.turn(Move("turn", limit=1)),))
            claimed = books.apply(turn)
            for delivery in claimed:
                self._waiting_since = None
                if (error := (yield from self._fire(books, delivery))) is not None:
                    return _End(self.fired, error)
            if claimed:
                continue
            if turn.wake is None or turn.wake > max(timedelta(0), self.until - self.clock.now()):
                if self.clock.now() < self.until:
                    self.clock.move_to(self.until)
                return _End(self.fired)
            if turn.wake > timedelta(0):
                self.clock.advance(turn.wake)
            else:
                yield from self._wait(books)
        return _End(self.fired)

    def _fire(self, books: Books[Any], delivery: InFlight) -> Calls[BaseException | None]:
        # time that goes by outside the test's clock, as in a debugger, ends no lease
        delivery.until = math.inf
        at = self.clock.now()
        started = books.begin(delivery) or 0.0
        error: BaseException | None = yield Call("handle", (delivery,))
        books.end(delivery, error, started)
        self.fired.append(Fired(delivery.timer, delivery.attempt, at, error))
        if not delivery.settled:
            yield from self._settle(books, delivery)
        if len(self.fired) > self.max_firings:
            raise self._endless()
        if error is None or (isinstance(error, LeaseLost) and error.claim == delivery.claim):
            return None
        if not self.raise_handler_errors and isinstance(error, Exception):
            return None
        error.add_note(f"while run_due() fired {_named(delivery.timer)}, attempt {delivery.attempt}, at {at}")
        return error

    def _settle(self, books: Books[Any], delivery: InFlight) -> Calls[None]:
        since = time.monotonic()
        while True:
            turn: Turn[Any] = yield Call("transact", (books.turn(Move("turn")),))
            books.apply(turn)
            if not any(settlement.busy for settlement in turn.settlements):
                return
            if time.monotonic() - since > _PATIENCE:
                raise NoProgressError(
                    delivery.timer,
                    f"{_named(delivery.timer)} was fired, and another transaction has it locked, so that it cannot be "
                    "settled",
                    "see that the handler, and the test, close every session that they open",
                )
            yield Call("pause", (pacing.FLOOR.total_seconds(),))

    def _wait(self, books: Books[Any]) -> Calls[None]:
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > _PATIENCE:
            due: list[TimerEntry] = yield Call("transact", (_due(),))
            timer = next((timer for timer in due if books.routes.find(timer) is not None), None)
            first = f"; the first one is {_named(timer)}" if timer else ""
            raise NoProgressError(
                timer,
                f"timers are due at {self.clock.now()}, and another transaction has them locked{first}",
                "commit or close the sessions of the test before run_due()",
            )
        yield Call("pause", (pacing.FLOOR.total_seconds(),))

    def _endless(self) -> NoProgressError:
        keys = Counter((fired.timer.workflow_id, fired.timer.timer_id) for fired in self.fired)
        (key, times), *_ = keys.most_common(1)
        timer = next(
            fired.timer for fired in reversed(self.fired) if (fired.timer.workflow_id, fired.timer.timer_id) == key
        )
        since = self.fired[-1].at - self.fired[0].at
        return NoProgressError(
            timer,
            f"more than {self.max_firings:,} timers fired within {since} of the test's clock, "
            f"{times:,} times {_named(timer)}, which looks like an endless loop",
            "see that handlers schedule, and retry gives, later instants; or pass a larger max_firings",
        )


def _due() -> Calls[list[TimerEntry]]:
    timers: list[TimerEntry] = yield Call("expired", (None,), {"limit": _LOOKED_AT})
    return timers


def _named(timer: TimerEntry) -> str:
    return f"{timer.timer_id} of workflow {timer.workflow_id}"


# -- the rounds -------------------------------------------------------------------------------------------------------


class _ThreadSteps(ThreadRound):
    """A dispatcher's round that is driven from outside, in the calling thread."""

    def drive(self, course: _Course, stopped: Callable[[], bool]) -> _End:
        """Take the steps."""
        steps = course.steps(self._books, stopped)
        try:
            call = next(steps)
            while True:
                call = steps.send(getattr(self, call.method)(*call.args))
        except StopIteration as stop:
            end: _End = stop.value
            return end

    def transact(self, calls: Generator[Call, Any, Any]) -> Any:  # noqa: ANN401 - what the transaction gives
        """One transaction."""
        try:
            return self._transact(calls)
        except OperationalError as error:
            _explain(error)
            raise

    def handle(self, delivery: Delivery) -> BaseException | None:
        """Call the handler; what it raised."""
        return self._handle(delivery)

    def pause(self, seconds: float) -> None:
        """Let real time go by."""
        time.sleep(seconds)


class _TaskSteps(TaskRound):
    """Like `_ThreadSteps`, in the calling task."""

    async def drive(self, course: _Course, stopped: Callable[[], bool]) -> _End:
        """Take the steps."""
        steps = course.steps(self._books, stopped)
        try:
            call = next(steps)
            while True:
                call = steps.send(await getattr(self, call.method)(*call.args))
        except StopIteration as stop:
            end: _End = stop.value
            return end

    async def transact(self, calls: Generator[Call, Any, Any]) -> Any:  # noqa: ANN401 - what the transaction gives
        """One transaction."""
        try:
            return await self._transact(calls)
        except OperationalError as error:
            _explain(error)
            raise

    async def handle(self, delivery: AsyncDelivery) -> BaseException | None:
        """Call the handler; what it raised."""
        try:
            return await self._handle(delivery)
        except asyncio.CancelledError:
            self._books.interrupted(delivery)
            await self._transact(self._books.turn(Move("turn")))
            raise

    async def pause(self, seconds: float) -> None:
        """Let real time go by."""
        await asyncio.sleep(seconds)


def _explain(error: OperationalError) -> None:
    if "locked" in str(error.orig):
        error.add_note(_OPEN_TRANSACTION)


def _run(dispatcher: Dispatcher, course: _Course) -> list[Fired]:
    with dispatcher._round(_ThreadSteps, once=False) as round_:  # noqa: SLF001 - the way to one for this module
        end = round_.drive(course, lambda: dispatcher._stop)  # noqa: SLF001 - as its own loop is told
    if end.error is not None:
        raise end.error
    return end.fired


async def _run_async(dispatcher: AsyncDispatcher, course: _Course) -> list[Fired]:
    with dispatcher._round(_TaskSteps, once=False) as round_:  # noqa: SLF001 - the way to one for this module
        end = await round_.drive(course, lambda: dispatcher._stop)  # noqa: SLF001 - as its own loop is told
    if end.error is not None:
        raise end.error
    return end.fired
