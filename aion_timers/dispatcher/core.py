"""What the thread loop and the task loop share: settings, handlers by name, and the books of what is in flight.

Nothing here waits or talks to a database. What happens in one transaction is a generator that yields calls of the
repository and is sent their results, so that the two loops differ in how they call, which is to say by ``await``.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine, delete, text
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool, StaticPool

from aion_timers.dispatcher import pacing
from aion_timers.dispatcher.pacing import Backoff
from aion_timers.engine import name_of_table
from aion_timers.errors import InvalidInputError, LeaseLost, UnsupportedBindError, shown
from aion_timers.schema import Timer
from aion_timers.values import Claim, Settlement, TimerEntry, TimerId

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from aion_timers.repository import Clock

T = TypeVar("T")
D = TypeVar("D", bound="InFlight")
D_co = TypeVar("D_co", bound="InFlight", covariant=True)
Retry: TypeAlias = Callable[[Any, BaseException], timedelta | None]

OWN_CONNECTIONS: Final = 2
"""Connections of the pool that a dispatcher needs beside those of its handlers: for claims, and for leases."""

_WRITE: Final = delete(Timer)
_LONGEST_LEASE: Final = timedelta(days=366)
_NO_TIME: Final = timedelta(0)
_CLOCK_IS_FRESH: Final = 1.0
_BUSY_PAUSE: Final = 0.02
_PLANS_LAST: Final = 2.0
_PLANNED: Final = "aion_timers_planned"
_COUNTED_UNTIL: Final = "aion_timers_counted_until"
_COUNT_LASTS: Final = 10.0
_SPARED: Final = 6
_SHOWN: Final = 5
# in a row, until a single round lets its caller know
_MOST_FAILURES: Final = 5

_log = logging.getLogger("aion_timers.dispatcher")


# -- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """What a dispatcher was told, checked.

    Raises:
        InvalidInputError: a value is out of range, or two of them cannot work together.
    """

    concurrency: int
    batch: int
    lease: timedelta
    retry: Retry
    max_sleep: timedelta
    clock: Clock | None

    def __post_init__(self) -> None:
        _whole("concurrency", self.concurrency, "so many handlers run at once")
        _whole("batch", self.batch, "so many timers are claimed at once, at most")
        _length("lease", self.lease)
        if self.lease < pacing.SHORTEST_TICK * pacing.TICKS:
            raise InvalidInputError(
                "lease",
                self.lease,
                f"too short to be extended {pacing.TICKS} times before it runs out, "
                f"{pacing.SHORTEST_TICK.total_seconds():g} s apart",
                f"pass {pacing.SHORTEST_TICK * pacing.TICKS} or more; 30 to 60 seconds are usual",
            )
        if self.lease > _LONGEST_LEASE:
            raise InvalidInputError(
                "lease", self.lease, "longer than a year", "leases are extended while handlers run: pass 30 seconds"
            )
        _length("max_sleep", self.max_sleep)
        if not callable(self.retry):
            raise InvalidInputError(
                "retry", self.retry, "not callable", "pass a function of (delivery, error), or a Backoff"
            )
        if self.clock is not None and not callable(self.clock):
            raise InvalidInputError(
                "clock", self.clock, "not callable", "pass a function, as in lambda: datetime.now(UTC)"
            )

    @classmethod
    def of(
        cls,
        *,
        concurrency: int,
        batch: int | None,
        lease: timedelta,
        retry: Retry | None,
        max_sleep: timedelta,
        clock: Clock | None,
    ) -> Settings:
        """The settings, with what was left out filled in."""
        if batch is None:
            batch = max(pacing.DEFAULT_BATCH, concurrency if isinstance(concurrency, int) else 0)
        return cls(concurrency, batch, lease, Backoff() if retry is None else retry, max_sleep, clock)


def _whole(argument: str, value: object, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(argument, value, "no number to work with", f"pass an int from 1 on: {meaning}")


def _length(argument: str, value: object) -> None:
    if not isinstance(value, timedelta) or value <= timedelta(0):
        raise InvalidInputError(
            argument, value, "no length of time", "pass a timedelta above zero, as in timedelta(seconds=1)"
        )


def engine_of(session: Session) -> Engine:
    """The engine on which a session of the caller's keeps its timers.

    Raises:
        InvalidInputError: it has none, or only a connection.
    """
    cure = "bind the sessionmaker to an engine, as in sessionmaker(engine) or sessionmaker(binds={Timer: engine})"
    try:
        # asked as for a write, since a session may send reads to another server
        bind = session.get_bind(mapper=Timer.__mapper__, clause=_WRITE)
    except UnboundExecutionError as error:
        raise InvalidInputError("sessions", session, "the sessionmaker has no engine for timers", cure) from error
    if not isinstance(bind, Engine):
        raise InvalidInputError("sessions", bind, "the sessionmaker is bound to one connection", cure)
    return bind


def check_pool(pool: Pool, concurrency: int) -> None:
    """Refuse a pool whose connections would not suffice, or are not separate ones.

    Raises:
        InvalidInputError: of ``concurrency``, or of ``sessions``.
    """
    if isinstance(pool, StaticPool | SingletonThreadPool):
        raise InvalidInputError(
            "sessions",
            pool,
            "the engine has a single connection, or a database in memory for each thread",
            "use a file, or a pool of several connections",
        )
    if not isinstance(pool, QueuePool):
        return
    overflow: int = pool._max_overflow  # noqa: SLF001 - no public attribute tells
    most, need = pool.size() + overflow, concurrency + OWN_CONNECTIONS
    if pool.size() > 0 and overflow >= 0 and most < need:
        raise InvalidInputError(
            "concurrency",
            concurrency,
            f"the engine's pool gives {most} connections, and {need} are needed: one a handler, and "
            f"{OWN_CONNECTIONS} for claims and leases",
            f"make the engine with pool_size={need} or more, or lower concurrency",
        )


# -- handlers ---------------------------------------------------------------------------------------------------------


class Routes:
    """Which handler fires which timer.

    Args:
        handlers: one for every timer, or a mapping from names, or beginnings of names followed by ``*``.
        is_async: whether the handlers have to be coroutine functions, or must not.

    Raises:
        InvalidInputError: there is none, or one is not of the kind that this dispatcher calls.
    """

    def __init__(self, handlers: object, *, is_async: bool) -> None:
        self.names: Sequence[str] | None = None
        self._exact: dict[str, Callable[[Any], Any]] = {}
        self._prefixes: list[tuple[str, Callable[[Any], Any]]] = []
        self._every: Callable[[Any], Any] | None = None
        if isinstance(handlers, Mapping):
            for name, handler in handlers.items():
                checked = _handler(handler, is_async=is_async)
                if TimerId.named(name).value.endswith("*"):  # type: ignore[union-attr] # a named id's value is its name
                    self._prefixes.append((name[:-1], checked))
                else:
                    self._exact[name] = checked
            if not handlers:
                raise InvalidInputError("handlers", handlers, "no handler", "name at least one timer")
            self._prefixes.sort(key=lambda pair: len(pair[0]), reverse=True)
            self.names = list(handlers)
        else:
            self._every = _handler(handlers, is_async=is_async)

    def find(self, timer: TimerEntry) -> Callable[[Any], Any] | None:
        """The handler of an exact name, else of the longest beginning."""
        name = timer.timer_id.value
        if self._every is not None or not isinstance(name, str):
            return self._every
        if (exact := self._exact.get(name)) is not None:
            return exact
        return next((handler for prefix, handler in self._prefixes if name.startswith(prefix)), None)


def _handler(handler: object, *, is_async: bool) -> Callable[[Any], Any]:
    if not callable(handler):
        raise InvalidInputError(
            "handlers", handler, "not callable", "pass a function of one delivery, or a mapping from names to functions"
        )
    # an object with an async __call__ is called like a coroutine function
    found = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004 - not whether, but of which kind
    if found and not is_async:
        raise InvalidInputError("handlers", handler, "a coroutine function", "use AsyncDispatcher, or a plain function")
    if not found and is_async:
        raise InvalidInputError(
            "handlers",
            handler,
            "not a coroutine function, so it would hold up the event loop",
            "write it as `async def`, or use Dispatcher",
        )
    return handler


# -- deliveries -------------------------------------------------------------------------------------------------------


class InFlight:
    """A timer that is being fired, as both kinds of deliveries know it."""

    until: float
    """When the lease runs out, on the monotonic clock, as far as is known."""
    locked = False
    """Whether a transaction of the handler has the row locked, so that nobody can take it."""
    settled = False
    """Whether a transaction of the handler has settled it."""
    taken = False
    """Whether the database has said that the claim holds the timer no more."""

    def __init__(self, claim: Claim, late_by: timedelta, until: float) -> None:
        self.claim = claim
        self._late_by = late_by
        self.until = until

    @property
    def timer(self) -> TimerEntry:
        """The timer that fires."""
        return self.claim.timer

    @property
    def attempt(self) -> int:
        """How often the timer has been claimed since it was scheduled, 1 for the first time."""
        return self.claim.attempt

    @property
    def late_by(self) -> timedelta:
        """How long after its ``fire_at`` the timer was claimed, by the clock that decides."""
        return self._late_by

    @property
    def lost(self) -> bool:
        """Whether somebody else may fire the timer now: it was moved or cancelled, or its lease could not be extended.

        A long handler looks at it from time to time, and ends without further effects. Inside the delivery's own
        transaction nothing can be lost.
        """
        if self.settled or self.locked:
            return False
        return self.taken or time.monotonic() >= self.until

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.timer.workflow_id} {self.timer.timer_id} attempt {self.attempt}>"


def require_held(delivery: InFlight) -> None:
    """Refuse a delivery whose transaction is open already, or that is settled or lost.

    Raises:
        InvalidInputError: its transaction is open.
        LeaseLost: there is nothing to hold any more.
    """
    if delivery.locked:
        raise InvalidInputError(
            "delivery", delivery, "its transaction is open already", "use the session that transaction() gave"
        )
    if delivery.settled or delivery.taken:
        raise LeaseLost(delivery.claim)


def _extra(delivery: InFlight, **more: object) -> dict[str, object]:
    fields = {
        "workflow_id": str(delivery.timer.workflow_id),
        "timer_id": shown(delivery.timer.timer_id.value),
        "attempt": delivery.attempt,
        **more,
    }
    return {f"aion_{name}": value for name, value in fields.items()}


# -- what is done in one transaction ----------------------------------------------------------------------------------


class Call(NamedTuple):
    """A method of the repository, to be called."""

    method: str
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}


Calls: TypeAlias = Generator[Call, Any, T]


class Release(NamedTuple, Generic[D]):
    """A timer that is to be given back, to be due as before or after a while."""

    delivery: D
    delay: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Turn(Generic[D]):
    """What a transaction has changed, once it is committed."""

    completed: Sequence[D]
    released: Sequence[Release[D]]
    settlements: Sequence[Settlement]
    claims: Sequence[Claim]
    limit: int
    started: float
    ended: float
    asked: bool
    wake: timedelta | None


@dataclass(frozen=True, slots=True)
class Move:
    """What a loop does next.

    Attributes:
        kind: a ``turn`` at the database, a ``wait``, or nothing any more.
        limit: in a turn, how many timers are claimed.
        ask: in a turn, whether the next instant is asked for first, and a claim is only made if it has come.
        look: in a turn, whether nothing else is done than to ask.
        seconds: how long to wait, if nothing rings.
    """

    kind: Literal["turn", "wait", "done"]
    limit: int = 0
    ask: bool = False
    look: bool = False
    seconds: float = 0.0


class Waiting(Protocol[D_co]):
    """A queue of deliveries that no handler has started on."""

    def qsize(self) -> int:
        """How many there are."""

    def get_nowait(self) -> D_co | None:
        """The first one."""


class Books(Generic[D]):
    """What a dispatcher holds, what it has to tell the database, and when it asks next.

    Workers append outcomes and note beginnings and ends; all else is done by the loop, and the leases' keeper reads.

    Args:
        settings: the dispatcher's.
        routes: its handlers.
        make: makes a delivery of a claim, how late it is, and when its lease runs out.
        waiting: the queue that workers take from.
        nothing: the exception by which the queue says that it is empty.
        is_sqlite: whether the database is of the SQLite family.
        is_local: whether it is a file, so that its clock is this machine's.
        once: whether only what is due at the beginning is fired.
    """

    def __init__(
        self,
        settings: Settings,
        routes: Routes,
        make: Callable[[Claim, timedelta, float], D],
        *,
        waiting: Waiting[D],
        nothing: type[Exception],
        is_sqlite: bool,
        is_local: bool,
        once: bool,
    ) -> None:
        self.settings = settings
        self.routes = routes
        self.handled = 0
        self.stopping = False
        self.hint = False
        self.error: BaseException | None = None
        self.once = once
        self._make = make
        self._waiting = waiting
        self._nothing = nothing
        self._is_sqlite = is_sqlite
        self._is_local = is_local and settings.clock is None
        self._lock = threading.Lock()
        # of deliveries, not of claims, whose hash is made of all that they hold
        self._held: set[D] = set()
        # what the database is to be told
        self._to_complete: list[D] = []
        self._to_release: list[Release[D]] = []
        self._typical: float | None = None
        self._now: datetime | None = None
        self._now_at = 0.0
        self._as_of: datetime | None = None
        self._exhausted = False
        self._owned = routes.names is not None
        self._empty = 0
        self._low = 0
        # when a claim is worth while (certain), or worth a question
        self._ask_at = 0.0
        self._certain = True
        # the next instant has not been asked for since a claim that left nothing
        self._unasked = False
        self._busy_until = 0.0
        self._failures = 0
        self._pause_until = 0.0
        self._stopped_at: float | None = None
        self._last_start = 0.0

    # -- by workers

    def begin(self, delivery: D) -> float | None:
        """A handler is about to start: when, or None if it must not, since others may have the timer by now."""
        self._last_start = time.monotonic()
        if not delivery.lost:
            return self._last_start
        with self._lock:
            self._to_release.append(Release(delivery))
        return None

    def end(self, delivery: D, error: BaseException | None, started: float) -> bool:
        """A handler has ended; whether the loop should look."""
        fate = self._judge(delivery, error)
        with self._lock:
            self.handled += 1
            self._typical = pacing.typical_run(self._typical, time.monotonic() - started)
            if fate == "complete":
                self._to_complete.append(delivery)
            elif fate == "over":
                self._held.discard(delivery)
            else:
                self._to_release.append(Release(delivery, fate))
            return self._waiting.qsize() <= self._low

    def interrupted(self, delivery: D) -> None:
        """A handler was cancelled, together with the whole dispatcher."""
        with self._lock:
            if delivery.settled:
                self._held.discard(delivery)
            else:
                self._to_release.append(Release(delivery))

    def _judge(self, delivery: D, error: BaseException | None) -> timedelta | Literal["complete", "over"]:
        if error is None:
            return "over" if delivery.settled else "complete"
        if isinstance(error, LeaseLost) and error.claim == delivery.claim:
            _log.info("left to others, since its lease is lost: %r", delivery, extra=_extra(delivery))
            return "over"
        if delivery.settled:
            _log.error(
                "handler failed after its transaction was committed, so it is not tried again: %r",
                delivery,
                exc_info=error,
                extra=_extra(delivery),
            )
            return "over"
        delay = self._delay(delivery, error)
        if delay is None:
            _log.error("gave up, and deletes: %r", delivery, exc_info=error, extra=_extra(delivery))
            return "complete"
        _log.warning(
            "handler failed, and is tried again in %s: %r",
            delay,
            delivery,
            exc_info=error,
            extra=_extra(delivery, retry_in=delay.total_seconds()),
        )
        return delay

    def _delay(self, delivery: D, error: BaseException) -> timedelta | None:
        try:
            delay = self.settings.retry(delivery, error)
            if delay is None or (isinstance(delay, timedelta) and delay >= _NO_TIME):
                return delay
        except Exception:  # noqa: BLE001 - the default is as good
            _log.exception("retry failed, so the default decides: %r", delivery, extra=_extra(delivery))
        else:
            _log.error("retry gave %s, so the default decides: %r", shown(delay), delivery, extra=_extra(delivery))
        return Backoff()(delivery, error)

    # -- by the loop

    def next_move(self) -> Move:
        """What to do now."""
        now = time.monotonic()
        if self.stopping and self._stopped_at is None:
            self._stopped_at = now
        in_vain = self.stopping or (not self.once and pacing.stuck(now - self._last_start))
        if in_vain and self._waiting.qsize():
            self._give_back()
        ending = self.stopping or self._exhausted
        if ending and not self._held:
            return Move("done")
        if self._pause_until > now:
            if self._stopped_at is not None and now - self._stopped_at > self.settings.lease.total_seconds():
                self._abandon()
            return Move("wait", seconds=min(self._pause_until - now, self._longest()))
        limit = 0 if ending else self._room()
        return self._next_turn(now, limit) or self._next_wait(now, limit)

    def _next_turn(self, now: float, limit: int) -> Move | None:
        due = now >= self._ask_at
        if limit and ((due and self._certain) or (self.hint and not self._is_sqlite)):
            return Move("turn", limit)
        if (self._to_complete or self._to_release) and now >= self._busy_until:
            return Move("turn", limit, ask=True) if limit and (due or self._unasked) else Move("turn")
        # on a file a hint may be any commit, our own too, and a question takes no lock
        return Move("turn", look=True) if limit and (due or self.hint) else None

    def _next_wait(self, now: float, limit: int) -> Move:
        ends = [now + self._longest()]
        if limit:
            ends.append(self._ask_at)
        if self._to_complete or self._to_release:
            ends.append(self._busy_until)
        if self._waiting.qsize():
            ends.append(now + pacing.STUCK)
        return Move("wait", seconds=max(0.0, min(ends) - now))

    def _longest(self) -> float:
        return self.settings.max_sleep.total_seconds()

    def _room(self) -> int:
        with self._lock:
            busy = len(self._held) - len(self._to_complete) - len(self._to_release)
        settings = self.settings
        return pacing.room(concurrency=settings.concurrency, batch=settings.batch, busy=busy, typical=self._typical)

    def _give_back(self) -> None:
        given = []
        try:
            while True:
                if (delivery := self._waiting.get_nowait()) is not None:
                    given.append(Release(delivery))
        except self._nothing:
            pass
        with self._lock:
            self._to_release += given
            # how quick handlers were is no measure now
            self._typical = None

    def _abandon(self) -> None:
        """Forget what the database could not be told for the length of a lease; the leases have run out by then."""
        with self._lock:
            left = [*self._to_complete, *(release.delivery for release in self._to_release)]
            self._to_complete, self._to_release = [], []
            self._held.difference_update(left)
        if left:
            _log.error("stopped without settling %d timers, which will be fired again", len(left))

    def turn(self, move: Move) -> Calls[Turn[D]]:
        """One transaction: settle what has ended, claim what is due, and ask when to come again."""
        if move.limit or move.look:
            self.hint = False
        started = time.monotonic()
        if move.look:
            wake = yield Call("next_wake", (self.routes.names,))
            return Turn((), (), (), (), 0, started, time.monotonic(), asked=True, wake=wake)
        with self._lock:
            completed, released = tuple(self._to_complete), tuple(self._to_release)
        if move.limit or released:
            yield from self._look_at_clock()
        settlements = yield from self._settle(completed, released)
        claims: Sequence[Claim] = ()
        limit, asked, wake = move.limit, move.ask, None
        if move.ask:
            wake = yield Call("next_wake", (self.routes.names,))
            limit = move.limit if wake is not None and wake <= _NO_TIME else 0
        if limit:
            options = {"limit": limit, "lease": self.settings.lease, "names": self.routes.names}
            started = time.monotonic()
            claims = yield Call("claim", (self._as_of,), options)
            yield from self._refuse_adopted()
            # what was claimed is handed over before the next instant is asked for
            asked = not claims and not self.once
            if asked:
                wake = yield Call("next_wake", (self.routes.names,))
        return Turn(completed, released, settlements, claims, limit, started, time.monotonic(), asked=asked, wake=wake)

    def _refuse_adopted(self) -> Calls[None]:
        # after a claim, which says so if there is no table, and which is rolled back by the refusal
        if not self._owned and (yield Call("adopted")):
            raise UnsupportedBindError(
                "another program made this table, and a single handler would fire, and delete, that program's timers, "
                "too",
                'pass a mapping with the names of your own timers, as in Dispatcher(sessions, {"reminder": handler})',
            )
        self._owned = True

    def _look_at_clock(self) -> Calls[None]:
        if self._now is None or time.monotonic() - self._now_at > _CLOCK_IS_FRESH or self.settings.clock is not None:
            self._now = yield Call("now")
            self._now_at = time.monotonic()
        if self.once and self._as_of is None:
            self._as_of = self._now

    def _clock(self) -> datetime:
        now = self._now or datetime.now(UTC)
        return now if self.settings.clock else now + timedelta(seconds=time.monotonic() - self._now_at)

    def _settle(self, completed: Sequence[D], released: Sequence[Release[D]]) -> Calls[list[Settlement]]:
        settlements = []
        if completed:
            settlements.append((yield Call("complete", tuple([delivery.claim for delivery in completed]))))
        at_once = tuple(release.delivery.claim for release in released if release.delay is None)
        if at_once:
            settlements.append((yield Call("release", at_once)))
        for release in released:
            if release.delay is not None:
                retry_at = {"retry_at": self._later(release.delay)}
                settlements.append((yield Call("release", (release.delivery.claim,), retry_at)))
        return settlements

    def _later(self, delay: timedelta) -> datetime:
        try:
            return self._clock() + delay
        except OverflowError:
            return datetime.max.replace(tzinfo=UTC)

    def apply(self, turn: Turn[D]) -> list[D]:
        """Enter what was committed; the deliveries that are to be handled now."""
        if self._failures:
            _log.warning("the database answers again", extra={"aion_failures": self._failures})
        self._failures = 0
        busy = {claim for settlement in turn.settlements for claim in settlement.busy}
        self._log_lost([claim for settlement in turn.settlements for claim in settlement.lost])
        again = [delivery for delivery in turn.completed if delivery.claim in busy] if busy else []
        released = [release for release in turn.released if release.delivery.claim in busy] if busy else []
        with self._lock:
            # what has ended since then stands behind it
            del self._to_complete[: len(turn.completed)], self._to_release[: len(turn.released)]
            self._to_complete += again
            self._to_release += released
            self._held.difference_update(turn.completed, (release.delivery for release in turn.released))
            self._held.update(again, (release.delivery for release in released))
        if busy:
            self._busy_until = turn.ended + _BUSY_PAUSE
        if turn.limit and self.once:
            self._exhausted = len(turn.claims) < turn.limit
        elif turn.limit or turn.asked:
            self._pace(turn)
        return self._take(turn)

    def _pace(self, turn: Turn[D]) -> None:
        if turn.limit:
            self._empty = 0 if turn.claims else self._empty + 1
        self._unasked = not turn.asked and len(turn.claims) < turn.limit
        if self._unasked:
            self._ask_at, self._certain = turn.ended + pacing.HANDOVER, False
            return
        if not turn.asked:
            self._ask_at, self._certain = turn.ended, True
            return
        empty = self._empty if turn.limit else 0
        longest = self.settings.max_sleep
        past = self._past_millisecond(turn.ended) if self._is_local else _NO_TIME
        seconds = pacing.nap(turn.wake, empty=empty, longest=longest, whole_milliseconds=self._is_sqlite, past=past)
        self._ask_at = turn.ended + seconds
        # after the longest sleep there need not be anything, and a question costs less than a claim
        self._certain = turn.wake is not None and turn.wake <= longest

    @staticmethod
    def _past_millisecond(moment: float) -> timedelta:
        """How much of a millisecond of this machine's clock had gone by at a moment of the monotonic one."""
        return timedelta(seconds=(time.time() - time.monotonic() + moment) % 0.001)

    def _take(self, turn: Turn[D]) -> list[D]:
        now = self._clock()
        until = turn.started + self.settings.lease.total_seconds()
        made = [self._make(claim, max(_NO_TIME, now - claim.timer.fire_at), until) for claim in turn.claims]
        with self._lock:
            self._held.update(made)
        self._low = (self._waiting.qsize() + len(made)) // 2
        self._last_start = time.monotonic()
        return made

    def _log_lost(self, claims: Sequence[Claim]) -> None:
        if claims:
            _log.info(
                "%d timers were moved, cancelled or claimed by others while they were handled: %s%s",
                len(claims),
                ", ".join(f"{claim.timer.workflow_id} {claim.timer.timer_id}" for claim in claims[:_SHOWN]),
                ", ..." if len(claims) > _SHOWN else "",
                extra={"aion_lost": len(claims)},
            )

    def failed(self, error: BaseException) -> None:
        """A transaction of the loop's own has failed, and nothing of it is true."""
        patient = not self.once or self.stopping or self._exhausted or self._failures < _MOST_FAILURES
        if patient and pacing.passes(error):
            self._failures += 1
            pause = pacing.outage_pause(self._failures)
            self._pause_until = time.monotonic() + pause
            self._ask_at, self._certain = self._pause_until, True
            if self._failures & (self._failures - 1) == 0:
                _log.warning(
                    "the database does not answer (%s), and is asked again",
                    type(error).__name__,
                    exc_info=error,
                    extra={"aion_failures": self._failures},
                )
            return
        if self.stopping:
            _log.error("cannot settle", exc_info=error)
            self._abandon()
            return
        self.error = error
        self.stopping = True

    # -- by the keeper of leases

    def to_extend(self, besides: InFlight | None = None) -> list[Claim]:
        """The claims whose leases have been running for a while, except where a handler has the row locked."""
        length = self.settings.lease.total_seconds()
        fresh = time.monotonic() + length - length / _SPARED
        with self._lock:
            return [
                delivery.claim
                for delivery in self._held
                if delivery.until <= fresh and not delivery.locked and not delivery.taken and delivery is not besides
            ]

    def extension(self, claims: Sequence[Claim]) -> Calls[tuple[Settlement, float]]:
        """One transaction: extend the leases."""
        started = time.monotonic()
        settlement = yield Call("extend", tuple(claims), {"lease": self.settings.lease})
        return settlement, started

    def extended(self, settlement: Settlement, started: float) -> None:
        """Enter extensions that were committed."""
        until = started + self.settings.lease.total_seconds()
        done, lost = ({id(claim) for claim in claims} for claims in (settlement.done, settlement.lost))
        with self._lock:
            for delivery in self._held:
                if id(delivery.claim) in done:
                    delivery.until = max(delivery.until, until)
                # one that is being settled at this moment is not lost
                elif id(delivery.claim) in lost and not (delivery.settled or delivery.locked):
                    delivery.taken = True


