"""The values that go in and out: ids, instants, entries, and the text that each is stored as on the SQLite family.

That text is the one which Aion's crate ``aion-store-libsql`` writes into the same table, byte for byte, so that both
programs can serve one file: a workflow id is the UUID as a JSON string, a timer id is a JSON object with one key, an
instant is RFC 3339 in UTC with nine digits of fraction. The order of these texts is the order of timers everywhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, NoReturn
from uuid import UUID, SafeUUID

from aion_timers.errors import InvalidInputError

MAX_ENCODED_TIMER_ID: Final = 1024
"""Bytes of encoded text that a timer id may have when it is written. PostgreSQL's index holds little more."""

_LAST_ANONYMOUS: Final = 2**64 - 1
_SHORT: Final = 64
_MICROSECOND: Final = timedelta(microseconds=1)
_LATEST: Final = datetime.max.replace(tzinfo=UTC)
_LATEST_STORED: Final = "9999-12-31T23:59:59.999999999Z"
# a text has a form if it looks like this once each digit is a zero: three times as fast as a regular expression
_INSTANT: Final = b"0000-00-00T00:00:00.000000000Z"
_UUID: Final = b'"00000000-0000-0000-0000-000000000000"'
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_HEX_DIGITS: Final = bytes.maketrans(b"123456789abcdef", b"000000000000000")
# adding a difference to one of these sets or drops the time zone, in a tenth of the time of replace()
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - the point of it
_ANONYMOUS: Final = re.compile(r'\{"Anonymous":(0|[1-9][0-9]{0,19})\}')

_json_string = json.JSONEncoder(ensure_ascii=False).encode


def _invalid(argument: str, value: object, problem: str, cure: str) -> NoReturn:
    raise InvalidInputError(argument, value, problem, cure)


class NotCanonicalError(ValueError):
    """Stored text that is not exactly what the encodings of this module write."""


@dataclass(frozen=True, slots=True, repr=False)
class TimerId:
    """Which timer of its workflow: a name, or a position in the workflow's sequence of anonymous timers.

    Ids sort by their encoded text, as timers do: ``"a!"`` before ``"a"``, every anonymous one before every named one,
    10 before 2. No Unicode normalisation takes place: two spellings of one word are two names.

    Raises:
        InvalidInputError: the name is empty or holds a lone surrogate, or the number is below 0 or above 2**64-1.
    """

    value: str | int
    _encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        # the members of an enumeration are written as what they are, not as what their class shows
        value = str.__str__(self.value) if isinstance(self.value, str) else int(self.value)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "_encoded", _encoded(value))

    def _check(self) -> None:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, str | int):
            _invalid(
                "timer_id",
                value,
                f"a value of type {type(value).__name__} is no timer id",
                "pass a name or a sequence position",
            )
        if isinstance(value, int):
            if not 0 <= value <= _LAST_ANONYMOUS:
                _invalid("timer_id", value, "out of range", "a sequence position is 0 to 2**64-1")
            return
        if not value:
            _invalid("timer_id", value, "the name is empty", "pass a name of at least one character")
        try:
            value.encode()
        except UnicodeEncodeError:
            _invalid("timer_id", value, "the name holds a lone surrogate, which no encoding has", "remove it")

    @classmethod
    def named(cls, name: str) -> TimerId:
        """The timer of that name."""
        if not isinstance(name, str):
            _invalid(
                "name",
                name,
                f"a value of type {type(name).__name__} is no name",
                "pass a str, or use TimerId.anonymous()",
            )
        return cls(name)

    @classmethod
    def anonymous(cls, position: int) -> TimerId:
        """The anonymous timer at that position, 0 to 2**64-1."""
        if isinstance(position, bool) or not isinstance(position, int):
            _invalid("position", position, f"a value of type {type(position).__name__} is no position", "pass an int")
        return cls(position)

    @classmethod
    def of(cls, value: TimerId | str | int) -> TimerId:
        """The id that a plain ``str`` (a name), ``int`` (a position) or ``TimerId`` stands for."""
        if type(value) is str and len(value) <= _SHORT:
            return _short_name(value)
        return value if isinstance(value, TimerId) else cls(value)

    @property
    def is_named(self) -> bool:
        """Whether the id is a name; else it is a sequence position."""
        return isinstance(self.value, str)

    def __lt__(self, other: object) -> bool:
        return self._encoded < other._encoded if isinstance(other, TimerId) else NotImplemented

    def __str__(self) -> str:
        return f"timer:{'named' if self.is_named else 'anonymous'}:{self.value}"

    def __repr__(self) -> str:
        return f"TimerId.{'named' if self.is_named else 'anonymous'}({self.value!r})"


# an application has few names, and checks each of them once
_short_name: Final = lru_cache(maxsize=1024)(TimerId)


def _encoded(value: str | int) -> str:
    return f'{{"Named":{_json_string(value)}}}' if isinstance(value, str) else f'{{"Anonymous":{value}}}'


