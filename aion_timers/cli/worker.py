"""The worker that ``aion-timers run`` starts: which handlers it has, and how it ends."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aion_timers.cli.database import USAGE, CommandError
from aion_timers.dispatcher import AsyncDispatcher, Dispatcher

if TYPE_CHECKING:
    from types import FrameType

    from aion_timers.cli.database import Database

AnyDispatcher: TypeAlias = Dispatcher | AsyncDispatcher

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_OWN_CONNECTIONS: Final = 2


def load(name: str) -> Any:  # noqa: ANN401 - whatever stands there
    """What ``module:attribute`` names; a module may stand in the directory in which the command was given.

    Raises:
        CommandError: there is no such module or attribute, or the module fails when it is imported.
    """
    module_name, _, attributes = name.partition(":")
    if not module_name or not attributes:
        raise CommandError(f"{name!r} names no handler; write module:attribute, as in shop.timers:handlers", USAGE)
    if (here := str(os.getcwd())) not in sys.path:  # noqa: PTH109 - as sys.path has it
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        cure = "correct the name, or run where the module can be imported (PYTHONPATH)"
        raise CommandError(f"the module {module_name!r} cannot be imported ({what}); {cure}", USAGE) from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            cure = "correct the part after the colon"
            raise CommandError(f"the module {module_name!r} has no {attributes!r}; {cure}", USAGE) from None
    return found


def is_dispatcher(handlers: object) -> bool:
    """Whether it is a ready dispatcher, with an engine and settings of its own."""
    return isinstance(handlers, AnyDispatcher)


def is_async(handlers: object) -> bool:
    """Whether a handler, or the first of a mapping, is a coroutine function."""
    if isinstance(handlers, Mapping):
        handlers = next(iter(handlers.values()), None)
    call = getattr(handlers, "__call__", None)  # noqa: B004 - not whether, but of which kind
    return inspect.iscoroutinefunction(handlers) or inspect.iscoroutinefunction(call)


def run(handlers: Any, database: Database | None, settings: dict[str, Any], *, once: bool) -> int | None:  # noqa: ANN401 - whatever the user named
    """Fire timers until the first SIGTERM or SIGINT, or once what is due; how many handlers ran then.

    Raises:
        InvalidInputError: the handlers or the settings cannot be.
    """
    if isinstance(handlers, AsyncDispatcher):
        return asyncio.run(_run_async(handlers, once=once))
    if isinstance(handlers, Dispatcher):
        return _run(handlers, once=once)
    assert database is not None  # noqa: S101 - a command without a ready dispatcher has named one
    connections = settings.get("concurrency", 1) + _OWN_CONNECTIONS
    if is_async(handlers):
        return asyncio.run(_make_and_run_async(handlers, database, settings, connections, once=once))
    engine = database.engine(poolclass=None, pool_size=connections)
    try:
        return _run(Dispatcher(engine, handlers, **settings), once=once)
    finally:
        engine.dispose()


async def _make_and_run_async(
    handlers: Any,  # noqa: ANN401 - whatever the user named
    database: Database,
    settings: dict[str, Any],
    connections: int,
    *,
    once: bool,
) -> int | None:
    engine = database.async_engine(pool_size=connections)
    try:
        return await _run_async(AsyncDispatcher(engine, handlers, **settings), once=once)
    finally:
        await engine.dispose()


def _run(dispatcher: Dispatcher, *, once: bool) -> int | None:
    with _Stopping(dispatcher.stop):
        if once:
            return dispatcher.run_due()
        dispatcher.run()
        return None


async def _run_async(dispatcher: AsyncDispatcher, *, once: bool) -> int | None:
    loop = asyncio.get_running_loop()
    with _Stopping(lambda: loop.call_soon_threadsafe(dispatcher.stop)):
        if once:
            return await dispatcher.run_due()
        await dispatcher.run()
        return None


class _Stopping:
    """Turns the first signal into an orderly stop; the second one kills."""

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self._stop()
