"""`AsyncDispatcher`: fires timers with handlers in tasks of one event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy.exc import DBAPIError

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
from aion_timers.repository import AsyncTimerRepository, Clock
from aion_timers.wakeup import AsyncWakeup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    from aion_timers.values import Claim

T = TypeVar("T")
R = TypeVar("R", bound="Round")
AsyncHandler: TypeAlias = "Callable[[AsyncDelivery], Awaitable[object]]"

_log = logging.getLogger("aion_timers.dispatcher")


class AsyncDelivery(InFlight):
    """A timer that is being fired: what an async handler gets."""

    def __init__(self, round_: Round, claim: Claim, late_by: timedelta, until: float) -> None:
        super().__init__(claim, late_by, until)
        self._round = round_

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Like `Delivery.transaction`."""
        require_held(self)
        async with self._round.settling(self) as session:
            yield session

    async def extend(self) -> None:
        """Like `Delivery.extend`."""
        if self.locked:
            return
        require_held(self)
        await self._round.extend([self.claim])
        if self.taken:
            raise LeaseLost(self.claim)


class AsyncDispatcher:
    """Like `Dispatcher`, with coroutine functions as handlers, which run as tasks of one event loop.

    A task that awaits `run` can be cancelled: its handlers are cancelled then, too, and their timers given back. `stop`
    lets them end.

    Args:
        sessions: an async_sessionmaker that is bound to an engine, or an AsyncEngine.
        handlers: as for `Dispatcher`, coroutine functions of an `AsyncDelivery`.
        concurrency: how many handlers run at once.
        batch: how many timers one claim takes at most.
        lease: how long a claim holds its timer. A handler that holds up the event loop holds up the extension, too.
        retry: a plain function, as for `Dispatcher`.
        max_sleep: the longest sleep.
        clock: tells the current instant as an aware datetime, for tests.

    Raises:
        InvalidInputError: settings that cannot be, or cannot work together; nothing has been started.
    """

    def __init__(
        self,
        sessions: async_sessionmaker[Any] | AsyncEngine,
        handlers: AsyncHandler | Mapping[str, AsyncHandler],
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
        self._routes = Routes(handlers, is_async=True)
        # nothing has been awaited with it, so there is nothing to close
        self._engine = _async_engine(engine_of(self._sessions().sync_session))
        check_pool(self._engine.pool, concurrency)
        self._busy = threading.Lock()
        self._stop = False
        self._wake: Callable[[], object] = bool

    async def run(self) -> None:
        """Like `Dispatcher.run`."""
        await self._run(once=False)

    async def run_due(self) -> int:
        """Like `Dispatcher.run_due`."""
        return await self._run(once=True)

    def stop(self) -> None:
        """Let `run` return once the running handlers have; from any thread, and from a signal handler.

        If nothing runs, the next run returns at once.
        """
        self._stop = True
        self._wake()

    async def _run(self, *, once: bool) -> int:
        with self._round(Round, once=once) as round_:
            return await round_.run(lambda: self._stop)

    @contextmanager
    def _round(self, kind: type[R], *, once: bool) -> Iterator[R]:
        if not self._busy.acquire(blocking=False):
            raise UnsupportedBindError("this dispatcher runs already", "make another one")
        loop = asyncio.get_running_loop()
        try:
            round_ = kind(self._sessions, self._engine, self._settings, self._routes, once=once)

            def wake() -> None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(round_.ring)

            self._wake = wake
            yield round_
        finally:
            self._wake = bool
            self._stop = False
            self._busy.release()


def _async_engine(engine: Engine) -> AsyncEngine:
    from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415 - greenlet, which it needs, is an extra

    return AsyncEngine(engine)


def _sessions(sessions: object) -> async_sessionmaker[Any]:
    try:
        from sqlalchemy.ext.asyncio import (  # noqa: PLC0415 - greenlet, which it needs, is an extra
            AsyncEngine,
            async_sessionmaker,
        )
    except ImportError as error:
        raise UnsupportedBindError(
            "AsyncDispatcher needs greenlet, which is not installed", "pip install 'aion-timers[asyncio]'"
        ) from error
    if isinstance(sessions, async_sessionmaker):
        return sessions
    if isinstance(sessions, AsyncEngine):
        return async_sessionmaker(sessions)
    kinds = {kind.__name__ for kind in type(sessions).__mro__}
    raise InvalidInputError(
        "sessions",
        sessions,
        f"a {type(sessions).__name__} makes no async sessions",
        "use Dispatcher for it" if kinds & {"Engine", "sessionmaker"} else "pass async_sessionmaker(engine)",
    )


class Round:
    """One run of a dispatcher, from its first claim to its orderly end."""

    def __init__(
        self,
        sessions: async_sessionmaker[Any],
        engine: AsyncEngine,
        settings: Settings,
        routes: Routes,
        *,
        once: bool,
    ) -> None:
        self._sessions = sessions
        self._engine = engine
        self._own = _async_engine(isolated(engine.sync_engine))
        self._settings = settings
        self._clock = settings.clock
        self._bell = asyncio.Event()
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._ready: asyncio.Queue[AsyncDelivery | None] = asyncio.Queue()
        self._over = asyncio.Event()
        self._task = _current_task()
        self._cancellations = self._task.cancelling()
        self._aborted = False
        self._books: Books[AsyncDelivery] = Books(
            settings,
            routes,
            partial(AsyncDelivery, self),
            waiting=self._ready,
            nothing=asyncio.QueueEmpty,
            is_sqlite=self._is_sqlite,
            is_local=self._is_sqlite and not engine.url.host,
            once=once,
        )

    def ring(self) -> None:
        """Let the loop look again."""
        self._bell.set()

    async def run(self, stopped: Callable[[], bool]) -> int:
        """Fire timers until it is stopped; how many handlers ran."""
        books = self._books
        keeper = asyncio.create_task(self._keep(), name="aion-timers-leases")
        workers = [
            asyncio.create_task(self._work(), name=f"aion-timers-handler-{number}")
            for number in range(self._settings.concurrency)
        ]
        try:
            async with self._listening():
                try:
                    await self._loop(stopped)
                except BaseException:
                    self._aborted = books.stopping = True
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
                    await self._loop(stopped)
                    raise
        finally:
            for _ in workers:
                self._ready.put_nowait(None)
            self._over.set()
            await asyncio.gather(keeper, *workers, return_exceptions=True)
        if books.error is not None:
            raise books.error
        return books.handled

    async def _loop(self, stopped: Callable[[], bool]) -> None:
        books = self._books
        while True:
            if not self._aborted and self._task.cancelling() > self._cancellations:
                raise asyncio.CancelledError  # a driver made an error of it
            books.stopping = books.stopping or stopped()
            move = books.next_move()
            if move.kind == "done":
                return
            if move.kind == "wait":
                await self._wait(move.seconds)
                continue
            try:
                turn = await self._transact(books.turn(move), own=not move.look)
            except Exception as error:  # noqa: BLE001 - told apart there
                books.failed(error)
                continue
            for delivery in books.apply(turn):
                self._ready.put_nowait(delivery)
            # it would keep what it has settled in memory until the end of the next one
            del turn
            # a file has one writer, and others have to have their turn
            await asyncio.sleep(pacing.YIELD if self._is_sqlite else 0)

    async def _wait(self, seconds: float) -> None:
        if seconds > 0:
            # not by wait_for, which swallows a cancellation in Python 3.11 if the bell rings at that moment
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._bell.wait()
        self._bell.clear()

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        if self._books.once:
            yield
            return
        async with AsyncWakeup(self._engine) as wakeup:
            task = asyncio.create_task(self._hear(wakeup), name="aion-timers-hints")
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def _hear(self, wakeup: AsyncWakeup) -> None:
        while True:
            if await wakeup.wait(pacing.LONG):
                self._books.hint = True
                self.ring()

    # -- handlers

    async def _work(self) -> None:
        books = self._books
        while (delivery := await self._next()) is not None:
            if (started := books.begin(delivery)) is None:
                self.ring()
                continue
            try:
                error = await self._handle(delivery)
            except asyncio.CancelledError as cancelled:
                if not await self._goes_on():
                    books.interrupted(delivery)
                    raise
                error = cancelled
            if books.end(delivery, error, started):
                self.ring()

    async def _next(self) -> AsyncDelivery | None:
        """What to handle next; None at the end."""
        while not self._aborted:
            try:
                return await self._ready.get()
            except asyncio.CancelledError:
                if not await self._goes_on():
                    raise
        return None

    async def _goes_on(self) -> bool:
        """Whether this worker goes on after a cancellation, which a host may have meant for one handler."""
        while _current_task().uncancel():
            pass
        # or for everything, as at the end of asyncio.run, and the run learns of it just now
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return not self._aborted

    async def _handle(self, delivery: AsyncDelivery) -> BaseException | None:
        handler = self._books.routes.find(delivery.timer)
        if handler is None:
            return LookupError(f"no handler for {delivery.timer.timer_id}")
        try:
            await handler(delivery)
        except asyncio.CancelledError as error:
            if _current_task().cancelling():
                raise
            return error
        except BaseException as error:  # noqa: BLE001 - whatever it is, the timer is retried and the task goes on
            return error
        return None

    @asynccontextmanager
    async def settling(self, delivery: AsyncDelivery) -> AsyncIterator[AsyncSession]:
        """A session whose transaction settles the delivery at its end."""
        session: AsyncSession = self._sessions()
        timers = AsyncTimerRepository(session, clock=self._clock)
        try:
            await self._confirm(session, timers, delivery)
            yield session
            await session.flush()
            settlement = await timers.complete(delivery.claim)
            others = await self._extend_others(timers, delivery)
            await session.commit()
            # lost means that the handler itself moved or cancelled it; busy, that it ended the transaction
            delivery.settled = not settlement.busy
            if others is not None:
                self._books.extended(*others)
        finally:
            delivery.locked = False
            await session.close()

    async def _confirm(self, session: AsyncSession, timers: AsyncTimerRepository, delivery: AsyncDelivery) -> None:
        for tries in range(1, pacing.CONFIRM_TRIES + 1):
            try:
                if not session.in_transaction():
                    await session.begin()
                connection = await session.connection(**opening(self._engine.sync_engine))
                await connection.run_sync(renew_plans)
                await timers.confirm(delivery.claim)
            except DBAPIError as error:
                if tries == pacing.CONFIRM_TRIES or not pacing.conflicts(error):
                    raise
                await session.rollback()
                await asyncio.sleep(pacing.outage_pause(1))
            except LeaseLost:
                delivery.taken = True
                raise
            else:
                delivery.locked = True
                return

    async def _extend_others(self, timers: AsyncTimerRepository, delivery: AsyncDelivery) -> tuple[Any, float] | None:
        # nobody else could, while this transaction had the only write lock
        claims = self._books.to_extend(besides=delivery) if self._is_sqlite else []
        return await _driven(self._books.extension(claims), timers) if claims else None

    # -- the database

    async def _transact(self, calls: Generator[Call, Any, T], *, own: bool = True) -> T:
        engine = self._own if own else self._engine
        async with engine.connect() as connection:
            if own:
                await connection.run_sync(prepare)
            result = await _driven(calls, AsyncTimerRepository(connection, clock=self._clock))
            await connection.commit()
            return result

    async def extend(self, claims: list[Claim]) -> None:
        """Extend the leases of these claims."""
        self._books.extended(*await self._transact(self._books.extension(claims)))

    async def _keep(self) -> None:
        tick, failures = pacing.tick(self._settings.lease), 0
        while True:
            with suppress(TimeoutError):
                pause = min(tick, pacing.outage_pause(failures)) if failures else tick
                async with asyncio.timeout(pause):
                    await self._over.wait()
                return
            claims = self._books.to_extend()
            try:
                if claims:
                    await self.extend(claims)
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


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in one
    return task


async def _driven(calls: Generator[Call, Any, T], timers: AsyncTimerRepository) -> T:
    try:
        call = next(calls)
        while True:
            call = calls.send(await getattr(timers, call.method)(*call.args, **call.options))
    except StopIteration as stop:
        value: T = stop.value
        return value
