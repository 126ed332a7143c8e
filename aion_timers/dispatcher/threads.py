"""`Dispatcher`: fires timers with handlers in threads."""

from __future__ import annotations

import inspect
import logging
import queue
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from aion_timers.dispatcher import pacing
from aion_timers.dispatcher.core import (
    Books,
    Call,
    InFlight,
    Retry,
    Routes,
    Settings,
    check_pool,
    engine_of,
    isolated,
    opening,
    prepare,
    renew_plans,
    require_held,
)
from aion_timers.errors import InvalidInputError, LeaseLost, UnsupportedBindError
from aion_timers.repository import Clock, TimerRepository
from aion_timers.wakeup import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from aion_timers.values import Claim

T = TypeVar("T")
R = TypeVar("R", bound="Round")
Handler: TypeAlias = "Callable[[Delivery], object]"

_log = logging.getLogger("aion_timers.dispatcher")


class Delivery(InFlight):
    """A timer that is being fired: what a handler gets."""

    def __init__(self, round_: Round, claim: Claim, late_by: timedelta, until: float) -> None:
        super().__init__(claim, late_by, until)
        self._round = round_

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session of the dispatcher's sessionmaker whose transaction also settles the timer: both, or neither.

        The timer is locked at the beginning and deleted at the end, before the commit. In between a schedule or a
        cancel of others waits, and what the handler itself does to its timer stands. It is the one transaction of the
        session: leave commit and rollback to it. On a SQLite file it holds the only write lock, so do slow work before.

        Raises:
            LeaseLost: at the beginning, before any work is done: the timer is not this handler's any more.
        """
        require_held(self)
        with self._round.settling(self) as session:
            yield session

    def extend(self) -> None:
        """Make the lease last its whole length from now on; otherwise it is done from time to time.

        Raises:
            LeaseLost: the timer is not this handler's any more.
        """
        if self.locked:
            return
        require_held(self)
        self._round.extend([self.claim])
        if self.taken:
            raise LeaseLost(self.claim)


class _Bell:
    """Wakes the loop, also if it is rung from a signal handler, where an Event can deadlock."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Let the loop look again."""
        self._rings.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for a ring, or so long."""
        if seconds > 0:
            with suppress(queue.Empty):
                self._rings.get(timeout=seconds)
        with suppress(queue.Empty):
            while True:
                self._rings.get_nowait()


class Dispatcher:
    """Fires due timers: claims them, calls handlers in threads, and settles what they have fired.

    A timer is fired at least once; what a handler writes in `Delivery.transaction` is written exactly once. Any number
    of dispatchers, in any number of processes, share the work.

    Args:
        sessions: a sessionmaker that is bound to an engine, or an Engine. Its pool needs two connections beside one a
            handler.
        handlers: one function of a `Delivery` for every timer; or a mapping from names, or beginnings of names with
            ``*`` after them, to functions: then only these timers are claimed. An exact name comes before a beginning,
            and of two beginnings the longer one.
        concurrency: how many handlers run at once.
        batch: how many timers one claim takes at most; by default 500, or ``concurrency`` if that is more. No more are
            claimed than can start within a moment, as the handlers have shown so far.
        lease: how long a claim holds its timer. It is extended while the handler runs, so it only decides how soon
            another process takes over from one that died.
        retry: says of a delivery and its handler's error after how long the timer fires again; None gives it up, which
            deletes it. By default `Backoff()`, which never gives up.
        max_sleep: the longest sleep. A wake-up that was missed makes a timer late by no more than this.
        clock: tells the current instant as an aware datetime, for tests. By default the database's clock decides.

    Raises:
        InvalidInputError: settings that cannot be, or cannot work together; nothing has been started.
    """

    def __init__(
        self,
        sessions: sessionmaker[Any] | Engine,
        handlers: Handler | Mapping[str, Handler],
        *,
        concurrency: int = 1,
        batch: int | None = None,
        lease: timedelta = timedelta(seconds=30),
        retry: Retry | None = None,
        max_sleep: timedelta = timedelta(seconds=1),
        clock: Clock | None = None,
    ) -> None:
        self._sessions = _sessions(sessions)
        self._settings = Settings.of(
            concurrency=concurrency, batch=batch, lease=lease, retry=retry, max_sleep=max_sleep, clock=clock
        )
        self._routes = Routes(handlers, is_async=False)
        session = self._sessions()
        try:
            self._engine = engine_of(session)
        finally:
            session.close()
        check_pool(self._engine.pool, concurrency)
        self._bell = _Bell()
        self._busy = threading.Lock()
        self._stop = False

    def run(self) -> None:
        """Fire timers until `stop`, through outages of the database.

        At the end, also after a KeyboardInterrupt, nothing more is claimed, handlers that run come to their end, and
        timers that no handler has started on are given back.

        Raises:
            TimerStoreError: what no waiting mends, such as a database that is not migrated.
        """
        self._run(once=False)

    def run_due(self) -> int:
        """Fire the timers that are due now, then return; how many handlers ran.

        A timer that becomes due meanwhile, or is to be retried, is left to the next call.
        """
        return self._run(once=True)

    def stop(self) -> None:
        """Let `run` return once the running handlers have; from any thread, and from a signal handler.

        If nothing runs, the next run returns at once.
        """
        self._stop = True
        self._bell.ring()

    def _run(self, *, once: bool) -> int:
        with self._round(Round, once=once) as round_:
            return round_.run(lambda: self._stop)

    @contextmanager
    def _round(self, kind: type[R], *, once: bool) -> Iterator[R]:
        if not self._busy.acquire(blocking=False):
            raise UnsupportedBindError("this dispatcher runs already", "make another one")
        try:
            yield kind(self._sessions, self._engine, self._settings, self._routes, self._bell, once=once)
        finally:
            self._stop = False
            self._busy.release()


def _sessions(sessions: object) -> sessionmaker[Any]:
    if isinstance(sessions, sessionmaker):
        return sessions
    if isinstance(sessions, Engine):
        return sessionmaker(sessions)
    kinds = {kind.__name__ for kind in type(sessions).__mro__}
    raise InvalidInputError(
        "sessions",
        sessions,
        f"a {type(sessions).__name__} makes no sessions",
        "use AsyncDispatcher for it"
        if kinds & {"AsyncEngine", "async_sessionmaker"}
        else "pass sessionmaker(engine), or the engine",
    )


class Round:
    """One run of a dispatcher, from its first claim to its orderly end."""

    def __init__(
        self,
        sessions: sessionmaker[Any],
        engine: Engine,
        settings: Settings,
        routes: Routes,
        bell: _Bell,
        *,
        once: bool,
    ) -> None:
        self._sessions = sessions
        self._engine = engine
        self._own = isolated(engine)
        self._settings = settings
        self._clock = settings.clock
        self._bell = bell
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._ready: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._books: Books[Delivery] = Books(
            settings,
            routes,
            partial(Delivery, self),
            waiting=self._ready,
            nothing=queue.Empty,
            is_sqlite=self._is_sqlite,
            is_local=self._is_sqlite and not engine.url.host,
            once=once,
        )

    def run(self, stopped: Callable[[], bool]) -> int:
        """Fire timers until it is stopped; how many handlers ran."""
        books = self._books
        names = ["leases", *(f"handler-{number}" for number in range(self._settings.concurrency))]
        targets = [self._keep, *[self._work] * self._settings.concurrency]
        # they end before this returns, unless it is interrupted a second time, and then they must not hold up the exit
        threads = [
            threading.Thread(target=target, name=f"aion-timers-{name}", daemon=True)
            for name, target in zip(names, targets, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            with self._listening():
                try:
                    self._loop(stopped)
                except BaseException:
                    books.stopping = True
                    self._loop(stopped)
                    raise
        finally:
            for _ in targets:
                self._ready.put(None)
            self._over.set()
        for thread in threads:
            thread.join()
        if books.error is not None:
            raise books.error
        return books.handled

    def _loop(self, stopped: Callable[[], bool]) -> None:
        books = self._books
        while True:
            books.stopping = books.stopping or stopped()
            move = books.next_move()
            if move.kind == "done":
                return
            if move.kind == "wait":
                self._bell.wait(move.seconds)
                continue
            try:
                turn = self._transact(books.turn(move), own=not move.look)
            except Exception as error:  # noqa: BLE001 - told apart there
                books.failed(error)
                continue
            for delivery in books.apply(turn):
                self._ready.put(delivery)
            # it would keep what it has settled in memory until the end of the next one
            del turn
            if self._is_sqlite:
                # a file has one writer, and others have to have their turn
                self._bell.wait(pacing.YIELD)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if self._books.once:
            yield
            return
        with Wakeup(self._engine) as wakeup:
            thread = threading.Thread(target=self._hear, args=(wakeup,), name="aion-timers-hints", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._over.set()
                wakeup.close()
                thread.join()

    def _hear(self, wakeup: Wakeup) -> None:
        while not self._over.is_set():
            if wakeup.wait(pacing.LONG):
                self._books.hint = True
                self._bell.ring()

    # -- handlers

    def _work(self) -> None:
        while (delivery := self._ready.get()) is not None:
            if (started := self._books.begin(delivery)) is None:
                self._bell.ring()
                continue
            error = self._handle(delivery)
            if self._books.end(delivery, error, started):
                self._bell.ring()

    def _handle(self, delivery: Delivery) -> BaseException | None:
        handler = self._books.routes.find(delivery.timer)
        if handler is None:
            return LookupError(f"no handler for {delivery.timer.timer_id}")
        try:
            result = handler(delivery)
            if inspect.iscoroutine(result):
                result.close()
                return TypeError(f"the handler {handler!r} gave a coroutine: use AsyncDispatcher for it")
        except BaseException as error:  # noqa: BLE001 - whatever it is, the timer is retried and the thread goes on
            return error
        return None

    @contextmanager
    def settling(self, delivery: Delivery) -> Iterator[Session]:
        """A session whose transaction settles the delivery at its end."""
        session = self._sessions()
        timers = TimerRepository(session, clock=self._clock)
        try:
            self._confirm(session, timers, delivery)
            yield session
            session.flush()
            settlement = timers.complete(delivery.claim)
            others = self._extend_others(timers, delivery)
            session.commit()
            # lost means that the handler itself moved or cancelled it; busy, that it ended the transaction
            delivery.settled = not settlement.busy
            if others is not None:
                self._books.extended(*others)
        finally:
            delivery.locked = False
            session.close()

    def _confirm(self, session: Session, timers: TimerRepository, delivery: Delivery) -> None:
        for tries in range(1, pacing.CONFIRM_TRIES + 1):
            try:
                if not session.in_transaction():
                    session.begin()
                renew_plans(session.connection(**opening(self._engine)))
                timers.confirm(delivery.claim)
            except DBAPIError as error:
                if tries == pacing.CONFIRM_TRIES or not pacing.conflicts(error):
                    raise
                session.rollback()
                time.sleep(pacing.outage_pause(1))
            except LeaseLost:
                delivery.taken = True
                raise
            else:
                delivery.locked = True
                return

    def _extend_others(self, timers: TimerRepository, delivery: Delivery) -> tuple[Any, float] | None:
        # nobody else could, while this transaction had the only write lock
        claims = self._books.to_extend(besides=delivery) if self._is_sqlite else []
        return _driven(self._books.extension(claims), timers) if claims else None

    # -- the database

    def _transact(self, calls: Generator[Call, Any, T], *, own: bool = True) -> T:
        engine = self._own if own else self._engine
        with engine.connect() as connection:
            if own:
                prepare(connection)
            result = _driven(calls, TimerRepository(connection, clock=self._clock))
            connection.commit()
            return result

    def extend(self, claims: list[Claim]) -> None:
        """Extend the leases of these claims."""
        self._books.extended(*self._transact(self._books.extension(claims)))

    def _keep(self) -> None:
        tick, failures = pacing.tick(self._settings.lease), 0
        while not self._over.wait(min(tick, pacing.outage_pause(failures)) if failures else tick):
            claims = self._books.to_extend()
            try:
                if claims:
                    self.extend(claims)
                failures = 0
            except Exception as error:  # noqa: BLE001 - the loop decides whether the dispatcher goes on
                failures += 1
                _log.log(
                    logging.WARNING if failures == 1 else logging.DEBUG,
                    "%d leases could not be extended (%s)",
                    len(claims),
                    type(error).__name__,
                    exc_info=error,
                    extra={"aion_leases": len(claims)},
                )


def _driven(calls: Generator[Call, Any, T], timers: TimerRepository) -> T:
    try:
        call = next(calls)
        while True:
            call = calls.send(getattr(timers, call.method)(*call.args, **call.options))
    except StopIteration as stop:
        value: T = stop.value
        return value
