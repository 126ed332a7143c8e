"""Every error that the library raises of its own accord.

::

    TimerStoreError
     +-- InvalidInputError           an argument that cannot be stored or asked for (also a ValueError)
     +-- UnsupportedBindError        an object or a database that the repository cannot work on (also a TypeError)
     |    +-- UnsafeEngineError      an engine whose driver would lose updates or savepoints
     +-- ForeignRowError             a row that another program wrote in a form of its own
     +-- LeaseLost                   somebody else may fire the timer now, or it was moved or cancelled
     +-- NoProgressError             a test's run_due() would not come to an end
     +-- StoreUnavailableError       the database cannot be reached or written
     |    +-- PoolExhaustedError     no connection came free in time
     +-- MigrationError              the schema is not what this version works with
          +-- NotMigratedError       the table, or a part of it, is missing
          +-- DowngradeRefusedError  a downgrade that would drop timers

Errors of SQLAlchemy that none of these explains better pass through unchanged, so a host's handling of deadlocks,
lost connections and retryable conflicts goes on working. Where one of ours stands for another error, that one is
its ``__cause__``.
"""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut to a length that fits into a line of a log."""
    return _SHORT.repr(value)


class TimerStoreError(Exception):
    """The base of every error of this library. All of them can be pickled."""

    def __reduce__(self) -> tuple[object, ...]:
        # by default an exception is made again from its message, which is not what ours are made from
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[TimerStoreError], args: tuple[object, ...], state: dict[str, object]) -> TimerStoreError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class _CuredError(TimerStoreError):
    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(f"{problem}; {cure}")
        self.cure = cure


class InvalidInputError(TimerStoreError, ValueError):
    """An argument that cannot be stored or asked for.

    Attributes:
        argument: the argument's name.
        value: what was given.
        cure: what to pass instead.
    """

    def __init__(self, argument: str, value: object, problem: str, cure: str) -> None:
        super().__init__(f"{argument} {shown(value)}: {problem}; {cure}")
        self.argument = argument
        self.value = value
        self.cure = cure


class UnsupportedBindError(_CuredError, TypeError):
    """An object or a database that the repository cannot work on.

    Attributes:
        cure: what to pass instead.
    """


class UnsafeEngineError(UnsupportedBindError):
    """An engine whose driver, as it is set up, would lose updates or savepoints."""


class ForeignRowError(TimerStoreError):
    """A row that another program wrote in a form of its own stands where a timer of ours should go or come from.

    The row stays as it is. Attributes:
        row: the stored texts of its three columns, as far as they are known.
    """

    def __init__(self, row: tuple[object, ...], problem: str, cure: str) -> None:
        super().__init__(f"row ({', '.join(map(shown, row))}): {problem}; {cure}")
        self.row = row
        self.cure = cure


class LeaseLost(TimerStoreError):  # noqa: N818 - an outcome to be reckoned with, and no mistake
    """The claim does not hold its timer any more: it was moved, cancelled, settled, or claimed by somebody else.

    Attributes:
        claim: the claim.
    """

    def __init__(self, claim: object) -> None:
        super().__init__(f"the lease is lost: {claim!r}; roll back and leave the timer to whoever has it now")
        self.claim = claim


class NoProgressError(_CuredError):
    """`aion_timers.testing.run_due` would not come to an end, or gets no further.

    Attributes:
        timer: the timer that fires again and again, or cannot be had, if it is known.
        cure: what to do about it.
    """

    def __init__(self, timer: object, problem: str, cure: str) -> None:
        super().__init__(problem, cure)
        self.timer = timer


class StoreUnavailableError(_CuredError):
    """The database cannot be reached or written. The driver's error is the cause.

    Attributes:
        cure: what to do about it.
    """


class PoolExhaustedError(StoreUnavailableError):
    """No connection of the engine's pool came free in time."""


class MigrationError(_CuredError):
    """The schema is not what this version works with.

    Attributes:
        cure: the command that mends it, or what to do by hand.
    """


class NotMigratedError(MigrationError):
    """The table ``timers``, or a part of it, is missing."""


class DowngradeRefusedError(MigrationError):
    """A downgrade that would drop timers, refused; nothing was changed."""
