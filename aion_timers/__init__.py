"""Durable timers in the database that an application already has: libSQL or PostgreSQL, through SQLAlchemy.

Importing this package registers its libSQL dialects as ``sqlite+libsql`` and ``sqlite+aiolibsql``, and does nothing
else.
"""

from aion_timers import libsql
from aion_timers.dispatcher import AsyncDelivery, AsyncDispatcher, Backoff, Delivery, Dispatcher
from aion_timers.engine import prepare_sqlite
from aion_timers.errors import (
    DowngradeRefusedError,
    ForeignRowError,
    InvalidInputError,
    LeaseLost,
    MigrationError,
    NotMigratedError,
    PoolExhaustedError,
    StoreUnavailableError,
    TimerStoreError,
    UnsafeEngineError,
    UnsupportedBindError,
)
from aion_timers.repository import AsyncTimerRepository, TimerRepository
from aion_timers.schema import Timer
from aion_timers.statements import IfExists
from aion_timers.values import Claim, Settlement, TimerEntry, TimerId

__all__ = [
    "AsyncDelivery",
    "AsyncDispatcher",
    "AsyncTimerRepository",
    "Backoff",
    "Claim",
    "Delivery",
    "Dispatcher",
    "DowngradeRefusedError",
    "ForeignRowError",
    "IfExists",
    "InvalidInputError",
    "LeaseLost",
    "MigrationError",
    "NotMigratedError",
    "PoolExhaustedError",
    "Settlement",
    "StoreUnavailableError",
    "Timer",
    "TimerEntry",
    "TimerId",
    "TimerRepository",
    "TimerStoreError",
    "UnsafeEngineError",
    "UnsupportedBindError",
    "prepare_sqlite",
]

libsql.register()
