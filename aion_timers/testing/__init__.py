"""For tests of applications that use timers: a clock that stands, and what is due fired in order as time moves along.

::

    clock = FakeClock(datetime(2026, 1, 1, tzinfo=UTC))
    dispatcher = Dispatcher(sessions, handlers, clock=clock)
    ...
    run_due(dispatcher, until=clock.now() + timedelta(days=3))

The rows, the transactions and the leases are real. The fixtures for pytest are in `aion_timers.testing.pytest_plugin`;
nothing else here needs pytest.
"""

from aion_timers.errors import NoProgressError
from aion_timers.testing.clock import FakeClock
from aion_timers.testing.stepping import Fired, run_due

__all__ = ["FakeClock", "Fired", "NoProgressError", "run_due"]