def _stored_id(value: str | int) -> TimerId:
    # what another program stored may be what we refuse to write: an empty name
    made = object.__new__(TimerId)
    object.__setattr__(made, "value", value)
    object.__setattr__(made, "_encoded", _encoded(value))
    return made


@dataclass(frozen=True, slots=True, init=False)
class TimerEntry:
    """A timer: it is due from ``fire_at`` on, which is kept in UTC whatever zone was given.

    An entry that was read from a row with nine digits of fraction shows the next microsecond, so that it never fires
    early; it keeps the stored instant privately, and order and paging use that. Entries sort by instant, workflow id
    and timer id, as every database sorts them.

    Raises:
        InvalidInputError: no UUID, no valid timer id, or ``fire_at`` is no timezone-aware datetime up to year 9999.
    """

    workflow_id: UUID
    timer_id: TimerId
    fire_at: datetime
    _stored: str | None = field(init=False, repr=False, compare=False)

    def __init__(self, workflow_id: UUID, timer_id: TimerId | str | int, fire_at: datetime) -> None:
        _put_workflow_id(self, check_workflow_id(workflow_id))
        _put_timer_id(self, TimerId.of(timer_id))
        _put_fire_at(self, utc("fire_at", fire_at))
        _put_stored(self, None)

    @property
    def stored_instant(self) -> str:
        """The instant as the SQLite family stores it, to the nanosecond."""
        return self._stored or encode_instant(self.fire_at)

    def _order(self) -> tuple[str, str, str]:
        return (self.stored_instant, str(self.workflow_id), encode_timer_id(self.timer_id))

    def __lt__(self, other: object) -> bool:
        return self._order() < other._order() if isinstance(other, TimerEntry) else NotImplemented


def check_workflow_id(workflow_id: UUID) -> UUID:
    """The workflow id, if it is one.

    Raises:
        InvalidInputError: it is no `uuid.UUID`.
    """
    if workflow_id is None:
        _invalid(
            "workflow_id", workflow_id, "there is none", "flush the object first, or give it its id when it is made"
        )
    if not isinstance(workflow_id, UUID):
        _invalid("workflow_id", workflow_id, "not a uuid.UUID", "pass one, for example uuid.UUID(text)")
    # a subclass may show itself in another form
    return workflow_id if type(workflow_id) is UUID else UUID(int=workflow_id.int)


# the slots themselves: a frozen class's own way, object.__setattr__, looks each of them up
_put_workflow_id: Final = TimerEntry.__dict__["workflow_id"].__set__
_put_timer_id: Final = TimerEntry.__dict__["timer_id"].__set__
_put_fire_at: Final = TimerEntry.__dict__["fire_at"].__set__
_put_stored: Final = TimerEntry.__dict__["_stored"].__set__
_put_int: Final = UUID.__dict__["int"].__set__
_put_is_safe: Final = UUID.__dict__["is_safe"].__set__
_new: Final = object.__new__


def utc(argument: str, value: datetime, *, up: bool = True) -> datetime:
    """The instant in UTC, to the microsecond.

    Args:
        argument: its name, for the error.
        value: the instant.
        up: whether a finer one (a subclass with ``nanosecond``) is rounded up, so that a timer is not early; rounded
            down it is the latest instant that is surely over.

    Raises:
        InvalidInputError: not a datetime, naive, or past year 9999 (before year 1) in UTC or by rounding.
    """
    if not isinstance(value, datetime):
        _invalid(
            argument,
            value,
            f"a value of type {type(value).__name__} is no instant",
            "pass a datetime with a time zone, as in datetime.now(UTC)",
        )
    if value.tzinfo is UTC and type(value) is datetime:
        return value
    if value.utcoffset() is None:
        _invalid(
            argument,
            value,
            "the datetime is naive, so it names no instant",
            "give it a time zone, as in value.replace(tzinfo=UTC)",
        )
    finer = getattr(value, "nanosecond", 0)
    try:
        moved = value.astimezone(UTC)
        plain = datetime(
            moved.year, moved.month, moved.day, moved.hour, moved.minute, moved.second, moved.microsecond, tzinfo=UTC
        )
        return plain + _MICROSECOND if finer and up else plain
    except OverflowError:
        _invalid(argument, value, "outside the years 1 to 9999 in UTC", "pass an instant between them")


