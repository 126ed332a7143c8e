"""One face for `Dispatcher` and `AsyncDispatcher`: handlers of a contract are written once, as plain functions."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import URL, Engine, event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.util import await_only, greenlet_spawn

from aion_timers import AsyncDispatcher, AsyncTimerRepository, Dispatcher, TimerRepository
from tests.conftest import open_engine
from tests.store import ASYNC_DRIVERS, Blocking

LIMIT = 60.0  # seconds that nothing takes, however busy the machine is


class Awaiting(Blocking):
    """An async object whose methods await their result where they are called, in a greenlet of SQLAlchemy's."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def _wait(self, awaitable: Any) -> Any:
        return await_only(awaitable)


class Fired:
    """A delivery of either kind, as the handlers of tests see it."""

    def __init__(self, delivery: Any, engine: Any, *, is_async: bool) -> None:
        self.raw = delivery
        self.name = delivery.timer.timer_id.value
        self._engine = engine
        self._is_async = is_async

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def extend(self) -> None:
        """Extend the lease."""
        if self._is_async:
            await_only(self.raw.extend())
        else:
            self.raw.extend()

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """The delivery's transaction."""
        if not self._is_async:
            with self.raw.transaction() as session:
                yield session
            return
        manager = self.raw.transaction()
        session = await_only(manager.__aenter__())
        try:
            yield Awaiting(session)
        except BaseException:
            if not await_only(manager.__aexit__(*sys.exc_info())):
                raise
        else:
            await_only(manager.__aexit__(None, None, None))

    @contextmanager
    def session(self) -> Iterator[Any]:
        """A session of the handler's own, which has nothing to do with the delivery."""
        session: Any = Awaiting(async_sessionmaker(self._engine)()) if self._is_async else sessionmaker(self._engine)()
        try:
            yield session
            session.commit()
        finally:
            session.close()

    def timers(self, session: Any) -> Any:
        """The repository of a session."""
        return Awaiting(AsyncTimerRepository(session.wrapped)) if self._is_async else TimerRepository(session)

    def sleep(self, seconds: float) -> None:
        """Let time go by, other handlers work, and leases be extended."""
        if self._is_async:
            await_only(asyncio.sleep(seconds))
        else:
            time.sleep(seconds)

    def wait_for(self, condition: Callable[[], Any], seconds: float = LIMIT) -> None:
        """Sleep until something is so."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "waited in vain"
            self.sleep(0.005)


Handler = Callable[[Fired], object]


class Running:
    """A dispatcher that runs in a thread."""

    def __init__(self) -> None:
        self.dispatcher: Any = None
        self.errors: list[BaseException] = []
        self.result: Any = None
        self.thread: threading.Thread
        self.ready = threading.Event()

    def stop(self) -> None:
        """Stop it, and wait for its end."""
        self.dispatcher.stop()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive(), "the dispatcher does not stop"


class Dispatchers:
    """Makes dispatchers on a database, each with an engine of its own."""

    def __init__(self, backend: str, url: URL, **engine_options: Any) -> None:
        self.is_async = backend in ASYNC_DRIVERS
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.url = url
        self.engine_options = engine_options
        self.on_engine: Callable[[Engine], None] | None = None

    def make(self, engine: Any, handlers: Any, **options: Any) -> Any:
        """A dispatcher of the backend's kind."""
        if isinstance(handlers, dict):
            handlers = {name: self._adapted(engine, handler) for name, handler in handlers.items()}
        else:
            handlers = self._adapted(engine, handlers)
        if self.is_async:
            return AsyncDispatcher(async_sessionmaker(engine), handlers, **options)
        return Dispatcher(sessionmaker(engine), handlers, **options)

    def _adapted(self, engine: Any, handler: Handler) -> Any:
        if not self.is_async:
            return lambda delivery: handler(Fired(delivery, engine, is_async=False))

        async def run(delivery: Any) -> None:
            await greenlet_spawn(handler, Fired(delivery, engine, is_async=True))

        return run

    def _run(self, running: Running, method: str, handlers: Any, options: dict[str, Any]) -> None:
        engine: Any = open_engine(self.url, **self.engine_options)
        if self.on_engine is not None:
            self.on_engine(getattr(engine, "sync_engine", engine))
        left_out: list[int] = []

        async def run_async() -> None:
            try:
                running.dispatcher = self.make(engine, handlers, **options)
                running.ready.set()
                running.result = await getattr(running.dispatcher, method)()
            finally:
                # before it is disposed of, which makes a new pool
                left_out.append(engine.pool.checkedout())
                await engine.dispose()

        try:
            if self.is_async:
                asyncio.run(run_async())
                return
            running.dispatcher = self.make(engine, handlers, **options)
            running.ready.set()
            running.result = getattr(running.dispatcher, method)()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            running.errors.append(error)
        finally:
            running.ready.set()
            if not self.is_async:
                left_out.append(engine.pool.checkedout())
                engine.dispose()
            if any(left_out):
                running.errors.append(AssertionError("a connection was not given back"))

    def run_due(self, handlers: Any, **options: Any) -> int:
        """Fire what is due now."""
        running = Running()
        self._run(running, "run_due", handlers, options)
        if running.errors:
            raise running.errors[0]
        return int(running.result)

    @contextmanager
    def running(self, handlers: Any, **options: Any) -> Iterator[Running]:
        """A dispatcher that runs in a thread until the end of the block."""
        running = Running()
        # a daemon, so that one that does not stop fails its test, and does not keep the tests from ending
        running.thread = threading.Thread(target=self._run, args=(running, "run", handlers, options), daemon=True)
        running.thread.start()
        running.ready.wait(LIMIT)
        try:
            yield running
        except BaseException as error:
            # often the cause
            error.add_note(f"the dispatcher ended with {running.errors}" if running.errors else "the dispatcher ran")
            raise
        finally:
            if running.dispatcher is not None:
                running.stop()
            running.thread.join(LIMIT)
        if running.errors:
            raise running.errors[0]


def wait_until(condition: Callable[[], Any], seconds: float = LIMIT) -> None:
    """Sleep in the test's thread until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


class Counted:
    """Counts what an engine executes."""

    def __init__(self) -> None:
        self.statements = 0

    def __call__(self, engine: Engine) -> None:
        """Count from now on."""
        event.listen(engine, "before_cursor_execute", self._count)

    def _count(self, *_: Any) -> None:
        self.statements += 1

    def rate(self, seconds: float) -> float:
        """Statements in a second, as the next few show."""
        before, began = self.statements, time.monotonic()
        time.sleep(seconds)
        return (self.statements - before) / (time.monotonic() - began)

    def wait_for_sleep(self) -> None:
        """Wait until the dispatcher has asked what there is, and asks no more."""
        wait_until(lambda: self.statements and self.rate(0.2) == 0)


class Standing:
    """A clock that a test sets."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """What time it is."""
        return self.now