# -- isolation --------------------------------------------------------------------------------------------------------


def isolated(engine: Engine) -> Engine:
    """The same engine, for the dispatcher's own transactions: short ones that write, whatever the host's level is."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="READ COMMITTED")
    if engine.dialect.driver.endswith("libsql"):
        return engine.execution_options(isolation_level="IMMEDIATE")
    return engine.execution_options(isolation_level="SERIALIZABLE") if _autocommits(engine) else engine


def opening(engine: Engine) -> dict[str, Any]:
    """How a delivery's session is asked for its connection, so that it begins a transaction even at AUTOCOMMIT."""
    options: dict[str, Any] = {"bind_arguments": {"mapper": Timer.__mapper__, "clause": _WRITE}}
    if _autocommits(engine):
        level = "READ COMMITTED" if engine.dialect.name == "postgresql" else "SERIALIZABLE"
        options["execution_options"] = {"isolation_level": level}
    return options


def _autocommits(engine: Engine) -> bool:
    level: Any = engine.get_execution_options().get("isolation_level")
    return "AUTOCOMMIT" in {level, getattr(engine.dialect, "_on_connect_isolation_level", None)}


# -- plans ------------------------------------------------------------------------------------------------------------


def prepare(connection: Connection) -> None:
    """Make a connection ready for a transaction of the dispatcher's own."""
    if connection.dialect.name == "postgresql":
        renew_plans(connection)
        _renew_statistics(connection)