@dataclass(frozen=True, slots=True)
class Claim:
    """A due timer that its claimer alone may fire, until its lease runs out or somebody moves or cancels it.

    Attributes:
        timer: the timer.
        token: the fence: only who has it settles the claim.
        attempt: how often the timer has been claimed since it was scheduled, 1 for the first time.
    """

    timer: TimerEntry
    token: UUID
    attempt: int


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of claims that were to be settled.

    Attributes:
        done: those that were.
        busy: those whose row another transaction has locked, or changed at this very moment: try again.
        lost: those that hold their timer no more; nothing was changed.
    """

    done: tuple[Claim, ...]
    busy: tuple[Claim, ...]
    lost: tuple[Claim, ...]


# -- what the SQLite family stores ---------------------------------------------------------------------------------


def encode_workflow_id(workflow_id: UUID) -> str:
    """The UUID as JSON text, quotes included."""
    # two thirds of the time of the UUID's own text
    digits = workflow_id.int.to_bytes(16).hex()
    return f'"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"'


def encode_timer_id(timer_id: TimerId) -> str:
    """Compact JSON, not ASCII-escaped, with control characters escaped as JSON does."""
    return timer_id._encoded  # noqa: SLF001 - made with the id, and read for each row


def encode_instant(instant: datetime) -> str:
    """RFC 3339 with nine digits and ``Z``, of an instant in UTC."""
    return (_NAIVE_EPOCH + (instant - _EPOCH)).isoformat("T", "microseconds") + "000Z"


def encode_as_of(as_of: datetime) -> str:
    """The greatest stored text that is due at ``as_of``."""
    # the last microsecond stands for the nanoseconds after it too: they have no later one to be rounded up to
    return _LATEST_STORED if as_of == _LATEST else encode_instant(as_of)


def decode_workflow_id(text: str) -> UUID:
    """The inverse of `encode_workflow_id`; raises `NotCanonicalError` for any other text."""
    return _decode_workflow_id(text.encode(errors="replace"))


def _decode_workflow_id(stored: bytes) -> UUID:
    if stored.translate(_HEX_DIGITS) != _UUID:
        raise NotCanonicalError(stored)
    # checked already, so filled in as unpickling does; to have the text read again would take twice as long
    made = _new(UUID)
    _put_int(made, int(stored[1:-1].replace(b"-", b""), 16))
    _put_is_safe(made, SafeUUID.unknown)
    return made


def decode_timer_id(text: str) -> TimerId:
    """The inverse of `encode_timer_id`; raises `NotCanonicalError` for any other text."""
    # an application has few names; a text of another program can be of any length, so long ones are not kept
    return _decode_short_timer_id(text) if len(text) <= _SHORT else _decode_timer_id(text)


def _decode_timer_id(text: str) -> TimerId:
    if text.startswith('{"Named":"') and text.endswith('"}', 10):
        name = text[10:-2]
        if name.isprintable() and '"' not in name and "\\" not in name:
            return _stored_id(name)
    elif (number := _ANONYMOUS.fullmatch(text)) is not None and int(number[1]) <= _LAST_ANONYMOUS:
        return _stored_id(int(number[1]))
    try:
        timer_id = _stored_id(json.loads(text)["Named"])
        if encode_timer_id(timer_id) == text:
            return timer_id
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise NotCanonicalError(text)


_decode_short_timer_id: Final = lru_cache(maxsize=1024)(_decode_timer_id)


def decode_instant(text: str) -> datetime:
    """The first microsecond that is not before the stored instant; raises `NotCanonicalError` for any other text."""
    return _decode_instant(text.encode(errors="replace"), text)


def _decode_instant(stored: bytes, text: str) -> datetime:
    if stored.translate(_DIGITS) != _INSTANT or text[11:13] > "23":
        raise NotCanonicalError(text)
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise NotCanonicalError(text) from None
    if text[26:29] == "000" or instant == _LATEST:
        return instant
    return instant + _MICROSECOND


def decode_row(workflow_id: bytes, timer_id: bytes, fire_at: bytes) -> TimerEntry:
    """The entry that a row of the SQLite family holds, read as bytes.

    Raises:
        NotCanonicalError: the row is not exactly what the encodings of this module write.
    """
    try:
        # decoded text is valid already; checking each row again would double the cost of a read
        made = _new(TimerEntry)
        _put_workflow_id(made, _decode_workflow_id(workflow_id))
        _put_timer_id(made, decode_timer_id(timer_id.decode()))
        stored = fire_at.decode()
        _put_fire_at(made, _decode_instant(fire_at, stored))
        _put_stored(made, None if stored.endswith("000Z") else stored)
    except (UnicodeDecodeError, AttributeError) as error:
        raise NotCanonicalError((workflow_id, timer_id, fire_at)) from error
    return made


def decode_columns(workflow_id: UUID, timer_id: str, fire_at: datetime) -> TimerEntry:
    """The entry that a row of PostgreSQL holds; ``fire_at`` is naive and means UTC.

    Raises:
        NotCanonicalError: the timer id is not exactly what `encode_timer_id` writes.
    """
    made = _new(TimerEntry)
    _put_workflow_id(made, workflow_id)
    _put_timer_id(made, _decode_short_timer_id(timer_id) if len(timer_id) <= _SHORT else _decode_timer_id(timer_id))
    _put_fire_at(made, _EPOCH + (fire_at - _NAIVE_EPOCH))
    _put_stored(made, None)
    return made
