"""`TimerRepository` and `AsyncTimerRepository`: timers in the caller's own transaction.

Each operation is written once, as a generator that yields statements with their parameters and is sent their results.
The two classes differ in how they execute a statement, which is to say by the word ``await``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, Final, NamedTuple, ParamSpec, TypeAlias, TypeVar, get_args
from uuid import UUID, uuid4

from sqlalchemy import Connection, CursorResult, Executable, TwoPhaseTransaction
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session

from aion_timers import statements
from aion_timers.engine import connecting, explained, is_dependable, require_dependable
from aion_timers.errors import ForeignRowError, InvalidInputError, LeaseLost, UnsupportedBindError, shown
from aion_timers.schema import SQLITE, Timer
from aion_timers.statements import IfExists, Name, Parameters, Row, Settle
from aion_timers.values import (
    MAX_ENCODED_TIMER_ID,
    Claim,
    NotCanonicalError,
    Settlement,
    TimerEntry,
    TimerId,
    check_workflow_id,
    encode_timer_id,
    utc,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

Clock: TypeAlias = Callable[[], datetime]
Key: TypeAlias = tuple[UUID, TimerId]

T = TypeVar("T")
P = ParamSpec("P")
Operation: TypeAlias = Generator[tuple[Executable, Parameters], CursorResult[Any], T]
Forget: TypeAlias = Callable[[Iterable[Key]], None]

_CHUNK: Final = 1000
_MOST_ROWS: Final = 2**63 - 1
_MOST_REPORTED: Final = 10_000
_MOST_IN_FLIGHT: Final = 512
_LONGEST_LEASE: Final = timedelta(days=366)

_log = logging.getLogger(__name__)
_reported: set[int] = set()


# -- arguments --------------------------------------------------------------------------------------------------------


def _key(workflow_id: UUID, timer_id: TimerId | str | int) -> Key:
    return check_workflow_id(workflow_id), TimerId.of(timer_id)


def _writable(timer: TimerEntry) -> TimerEntry:
    if not isinstance(timer, TimerEntry):
        raise InvalidInputError(
            "entries", timer, f"a value of type {type(timer).__name__} is no TimerEntry", "pass TimerEntry objects"
        )
    encoded = encode_timer_id(timer.timer_id)
    # a character takes four bytes at most
    if len(encoded) > MAX_ENCODED_TIMER_ID // 4 and (size := len(encoded.encode())) > MAX_ENCODED_TIMER_ID:
        raise InvalidInputError(
            "timer_id",
            timer.timer_id.value,
            f"the name takes {size:,} bytes when it is encoded",
            f"shorten it: {MAX_ENCODED_TIMER_ID:,} bytes are the most that every database takes",
        )
    return timer


def _policy(if_exists: IfExists) -> IfExists:
    if if_exists not in get_args(IfExists):
        raise InvalidInputError("if_exists", if_exists, "unknown", f"pass one of {', '.join(get_args(IfExists))}")
    return if_exists


def _at_most(limit: int) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _MOST_ROWS:
        raise InvalidInputError("limit", limit, "no number of timers", "pass an int from 1 on")
    return limit


def _names(names: Iterable[str] | None) -> Sequence[str] | None:
    if names is None:
        return None
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise InvalidInputError(
            "names", names, "not a collection of names", "pass a list, as in ['reminder', 'retry-*']"
        )
    return [TimerId.named(name).value for name in names]  # type: ignore[misc] # a named id's value is its name


def _entries(entries: Iterable[TimerEntry]) -> Iterable[TimerEntry]:
    if not isinstance(entries, Iterable):
        raise InvalidInputError(
            "entries", entries, "not a collection of entries", "pass a list, or a generator of them"
        )
    checked = map(_writable, entries)
    # all of a collection before the first of them is written, those of a generator as they come
    return list(checked) if isinstance(entries, Sequence) else checked


def _checked_clock(clock: Clock | None) -> Clock | None:
    if clock is not None and not callable(clock):
        raise InvalidInputError("clock", clock, "not callable", "pass a function, as in lambda: datetime.now(UTC)")
    return clock


def _lease(lease: timedelta) -> timedelta:
    if not isinstance(lease, timedelta) or not timedelta(milliseconds=1) <= lease <= _LONGEST_LEASE:
        raise InvalidInputError("lease", lease, "no length of a lease", "pass a timedelta of a millisecond to a year")
    return lease


def _claims(claims: Sequence[Claim]) -> Sequence[Claim]:
    for claim in claims:
        if not isinstance(claim, Claim):
            raise InvalidInputError("claims", claim, f"a {type(claim).__name__} is no Claim", "pass what claim() gave")
    return claims


def _page(after: TimerEntry | None) -> TimerEntry | None:
    if after is not None and not isinstance(after, TimerEntry):
        raise InvalidInputError("after", after, "no TimerEntry", "pass the last entry of the page before")
    return after


# -- operations -------------------------------------------------------------------------------------------------------


def _decoded(dialect: Name, rows: Iterable[Row]) -> Generator[tuple[Row, TimerEntry]]:
    """The rows that are ours to read; each other one is left out, and logged when it is first seen."""
    for row in rows:
        try:
            yield row, statements.decode(dialect, row)
        except NotCanonicalError:
            _report(tuple(row[:3]))


def _all_decoded(dialect: Name, rows: Sequence[Row]) -> list[TimerEntry]:
    decode = statements.decoder(dialect)
    try:
        return [decode(*row) for row in rows]
    except NotCanonicalError:
        return [timer for _, timer in _decoded(dialect, rows)]


def _raw_rows(result: CursorResult[Any]) -> Sequence[Row]:
    # as the driver gave them: making SQLAlchemy's rows of them, and unpacking those, costs half as much as decoding
    cursor = result.cursor
    rows: Sequence[Row] = cursor.fetchall() if cursor is not None else ()
    result.close()
    return rows


def _report(row: tuple[Any, ...]) -> None:
    # not the row itself, which may be of any size
    seen = hash(row)
    if seen not in _reported and len(_reported) < _MOST_REPORTED:
        _reported.add(seen)
        texts = {name: shown(value) for name, value in zip(("workflow_id", "timer_id", "fire_at"), row, strict=True)}
        _log.warning(
            "left alone a row of timers that another program wrote in a form of its own: %s",
            ", ".join(f"{name} {text}" for name, text in texts.items()),
            extra={f"aion_{name}": text for name, text in texts.items()},
        )


def _upserted(
    dialect: Name, statement: Executable, parameters: Parameters, many: Sequence[TimerEntry], if_exists: IfExists
) -> Operation[CursorResult[Any]]:
    """Run an upsert of these timers; name the foreign row that stopped it, if one did."""
    try:
        return (yield statement, parameters)
    except IntegrityError as error:
        if dialect == SQLITE:
            for row in (yield statements.foreign_among(), statements.entries(dialect, many, if_exists)):
                raise ForeignRowError(
                    tuple(row),
                    "another program wrote a timer of this key in a form of its own, so it cannot be moved",
                    "correct or delete that row by hand, and schedule again",
                ) from error
        raise


def _schedule(
    dialect: Name, forget: Forget, timer: TimerEntry, if_exists: IfExists, now: datetime | None, *, notify: bool = True
) -> Operation[bool]:
    statement = statements.schedule(dialect, if_exists, clocked=now is not None, notify=notify)
    parameters = {**statements.entry(dialect, timer), **statements.at(now)}
    result = yield from _upserted(dialect, statement, parameters, [timer], if_exists)
    changed = result.rowcount > 0
    result.close()  # with what tells the listeners it has a row
    forget([(timer.workflow_id, timer.timer_id)])
    return changed


def _schedule_many(
    dialect: Name,
    forget: Forget,
    entries: Iterable[TimerEntry],
    if_exists: IfExists,
    now: datetime | None,
    *,
    notify: bool = True,
) -> Operation[int]:
    changed = 0
    source = iter(entries)
    statement = statements.schedule_many(dialect, if_exists, clocked=now is not None, notify=notify)
    while chunk := list(islice(source, _CHUNK)):
        parameters = {**statements.entries(dialect, chunk, if_exists), **statements.at(now)}
        result = yield from _upserted(dialect, statement, parameters, chunk, if_exists)
        changed += result.scalar_one() if result.returns_rows else result.rowcount
        forget((timer.workflow_id, timer.timer_id) for timer in chunk)
    return changed


def _read(
    dialect: Name, statement: Executable, parameters: Parameters, limit: int | None = None
) -> Operation[list[TimerEntry]]:
    fetch = limit or 0
    while True:
        rows = _raw_rows((yield statement, {**parameters, "limit": fetch} if limit else parameters))
        found = _all_decoded(dialect, rows)
        if limit is None or len(found) >= limit or len(rows) < fetch:
            return found
        fetch = min(2 * fetch, _MOST_ROWS)


def _expired(
    dialect: Name, _: Forget, as_of: datetime | None, limit: int | None, after: TimerEntry | None
) -> Operation[list[TimerEntry]]:
    parameters = statements.due_at(dialect, as_of) if as_of else {}
    if after:
        parameters |= statements.after(dialect, after)
    statement = statements.expired(dialect, at_clock=as_of is None, paged=after is not None, limited=limit is not None)
    return (yield from _read(dialect, statement, parameters, limit))[:limit]


def _next_fire_at(dialect: Name, _: Forget) -> Operation[datetime | None]:
    first = yield from _read(dialect, statements.next_fire_at(dialect), {}, 1)
    return first[0].fire_at if first else None


def _next_wake(
    dialect: Name, _: Forget, names: Sequence[str] | None, now: datetime | None
) -> Operation[timedelta | None]:
    parameters = {**statements.at(now), **(statements.named(dialect, names) if names is not None else {})}
    statement = statements.upcoming(dialect, clocked=now is not None, with_names=names is not None)
    # what is in flight stands first, and is seldom much
    fetch, nearest = 8, None
    while True:
        rows = _raw_rows((yield statement, {**parameters, "limit": fetch}))
        for row, timer in _decoded(dialect, rows):
            due, free = statements.seconds_until_free(dialect, row, timer)
            if nearest is None or free < nearest:
                nearest = free
            if due >= nearest:
                return nearest
        if len(rows) < fetch or fetch >= _MOST_IN_FLIGHT:
            return nearest
        fetch *= 8


def _clock_now(dialect: Name, _: Forget, now: datetime | None) -> Operation[datetime]:
    if now is not None:
        return now
    if dialect == SQLITE:
        # its clock is this machine's, in whole milliseconds. Asked by a statement it would be a row that is different
        # when it is read again, and so keep the transaction from writing after others have written
        here = datetime.now(UTC)
        return here.replace(microsecond=here.microsecond // 1000 * 1000)
    return (yield statements.now(), {}).scalar_one().replace(tzinfo=UTC)  # type: ignore[no-any-return] # a naive one


def _adopted(dialect: Name, _: Forget) -> Operation[bool]:
    return dialect == SQLITE and not (yield statements.key_index(), {}).all()


def _get(dialect: Name, _: Forget, key: Key) -> Operation[TimerEntry | None]:
    found = yield from _read(dialect, statements.get(dialect), statements.key(dialect, *key))
    return found[0] if found else None


def _list_workflow(dialect: Name, _: Forget, workflow_id: UUID) -> Operation[list[TimerEntry]]:
    parameters = statements.workflow(dialect, workflow_id)
    return (yield from _read(dialect, statements.list_workflow(dialect), parameters))


def _cancel(dialect: Name, forget: Forget, key: Key) -> Operation[bool]:
    result = yield statements.cancel(dialect), statements.key(dialect, *key)
    forget([key])
    return result.rowcount > 0


def _cancel_workflow(dialect: Name, forget: Forget, workflow_id: UUID) -> Operation[int]:
    parameters = statements.workflow(dialect, workflow_id)
    if dialect == SQLITE:
        yield statements.lock(), {}
        rows = _raw_rows((yield statements.list_workflow(dialect), parameters))
        ours = dict(_decoded(dialect, rows))
        timers = {row[:2]: timer for row, timer in ours.items()}
        back = _raw_rows((yield statements.delete_rows(held=True), statements.raw_rows(ours))) if ours else ()
        gone = [timers[row[:2]] for row in back]
    else:
        gone = [timer for _, timer in _decoded(dialect, (yield statements.cancel_workflow(), parameters))]
    forget((timer.workflow_id, timer.timer_id) for timer in gone)
    return len(gone)


class _Due(NamedTuple):
    """Which timers are to be taken or claimed."""

    as_of: datetime | None
    now: datetime | None
    limit: int
    names: Sequence[str] | None

    def flags(self) -> dict[str, bool]:
        return {
            "at_clock": self.as_of is None,
            "clocked": self.now is not None,
            "with_names": self.names is not None,
        }

    def parameters(self, dialect: Name) -> Parameters:
        return {
            **(statements.due_at(dialect, self.as_of) if self.as_of else {}),
            **statements.at(self.now),
            **(statements.named(dialect, self.names) if self.names is not None else {}),
            "limit": self.limit,
        }


def _take(dialect: Name, forget: Forget, due: _Due) -> Operation[list[TimerEntry]]:
    if dialect == SQLITE:
        statement = statements.delete_rows(clocked=due.now is not None)
        taken = [timer for _, timer in (yield from _change_decoded(due, statement, statements.at(due.now)))]
    else:
        rows = _raw_rows((yield statements.take(**due.flags()), due.parameters(dialect)))
        taken = _all_decoded(dialect, statements.in_order(rows))
    forget((timer.workflow_id, timer.timer_id) for timer in taken)
    return taken


def _claim(dialect: Name, forget: Forget, due: _Due, lease: timedelta) -> Operation[list[Claim]]:
    token = uuid4()
    parameters = statements.leased(dialect, token, lease, due.now)
    if dialect == SQLITE:
        statement = statements.lease_rows(clocked=due.now is not None)
        found = yield from _change_decoded(due, statement, {**parameters, **statements.at(due.now)})
        claims = [Claim(timer, token, row[2]) for row, timer in found]
    else:
        rows = _raw_rows((yield statements.claim(**due.flags()), {**due.parameters(dialect), **parameters}))
        claims = _claimed(dialect, statements.in_order(rows), token)
    forget(_place(claim) for claim in claims)
    return claims


def _claimed(dialect: Name, rows: Sequence[Row], token: UUID) -> list[Claim]:
    decode = statements.decoder(dialect)
    try:
        return [
            Claim(decode(workflow_id, timer_id, fire_at), token, attempt)
            for workflow_id, timer_id, fire_at, attempt in rows
        ]
    except NotCanonicalError:
        return [Claim(timer, token, row[3]) for row, timer in _decoded(dialect, rows)]


def _change_decoded(due: _Due, change: Executable, parameters: Parameters) -> Operation[list[tuple[Row, TimerEntry]]]:
    """Read, decode, and only then change what is ours, until the limit is full; the rows as they came back."""
    yield statements.lock(), {}
    statement = statements.free_and_due(**due.flags())
    ready = due.parameters(SQLITE)
    changed: list[tuple[Row, TimerEntry]] = []
    fetch = due.limit
    while True:
        rows = _raw_rows((yield statement, {**ready, "limit": fetch}))
        ours = list(islice(_decoded(SQLITE, rows), due.limit - len(changed)))
        back = {}
        if ours:
            given = statements.raw_rows(row for row, _ in ours)
            back = {row[:2]: row for row in _raw_rows((yield change, {**parameters, **given}))}
        # outside a transaction another one may have had some of them meanwhile
        changed += [(back[row[:2]], timer) for row, timer in ours if row[:2] in back]
        if len(changed) >= due.limit or len(rows) < fetch:
            return changed
        if not back:
            fetch = min(2 * fetch, _MOST_ROWS)


def _confirm(dialect: Name, _: Forget, claim: Claim) -> Operation[None]:
    result = yield statements.confirm(dialect), statements.fence(dialect, claim)
    if not (result.rowcount if dialect == SQLITE else result.all()):
        raise LeaseLost(claim)


def _settle(
    dialect: Name, forget: Forget, /, claims: Sequence[Claim], how: Settle, parameters: Parameters, **how_exactly: bool
) -> Operation[Settlement]:
    statement = statements.settle(dialect, how, **how_exactly)
    unsettled: dict[int, bool] = {}
    groups, twins = _groups(claims)
    for numbers in groups:
        asked = [claims[number] for number in numbers]
        rows = _raw_rows((yield statement, {**statements.claims(dialect, asked), **parameters}))
        unsettled.update((numbers[place], is_locked) for place, is_locked in statements.unsettled(dialect, asked, rows))
    forget(_place(claim) for claim in claims)
    unsettled.update((number, unsettled[earlier]) for number, earlier in twins if earlier in unsettled)
    if not unsettled:
        return Settlement(tuple(claims), (), ())
    done, busy, lost = (
        tuple(claim for number, claim in enumerate(claims) if unsettled.get(number) is fate)
        for fate in (None, True, False)
    )
    return Settlement(done, busy, lost)


def _groups(claims: Sequence[Claim]) -> tuple[list[Sequence[int]], list[tuple[int, int]]]:
    """The places of claims in groups without two on one timer, and which ones are there twice, with the first of each.

    Of two claims on one timer at most one is alive: they are asked for one after the other.
    """
    left: Sequence[int] = range(len(claims))
    # the timers differ if one half of their keys does, and to see that costs a tenth of what follows
    workflow_ids = {claim.timer.workflow_id.int for claim in claims}
    if left and (len(workflow_ids) == len(left) or len({claim.timer.timer_id for claim in claims}) == len(left)):
        return [left], []
    groups: list[Sequence[int]] = []
    twins: list[tuple[int, int]] = []
    while left:
        first: dict[tuple[int, str], int] = {}
        others = []
        for number in left:
            timer = claims[number].timer
            earlier = first.setdefault((timer.workflow_id.int, encode_timer_id(timer.timer_id)), number)
            if earlier == number:
                continue
            if claims[earlier] == claims[number]:
                twins.append((number, earlier))
            else:
                others.append(number)
        groups.append(list(first.values()))
        left = others
    return groups, twins


def _extend(
    dialect: Name, forget: Forget, claims: Sequence[Claim], lease: timedelta, now: datetime | None
) -> Operation[Settlement]:
    parameters = statements.lease_of(dialect, lease, now)
    return (yield from _settle(dialect, forget, claims, "extend", parameters, clocked=now is not None))


def _place(claim: Claim) -> Key:
    return claim.timer.workflow_id, claim.timer.timer_id


_READING: Final = (_adopted, _clock_now, _expired, _next_fire_at, _next_wake, _get, _list_workflow)


def _bind_for(operation: Callable[..., Operation[Any]]) -> dict[str, Any]:
    """What a session's ``get_bind`` is asked with: one that sends reads elsewhere has to see that this is a write."""
    return {"mapper": Timer} if operation in _READING else {"mapper": Timer, "clause": statements.lock()}