def renew_plans(connection: Connection) -> None:
    """Let PostgreSQL plan anew what it has prepared for this connection, if that is more than a moment ago.

    A plan that it keeps was the best one when it was made. Made while next to nothing was waiting, it reads the whole
    table for a single timer, and a storm would be met so until the next ANALYZE, a minute or more.
    """
    if connection.dialect.name != "postgresql":
        return
    now = time.monotonic()
    if now - connection.info.setdefault(_PLANNED, now) >= _PLANS_LAST:
        connection.exec_driver_sql("DISCARD PLANS")
        connection.info[_PLANNED] = now


def _renew_statistics(connection: Connection) -> None:
    """Let PostgreSQL count the timers anew if it takes the table for empty and it is not.

    It does if it counted them just after all had been fired, while the table still had its pages. Then it expects no
    row however many come, reading a whole index costs nothing by its reckoning, and each claim would compare all
    timers with all of its own.
    """
    now = time.monotonic()
    if now < connection.info.get(_COUNTED_UNTIL, now):
        return
    table = name_of_table(connection)
    may = "has_table_privilege(oid, 'MAINTAIN')" if _maintains(connection) else "pg_has_role(relowner, 'USAGE')"
    which = "FROM pg_class WHERE oid = to_regclass(:table)"
    taken_for_empty = text(f"SELECT reltuples = 0 AND relpages > 0 AND {may} {which}")
    if not connection.scalar(taken_for_empty, {"table": table}):
        connection.info[_COUNTED_UNTIL] = now + _PLANS_LAST
        return
    if not connection.exec_driver_sql(f"SELECT EXISTS (TABLE {table})").scalar():
        return
    # all dispatchers hear of a storm at once: one of them counts, and the others wait for it before they plan
    lock = text(f"SELECT pg_advisory_xact_lock(hashtextextended('aion_timers ' || oid, 0)) {which}")
    connection.execute(lock, {"table": table})
    if connection.scalar(taken_for_empty, {"table": table}):
        # nobody waits for a VACUUM, or for an index that is built
        connection.exec_driver_sql(f"ANALYZE (SKIP_LOCKED) {table}")
    connection.commit()
    # where some timers lie among very many empty pages, the server may have counted none again
    connection.info[_COUNTED_UNTIL] = now + _COUNT_LASTS


def _maintains(connection: Connection) -> bool:
    """Whether this server has the privilege MAINTAIN, as from 17 on."""
    return (connection.dialect.server_version_info or ()) >= (17,)
