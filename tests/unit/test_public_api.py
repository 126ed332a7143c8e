"""The public names, the likeness of the two repositories, and what an import does."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest

import aion_timers
from aion_timers import (
    AsyncDelivery,
    AsyncDispatcher,
    AsyncTimerRepository,
    Delivery,
    Dispatcher,
    ForeignRowError,
    InvalidInputError,
    NotMigratedError,
    TimerRepository,
    TimerStoreError,
    UnsupportedBindError,
)


def test_all_lists_every_public_name_in_order() -> None:
    submodules = {
        "cli",
        "dispatcher",
        "doctor",
        "engine",
        "errors",
        "inventory",
        "libsql",
        "migrate",
        "repository",
        "schema",
        "statements",
        "testing",
        "values",
        "wakeup",
    }
    public = {name for name in vars(aion_timers) if not name.startswith("_")} - submodules
    assert sorted(aion_timers.__all__) == list(aion_timers.__all__) == sorted(public)


def surface(cls: type) -> dict[str, Any]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if name[0] != "_"
    }


def test_sync_and_async_differ_by_the_word_await() -> None:
    assert surface(TimerRepository) == surface(AsyncTimerRepository)
    assert all(
        inspect.iscoroutinefunction(getattr(AsyncTimerRepository, name)) for name in surface(AsyncTimerRepository)
    )


def test_the_dispatchers_and_their_deliveries_differ_by_the_word_await() -> None:
    for plain, awaited, methods in (
        (Dispatcher, AsyncDispatcher, {"run", "run_due", "stop"}),
        (Delivery, AsyncDelivery, {"extend", "transaction"}),
    ):
        assert set(surface(plain)) == set(surface(awaited)) == methods
    plain_options, awaited_options = (
        {name: (option.kind, option.default) for name, option in inspect.signature(cls).parameters.items()}
        for cls in (Dispatcher, AsyncDispatcher)
    )
    assert plain_options == awaited_options


def test_every_error_of_ours_has_one_base() -> None:
    errors = [getattr(aion_timers, name) for name in aion_timers.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, aion_timers.TimerStoreError) for error in errors)


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_an_import_registers_the_dialects_and_loads_no_alembic() -> None:
    program = """
import sys, aion_timers
from sqlalchemy import create_engine
print(sorted({"alembic", "asyncpg", "psycopg", "aiosqlite"} & set(sys.modules)))
print(type(create_engine("sqlite+libsql://").dialect).__module__.partition(".dialect")[0])
"""
    assert run(program).split("\n")[:2] == ["[]", "aion_timers.libsql"]


def test_the_sync_repository_needs_no_greenlet() -> None:
    program = """
import sys
sys.modules["greenlet"] = None
from sqlalchemy import create_engine
from aion_timers import AsyncTimerRepository, TimerRepository, UnsupportedBindError, migrate
import datetime, uuid
engine = create_engine("sqlite+libsql://")
with engine.connect() as connection:
    migrate.upgrade(connection)
    print(TimerRepository(connection).schedule(uuid.uuid4(), "a", datetime.datetime.now(datetime.UTC)))
try:
    AsyncTimerRepository(None)
except UnsupportedBindError as error:
    print(error)
"""
    first, second = run(program).splitlines()
    assert first == "True"
    assert "aion-timers[asyncio]" in second


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("limit", 0, "too few", "pass more"),
        UnsupportedBindError("no", "yes"),
        ForeignRowError((b"a",), "foreign", "leave it"),
        NotMigratedError("no table", "migrate"),
    ],
)
def test_errors_reach_another_process_whole(error: TimerStoreError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