_SCHEDULING: Final = (_schedule, _schedule_many)


def _allowed(
    operation: Callable[Concatenate[Name, Forget, P], Operation[T]], connection: Connection, *, notify: bool
) -> Callable[Concatenate[Name, Forget, P], Operation[T]]:
    """The operation as it is, or one that does not notify, where that is not wanted or not possible."""
    # PREPARE TRANSACTION refuses a transaction that has notified
    if operation in _SCHEDULING and not (notify and not isinstance(connection.get_transaction(), TwoPhaseTransaction)):
        quiet: Any = partial(operation, notify=False)
        return quiet  # type: ignore[no-any-return] # it takes what the operation takes
    return operation


# -- repositories -----------------------------------------------------------------------------------------------------


class _Clocked:
    """What both repositories know: a clock, if it is not the database's, and a session's loaded timers."""

    _bind: Any
    _clock: Clock | None
    _notify: bool

    def _as_of(self, as_of: datetime | None) -> datetime | None:
        return self._now() if as_of is None else utc("as_of", as_of, up=False)

    def _now(self) -> datetime | None:
        return None if self._clock is None else utc("clock", self._clock(), up=False)

    def _due(self, as_of: datetime | None, limit: int, names: Iterable[str] | None) -> _Due:
        now = self._now()
        return _Due(utc("as_of", as_of, up=False) if as_of is not None else now, now, _at_most(limit), _names(names))

    def _lasting(self, lease: timedelta) -> tuple[timedelta, datetime | None]:
        return _lease(lease), self._now()

    def _forget(self, keys: Iterable[Key]) -> None:
        loaded = getattr(self._bind, "identity_map", None)
        if not loaded:
            return
        for key in keys:
            timer = loaded.get(Timer.__mapper__.identity_key_from_primary_key(key))
            if timer is not None:
                self._bind.expire(timer)


class TimerRepository(_Clocked):
    """Timers in the transaction of a Session, a scoped_session or a Connection.

    Nothing is committed here: what a method wrote becomes durable when the caller commits, and is gone when the caller
    rolls back. A `Timer` that the session has loaded is expired when its row is changed; one that was loaded again in a
    savepoint which is rolled back is not, and what the session has not flushed is not seen. Timers come back in the
    order of ``fire_at``, then workflow id, then timer id, which is the same on every database.

    A row that another program wrote into a SQLite file in a form of its own is never returned, moved or deleted; it is
    logged once.

    Args:
        bind: the Session, scoped_session or Connection.
        clock: tells the current instant as an aware datetime. By default the database's clock decides.
        notify: whether a timer that is scheduled before all others wakes sleeping workers on PostgreSQL. It never does
            in a two-phase or a serializable transaction. Pass False where you prepare transactions by statements of
            your own, since PREPARE TRANSACTION refuses one that has notified.

    Every method raises:
        InvalidInputError: an argument cannot be stored or asked for; nothing was changed, unless it was an entry that
            a generator gave after others.
        UnsupportedBindError: the bind, the database or its driver is not supported or not dependable.
        NotMigratedError: the table does not exist; the message says which command makes it.
        PoolExhaustedError, StoreUnavailableError: the database cannot be reached or written. Errors in the middle of
            a transaction, such as a lost connection or a deadlock, are SQLAlchemy's own.
    """

    def __init__(
        self, bind: Session | scoped_session[Any] | Connection, *, clock: Clock | None = None, notify: bool = True
    ) -> None:
        if not isinstance(bind, Session | scoped_session | Connection):
            raise UnsupportedBindError(f"TimerRepository does not take {_article(bind)}", _cure(bind, "Async"))
        self._bind = bind
        self._clock = _checked_clock(clock)
        self._notify = notify

    def _run(
        self, operation: Callable[Concatenate[Name, Forget, P], Operation[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        bind = self._bind
        with connecting():
            connection = bind if isinstance(bind, Connection) else bind.connection(bind_arguments=_bind_for(operation))
            require_dependable(connection)
        operation = _allowed(operation, connection, notify=self._notify)
        steps = operation(statements.dialect_name(connection.dialect), self._forget, *args, **kwargs)
        try:
            statement, parameters = next(steps)
            while True:
                try:
                    with explained():
                        result = connection.execute(statement, parameters)
                except IntegrityError as error:
                    statement, parameters = steps.throw(error)
                else:
                    statement, parameters = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def schedule(
        self, workflow_id: UUID, timer_id: TimerId | str | int, fire_at: datetime, *, if_exists: IfExists = "replace"
    ) -> bool:
        """Insert the timer, or change the one that has this key.

        Args:
            workflow_id: whose timer it is.
            timer_id: a name (``str``), a position in the workflow's sequence (``int``), or a `TimerId`.
            fire_at: an aware datetime, any zone; from this instant on the timer is due. What is finer than a
                microsecond is rounded up, so that it never fires early.
            if_exists: ``replace`` moves the timer, ``keep`` leaves it, ``earliest`` and ``latest`` move it if the new
                instant is before or after its own.

        Returns:
            Whether the row was inserted or moved; ``replace`` always does one of the two.

        Raises:
            ForeignRowError: another program's row stands under this key, in a form that cannot be moved.
        """
        timer = _writable(TimerEntry(workflow_id, timer_id, fire_at))
        return self._run(_schedule, timer, _policy(if_exists), self._now())

    def schedule_many(self, entries: Iterable[TimerEntry], *, if_exists: IfExists = "replace") -> int:
        """Schedule any number of timers, as if one after the other in the order given.

        They are written in chunks of 1,000, one statement a chunk, so a generator of any length needs little memory.
        Within a chunk rows are locked in the order of their keys; across chunks no order can be kept, so two such calls
        with overlapping keys can deadlock on PostgreSQL, and the transaction that the database ends is to be retried.
        A collection is checked before anything is written; if a generator gives an entry that is refused, the chunks
        before it are written: roll back.

        Returns:
            How many rows were inserted or moved; one that several entries name counts once a chunk.

        Raises:
            ForeignRowError: another program's row stands under one of the keys, in a form that cannot be moved.
        """
        return self._run(_schedule_many, _entries(entries), _policy(if_exists), self._now())

    def expired(
        self, as_of: datetime | None = None, *, limit: int | None = None, after: TimerEntry | None = None
    ) -> list[TimerEntry]:
        """The due timers in order: those with ``fire_at <= as_of``, by default as of now.

        Args:
            as_of: an aware datetime.
            limit: how many at most; None is all of them.
            after: the last entry of the page before.
        """
        return self._run(_expired, self._as_of(as_of), None if limit is None else _at_most(limit), _page(after))

    def get(self, workflow_id: UUID, timer_id: TimerId | str | int) -> TimerEntry | None:
        """The timer of this key, or None."""
        return self._run(_get, _key(workflow_id, timer_id))

    def list_workflow(self, workflow_id: UUID) -> list[TimerEntry]:
        """All timers of one workflow, in order."""
        return self._run(_list_workflow, check_workflow_id(workflow_id))

    def cancel(self, workflow_id: UUID, timer_id: TimerId | str | int) -> bool:
        """Delete the timer of this key; whether there was one."""
        return self._run(_cancel, _key(workflow_id, timer_id))

    def cancel_workflow(self, workflow_id: UUID) -> int:
        """Delete all timers of one workflow; how many there were."""
        return self._run(_cancel_workflow, check_workflow_id(workflow_id))

    def next_fire_at(self) -> datetime | None:
        """The earliest instant of all timers, due or not, or None if there is no timer."""
        return self._run(_next_fire_at)

    def now(self) -> datetime:
        """What time it is by the clock that decides: the repository's, else the database's."""
        return self._run(_clock_now, self._now())

    def adopted(self) -> bool:
        """Whether the table is another program's, Aion's, which may have timers of its own there."""
        return self._run(_adopted)

    def next_wake(self, names: Iterable[str] | None = None) -> timedelta | None:
        """How long until a timer can be claimed: zero or less if one can be now, None if there is no timer.

        It goes by the clock. A held timer counts with the end of its lease. The first few hundred timers are looked at,
        so that with more of them in flight the answer may be too long.

        Args:
            names: as for `take`.
        """
        return self._run(_next_wake, _names(names), self._now())

    def take(
        self, as_of: datetime | None = None, *, limit: int, names: Iterable[str] | None = None
    ) -> list[TimerEntry]:
        """Delete the first due timers and return them, so that they belong to this transaction alone.

        On PostgreSQL, timers whose rows another transaction has locked are passed over. A timer that is scheduled again
        in the same transaction is a new row, which another transaction's `cancel` that waits meanwhile does not see.

        Args:
            as_of: an aware datetime, by default now.
            limit: how many at most.
            names: only timers of these names; one that ends with ``*`` stands for every name that begins so, itself
                too. By default every timer, anonymous ones too.
        """
        return self._run(_take, self._due(as_of, limit, names))

    def claim(
        self, as_of: datetime | None = None, *, limit: int, lease: timedelta, names: Iterable[str] | None = None
    ) -> list[Claim]:
        """Lease the first due timers that nobody holds, and return the claims in order.

        Until the lease runs out, no other claim and no `take` gets them. Commit before the timers are fired, so that
        others see the lease. On PostgreSQL, timers whose rows another transaction has locked are passed over.

        Args:
            as_of: an aware datetime, by default now. It decides only what is due; leases go by the clock.
            limit: how many at most.
            lease: how long they are held, a millisecond to a year; long enough for the work, or for the next `extend`.
            names: as for `take`.
        """
        return self._run(_claim, self._due(as_of, limit, names), _lease(lease))

    def confirm(self, claim: Claim) -> None:
        """Lock the timer of a claim, for a transaction that will settle it at its end.

        Raises:
            LeaseLost: the claim holds its timer no more; nothing was locked.
        """
        self._run(_confirm, *_claims([claim]))

    def complete(self, *claims: Claim) -> Settlement:
        """Delete the timers of the claims, which have been fired; all in one statement, waiting for nobody."""
        return self._run(_settle, _claims(claims), "complete", {})

    def release(self, *claims: Claim, retry_at: datetime | None = None) -> Settlement:
        """Give the timers of the claims back, all in one statement, waiting for nobody.

        Args:
            claims: the claims.
            retry_at: when the timers are due again, an aware datetime; by default they are due as before. How often
                they were attempted is kept.
        """
        moved = None if retry_at is None else utc("retry_at", retry_at)
        return self._run(_settle, _claims(claims), "release", statements.retry(moved), moved=moved is not None)

    def extend(self, *claims: Claim, lease: timedelta) -> Settlement:
        """Hold the timers of the claims for this long from now on, all in one statement, waiting for nobody."""
        return self._run(_extend, _claims(claims), *self._lasting(lease))


class AsyncTimerRepository(_Clocked):
    """Like `TimerRepository`, for an AsyncSession, an async_scoped_session or an AsyncConnection."""

    def __init__(
        self,
        bind: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        *,
        clock: Clock | None = None,
        notify: bool = True,
    ) -> None:
        if not isinstance(bind, _async_binds()):
            raise UnsupportedBindError(f"AsyncTimerRepository does not take {_article(bind)}", _cure(bind, ""))
        self._bind = bind
        self._clock = _checked_clock(clock)
        self._notify = notify

    async def _run(
        self, operation: Callable[Concatenate[Name, Forget, P], Operation[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        bind = self._bind
        with connecting():
            connection: AsyncConnection = (
                await bind.connection(bind_arguments=_bind_for(operation)) if hasattr(bind, "identity_map") else bind
            )
            if not is_dependable(connection.sync_connection):
                await connection.run_sync(require_dependable)
        operation = _allowed(operation, _sync(connection), notify=self._notify)
        steps = operation(statements.dialect_name(connection.dialect), self._forget, *args, **kwargs)
        try:
            statement, parameters = next(steps)
            while True:
                try:
                    with explained():
                        result = await connection.execute(statement, parameters)
                except IntegrityError as error:
                    statement, parameters = steps.throw(error)
                else:
                    statement, parameters = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    async def schedule(
        self, workflow_id: UUID, timer_id: TimerId | str | int, fire_at: datetime, *, if_exists: IfExists = "replace"
    ) -> bool:
        """Like `TimerRepository.schedule`."""
        timer = _writable(TimerEntry(workflow_id, timer_id, fire_at))
        return await self._run(_schedule, timer, _policy(if_exists), self._now())

    async def schedule_many(self, entries: Iterable[TimerEntry], *, if_exists: IfExists = "replace") -> int:
        """Like `TimerRepository.schedule_many`."""
        return await self._run(_schedule_many, _entries(entries), _policy(if_exists), self._now())

    async def expired(
        self, as_of: datetime | None = None, *, limit: int | None = None, after: TimerEntry | None = None
    ) -> list[TimerEntry]:
        """Like `TimerRepository.expired`."""
        return await self._run(_expired, self._as_of(as_of), None if limit is None else _at_most(limit), _page(after))

    async def get(self, workflow_id: UUID, timer_id: TimerId | str | int) -> TimerEntry | None:
        """Like `TimerRepository.get`."""
        return await self._run(_get, _key(workflow_id, timer_id))

    async def list_workflow(self, workflow_id: UUID) -> list[TimerEntry]:
        """Like `TimerRepository.list_workflow`."""
        return await self._run(_list_workflow, check_workflow_id(workflow_id))

    async def cancel(self, workflow_id: UUID, timer_id: TimerId | str | int) -> bool:
        """Like `TimerRepository.cancel`."""
        return await self._run(_cancel, _key(workflow_id, timer_id))

    async def cancel_workflow(self, workflow_id: UUID) -> int:
        """Like `TimerRepository.cancel_workflow`."""
        return await self._run(_cancel_workflow, check_workflow_id(workflow_id))

    async def next_fire_at(self) -> datetime | None:
        """Like `TimerRepository.next_fire_at`."""
        return await self._run(_next_fire_at)

    async def now(self) -> datetime:
        """Like `TimerRepository.now`."""
        return await self._run(_clock_now, self._now())

    async def adopted(self) -> bool:
        """Like `TimerRepository.adopted`."""
        return await self._run(_adopted)

    async def next_wake(self, names: Iterable[str] | None = None) -> timedelta | None:
        """Like `TimerRepository.next_wake`."""
        return await self._run(_next_wake, _names(names), self._now())

    async def take(
        self, as_of: datetime | None = None, *, limit: int, names: Iterable[str] | None = None
    ) -> list[TimerEntry]:
        """Like `TimerRepository.take`."""
        return await self._run(_take, self._due(as_of, limit, names))

    async def claim(
        self, as_of: datetime | None = None, *, limit: int, lease: timedelta, names: Iterable[str] | None = None
    ) -> list[Claim]:
        """Like `TimerRepository.claim`."""
        return await self._run(_claim, self._due(as_of, limit, names), _lease(lease))

    async def confirm(self, claim: Claim) -> None:
        """Like `TimerRepository.confirm`."""
        await self._run(_confirm, *_claims([claim]))

    async def complete(self, *claims: Claim) -> Settlement:
        """Like `TimerRepository.complete`."""
        return await self._run(_settle, _claims(claims), "complete", {})

    async def release(self, *claims: Claim, retry_at: datetime | None = None) -> Settlement:
        """Like `TimerRepository.release`."""
        moved = None if retry_at is None else utc("retry_at", retry_at)
        return await self._run(_settle, _claims(claims), "release", statements.retry(moved), moved=moved is not None)

    async def extend(self, *claims: Claim, lease: timedelta) -> Settlement:
        """Like `TimerRepository.extend`."""
        return await self._run(_extend, _claims(claims), *self._lasting(lease))


# -- binds ------------------------------------------------------------------------------------------------------------


def _async_binds() -> tuple[type, ...]:
    try:
        from sqlalchemy.ext.asyncio import (  # noqa: PLC0415 - greenlet, which it needs, is an extra
            AsyncConnection,
            AsyncSession,
            async_scoped_session,
        )
    except ImportError as error:
        raise UnsupportedBindError(
            "AsyncTimerRepository needs greenlet, which is not installed", "pip install 'aion-timers[asyncio]'"
        ) from error
    return AsyncSession, async_scoped_session, AsyncConnection


def _sync(connection: AsyncConnection) -> Connection:
    sync = connection.sync_connection
    assert sync is not None  # noqa: S101 - it has been used
    return sync


def _article(bind: object) -> str:
    name = bind.__name__ if isinstance(bind, type) else type(bind).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _cure(bind: object, other: str) -> str:
    kinds = {kind.__name__ for kind in type(bind).__mro__}
    if kinds & {"Engine", "AsyncEngine", "sessionmaker", "async_sessionmaker"}:
        return "open a session or a connection and pass that: its transaction is the caller's"
    if kinds & {"Session", "Connection", "scoped_session", "AsyncSession", "AsyncConnection", "async_scoped_session"}:
        return f"use {other}TimerRepository for it"
    return f"pass {'a' if other else 'an async'} session or connection of SQLAlchemy"
