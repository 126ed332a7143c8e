"""The statements of every operation, for each database: arguments and a dialect's name in, SQLAlchemy statements out.

Each builder is cached and each statement takes its values as parameters when it is executed, so SQLAlchemy compiles
it once. Columns are fetched in the raw form that `decode` takes: bytes on the SQLite family.

What differs between the databases, and why:

* Many values travel as one JSON parameter on the SQLite family and as arrays on PostgreSQL, whatever their number.
* PostgreSQL locks the rows of a statement that touches several of them in the order of their keys before it changes
  them, so that two such statements never wait for each other. The SQLite family has one lock, taken by `lock`.
* On the SQLite family another program may write any text. A range keeps out the years that it writes with a sign, and
  an upsert leaves alone a row whose instant is not in canonical form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from operator import attrgetter, itemgetter, lt
from typing import TYPE_CHECKING, Any, AnyStr, Final, Literal, TypeAlias, assert_never
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Delete,
    Dialect,
    Executable,
    Insert,
    Integer,
    Interval,
    LargeBinary,
    Select,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    false,
    func,
    literal_column,
    not_,
    null,
    or_,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import NullType

from aion_timers.schema import POSTGRESQL, SQLITE, stored_bytes, timers
from aion_timers.values import (
    Claim,
    NotCanonicalError,
    TimerEntry,
    TimerId,
    decode_columns,
    decode_instant,
    decode_row,
    encode_as_of,
    encode_instant,
    encode_timer_id,
    encode_workflow_id,
)

if TYPE_CHECKING:
    from sqlalchemy.sql.dml import ReturningDelete, ReturningUpdate
    from sqlalchemy.sql.selectable import CTE, TableValuedAlias
    from sqlalchemy.types import TypeEngine

IfExists = Literal["replace", "keep", "earliest", "latest"]
"""What becomes of a timer that has the same key: it is moved, left, or moved if that is earlier or later."""

Name = Literal["sqlite", "postgresql"]
"""The name of a dialect that there are statements for."""

Parameters: TypeAlias = dict[str, Any]
Row: TypeAlias = Sequence[Any]

CHANNEL: Final = "aion_timers_"
"""What a channel's name begins with; the table's object id ends it, which no two tables of a database share."""

_KEY: Final = (timers.c.workflow_id, timers.c.timer_id)
_ORDER: Final = (timers.c.fire_at, *_KEY)
_EARLIEST: Final = "0001-01-01T00:00:00.000000000Z"
_RAW: Final = NullType()
# on the SQLite family, of rows that are known to hold text
_KEY_BYTES: Final = [type_coerce(cast(part, LargeBinary), _RAW) for part in _KEY]
_TIMESTAMP: Final = postgresql.TIMESTAMP(timezone=True)
_LOOKED_AT: Final = 64
# of what the SQLite family stores
_WORKFLOW_LENGTH: Final = 38
_INSTANT_LENGTH: Final = 30
_TOKEN_LENGTH: Final = 36
_hex: Final[Callable[[UUID], str]] = attrgetter("hex")
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def dialect_name(dialect: Dialect) -> Name:
    """The name of a dialect, which is one that there are statements for."""
    return "postgresql" if dialect.name == POSTGRESQL else "sqlite"


# -- values in and out ------------------------------------------------------------------------------------------------


def key(dialect: Name, workflow_id: UUID, timer_id: TimerId) -> Parameters:
    """The parameters that name one timer."""
    return {**workflow(dialect, workflow_id), "timer": encode_timer_id(timer_id)}


def workflow(dialect: Name, workflow_id: UUID) -> Parameters:
    """The parameter that names one workflow."""
    return {"workflow": workflow_id if dialect == POSTGRESQL else encode_workflow_id(workflow_id)}


def entry(dialect: Name, timer: TimerEntry) -> Parameters:
    """The parameters of one timer to write."""
    return {**key(dialect, timer.workflow_id, timer.timer_id), "instant": encode_instant(timer.fire_at)}


def entries(dialect: Name, many: Sequence[TimerEntry], if_exists: IfExists) -> Parameters:
    """The parameters of many timers to write: one row a key, as if they were written in the order given."""
    encode = _workflow_encoder(dialect)
    places = [(encode(timer.workflow_id), encode_timer_id(timer.timer_id)) for timer in many]
    instants = [encode_instant(timer.fire_at) for timer in many]
    rows = dict(zip(places, instants, strict=True))
    if len(rows) < len(places):
        # which is rare: some have the same key
        rows.clear()
        for place, instant in zip(places, instants, strict=True):
            if place not in rows or _moves(if_exists, rows[place], instant):
                rows[place] = instant
    ordered = [(workflow, timer, rows[workflow, timer]) for workflow, timer in sorted(rows)]
    if dialect == SQLITE:
        return {"rows": _json([_joined(*row) for row in ordered])}
    columns = ("\n".join(column) for column in zip(*ordered, strict=True))
    return dict(zip(("workflows", "timers", "instants"), columns, strict=True))


def _joined(workflow: AnyStr, timer: AnyStr, third: AnyStr) -> AnyStr:
    """A row of the SQLite family's parameter, which `_given_rows` takes apart again."""
    return workflow + third + timer


def _workflow_encoder(dialect: Name) -> Callable[[UUID], str]:
    # digits alone, which PostgreSQL reads too, take less time than the usual text
    return _hex if dialect == POSTGRESQL else encode_workflow_id


def _moves(if_exists: IfExists, old: str, new: str) -> bool:
    match if_exists:
        case "replace":
            return True
        case "keep":
            return False
        case "earliest":
            return new < old
        case "latest":
            return new > old
        case other:
            assert_never(other)


def due_at(dialect: Name, as_of: datetime) -> Parameters:
    """The parameter that says what is due."""
    return {"as_of": encode_instant(as_of) if dialect == POSTGRESQL else encode_as_of(as_of)}


def after(dialect: Name, timer: TimerEntry) -> Parameters:
    """The parameters that name the last timer of the page before."""
    instant = encode_instant(timer.fire_at) if dialect == POSTGRESQL else timer.stored_instant
    return {**key(dialect, timer.workflow_id, timer.timer_id), "instant": instant}


def named(dialect: Name, names: Sequence[str]) -> Parameters:
    """The parameters of a condition on names, exact ones and prefixes that end with ``*``."""
    exact = [encode_timer_id(TimerId.named(name)) for name in names if not name.endswith("*")]
    # the encoding goes character by character, so a prefix of a name is a prefix of its text
    prefixes = [encode_timer_id(TimerId.named(name))[:-3] for name in names if name.endswith("*")]
    parameters = {"exact": exact, "prefixes": prefixes, "lengths": list({len(prefix) for prefix in prefixes})}
    return parameters if dialect == POSTGRESQL else {name: _json(values) for name, values in parameters.items()}


def raw_rows(rows: Iterable[Row]) -> Parameters:
    """The parameter of `delete_rows` and `lease_rows`: rows just as they were fetched as bytes, in canonical form."""
    return {"rows": _json([_joined(*row).decode() for row in rows])}


def at(now: datetime | None) -> Parameters:
    """The parameter that says what time it is, unless the database's clock does."""
    return {} if now is None else {"now": encode_instant(now)}


def leased(dialect: Name, token: UUID, lease: timedelta, now: datetime | None) -> Parameters:
    """The parameters of a lease."""
    return {"token": token if dialect == POSTGRESQL else str(token), **lease_of(dialect, lease, now)}


_LAST: Final = datetime.max.replace(tzinfo=UTC)


def lease_of(dialect: Name, lease: timedelta, now: datetime | None) -> Parameters:
    """The parameter that says until when a lease lasts: an instant, or how much is added to the database's clock."""
    if now is not None:
        return {"until": encode_instant(min(lease, _LAST - now) + now)}
    # SQLite's clock counts milliseconds
    return {"lease": lease if dialect == POSTGRESQL else f"+{lease / timedelta(seconds=1):.3f} seconds"}


def claims(dialect: Name, many: Sequence[Claim]) -> Parameters:
    """The parameters that name claims to settle, of different timers, in the order given."""
    ids = [encode_timer_id(claim.timer.timer_id) for claim in many]
    if dialect == SQLITE:
        workflows = [encode_workflow_id(claim.timer.workflow_id) for claim in many]
        return {"rows": _json([_joined(*row) for row in zip(workflows, ids, _tokens(many), strict=True)])}
    hexes = [claim.timer.workflow_id.hex for claim in many]
    return {"workflows": "\n".join(hexes), "timers": "\n".join(ids), "tokens": "\n".join(_tokens(many))}


def _tokens(many: Sequence[Claim]) -> list[str]:
    # claims that were made together share one token, which need not be written out again for each of them
    texts: dict[int, str] = {}
    return [texts.get(id(claim.token)) or texts.setdefault(id(claim.token), str(claim.token)) for claim in many]


def unsettled(dialect: Name, many: Sequence[Claim], rows: Sequence[Row]) -> Iterable[tuple[int, bool]]:
    """Which of `claims` were not settled by `settle`, by their places, and whether each is only locked, or lost."""
    if dialect == POSTGRESQL:
        return ((place - 1, is_locked) for place, is_locked in rows)
    if len(rows) == len(many):
        return ()
    done = {(workflow_id.decode(), timer_id.decode()) for workflow_id, timer_id in rows}
    keys = ((encode_workflow_id(claim.timer.workflow_id), encode_timer_id(claim.timer.timer_id)) for claim in many)
    return ((place, False) for place, key in enumerate(keys) if key not in done)


def fence(dialect: Name, claim: Claim) -> Parameters:
    """The parameters that name one claim."""
    token = claim.token if dialect == POSTGRESQL else str(claim.token)
    return {**key(dialect, claim.timer.workflow_id, claim.timer.timer_id), "token": token}


def retry(retry_at: datetime | None) -> Parameters:
    """The parameter that says when a timer that is given back is due, if not as before."""
    return {} if retry_at is None else {"instant": encode_instant(retry_at)}


def decoder(dialect: Name) -> Callable[..., TimerEntry]:
    """The function that takes a fetched row's values and gives its timer, as `decode` does."""
    return decode_columns if dialect == POSTGRESQL else decode_row


def decode(dialect: Name, row: Row) -> TimerEntry:
    """The timer that a fetched row holds.

    Raises:
        NotCanonicalError: another program wrote the row in a form of its own.
    """
    return decode_columns(*row[:3]) if dialect == POSTGRESQL else decode_row(*row[:3])


def seconds_until_free(dialect: Name, row: Row, timer: TimerEntry) -> tuple[timedelta, timedelta]:
    """How long from now a timer of `upcoming` is not yet due, and how long until it can be claimed."""
    _, _, _, until, now = row
    if dialect == SQLITE:
        now, until = decode_instant(now), decode_instant(until) if until is not None else None
        due = timer.fire_at - now
    else:
        due = timer.fire_at.replace(tzinfo=None) - now
    return due, due if until is None else max(due, until - now)


_order: Final[Callable[[Row], tuple[Any, ...]]] = itemgetter(2, 0, 1)


def in_order(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that PostgreSQL returned, by instant, workflow id, timer id."""
    instants = [row[2] for row in rows]
    # they mostly come so, at different instants, and to see that is cheaper than to make three values a key of each
    return rows if all(map(lt, instants, instants[1:])) else sorted(rows, key=_order)


# -- parts of statements ----------------------------------------------------------------------------------------------


def _sql(constant: str) -> ColumnElement[Any]:
    """A constant of ours, written out so that it is not bound again at each execution."""
    return literal_column(constant, _RAW)


def _workflow(dialect: Name) -> ColumnElement[Any]:
    return bindparam("workflow", type_=postgresql.UUID() if dialect == POSTGRESQL else Text())


def _timer() -> ColumnElement[Any]:
    return bindparam("timer", type_=Text())


def _instant(dialect: Name, name: str) -> ColumnElement[Any]:
    given = bindparam(name, type_=Text())
    # sent as text to PostgreSQL too, since asyncpg turns the first and the last datetime into infinity
    return cast(given, _TIMESTAMP) if dialect == POSTGRESQL else given


def _fetched(dialect: Name) -> list[ColumnElement[Any]]:
    if dialect == SQLITE:
        # text that is not UTF-8 makes the drivers fail
        return [type_coerce(stored_bytes(of), _RAW).label(of.key) for of in (*_KEY, timers.c.fire_at)]
    # psycopg reads an instant in the session's time zone, where the ends of the range are no datetimes
    instant = func.timezone(_sql("'UTC'"), timers.c.fire_at)
    return [
        type_coerce(timers.c.workflow_id, _RAW).label("workflow_id"),
        type_coerce(timers.c.timer_id, _RAW).label("timer_id"),
        type_coerce(instant, _RAW).label("fire_at"),
    ]


def _same_key(dialect: Name) -> ColumnElement[bool]:
    return and_(_of_workflow(dialect), timers.c.timer_id == _timer())


def _of_workflow(dialect: Name) -> ColumnElement[bool]:
    # the column's own comparator would take the parameter for a host's column
    return type_coerce(timers.c.workflow_id, _RAW) == _workflow(dialect)


def _clock(dialect: Name) -> ColumnElement[Any]:
    if dialect == POSTGRESQL:
        # stable within the statement, so that the index serves; now() would stand still in a long transaction
        return func.statement_timestamp(type_=_TIMESTAMP)
    return func.strftime(_sql("'%Y-%m-%dT%H:%M:%f'"), _sql("'now'"), type_=Text).concat(_sql("'000000Z'"))


def _now(dialect: Name, *, clocked: bool, waiting: bool = False) -> ColumnElement[Any]:
    """What time it is: a parameter if there is a clock, else the database's clock.

    Where a statement may wait for a row, PostgreSQL has to look at its clock after that.
    """
    if clocked:
        return _instant(dialect, "now")
    return func.clock_timestamp(type_=_TIMESTAMP) if waiting and dialect == POSTGRESQL else _clock(dialect)


def _held(dialect: Name, *, clocked: bool, waiting: bool = False) -> ColumnElement[bool]:
    return type_coerce(timers.c.lease_until, _RAW) > _now(dialect, clocked=clocked, waiting=waiting)


def _free(dialect: Name, *, clocked: bool) -> ColumnElement[bool]:
    until = type_coerce(timers.c.lease_until, _RAW)
    return or_(until.is_(None), until <= _now(dialect, clocked=clocked))


def _until(dialect: Name, *, clocked: bool) -> ColumnElement[Any]:
    """When a lease that is given now will end."""
    if clocked:
        return _instant(dialect, "until")
    if dialect == POSTGRESQL:
        # not the statement's beginning: it may have waited
        return func.clock_timestamp(type_=_TIMESTAMP) + bindparam("lease", type_=Interval())
    lease = bindparam("lease", type_=Text())
    return func.strftime(_sql("'%Y-%m-%dT%H:%M:%f'"), _sql("'now'"), lease, type_=Text).concat(_sql("'000000Z'"))


def _token(dialect: Name) -> ColumnElement[Any]:
    return bindparam("token", type_=postgresql.UUID() if dialect == POSTGRESQL else Text())


def _has_token(token: ColumnElement[Any]) -> ColumnElement[bool]:
    return type_coerce(timers.c.lease_token, _RAW) == token


def _in_range(dialect: Name) -> ColumnElement[bool]:
    return timers.c.fire_at >= _sql(f"'{_EARLIEST}'") if dialect == SQLITE else true()


def _due(dialect: Name, *, at_clock: bool) -> ColumnElement[bool]:
    as_of = _clock(dialect) if at_clock else _instant(dialect, "as_of")
    return and_(_in_range(dialect), timers.c.fire_at <= as_of)


def _each(dialect: Name, name: str, type_: TypeEngine[Any]) -> Select[*tuple[Any, ...]]:
    if dialect == SQLITE:
        return select(func.json_each(bindparam(name, type_=Text())).table_valued("value").c.value)
    return select(func.unnest(bindparam(name, type_=ARRAY(type_))).column_valued(f"{name}_value"))


def _has_name(dialect: Name) -> ColumnElement[bool]:
    encoded = type_coerce(timers.c.timer_id, Text())
    # by length, of which there are few, and not by prefix: each row is compared so often
    length = _each(dialect, "lengths", BigInteger()).subquery().columns[0]
    beginning = func.substr(encoded, _sql("1"), cast(length, Integer))
    begins = select(_sql("1")).where(beginning.in_(_each(dialect, "prefixes", Text()))).select_from(length.table)
    return or_(encoded.in_(_each(dialect, "exact", Text())), begins.exists())


def _canonical_instant() -> ColumnElement[bool]:
    """Whether the SQLite family's stored instant is in the form that `encode_instant` writes."""
    stored = type_coerce(timers.c.fire_at, Text())
    seconds = func.substr(stored, _sql("1"), _sql("19"))
    return and_(
        _in_range(SQLITE),
        # of bytes, since the length of text ends at a NUL
        func.length(cast(stored, LargeBinary)) == _sql("30"),
        func.substr(stored, _sql("20")).op("GLOB")(_sql(f"'.{'[0-9]' * 9}Z'")),
        # a date that does not exist, or a leap second, comes back as another text or none; old versions of SQLite
        # look at the date only if there is something to add to it
        func.strftime(_sql("'%Y-%m-%dT%H:%M:%S'"), seconds, _sql("'+0 days'")) == seconds,
    )


def _foreign_instant() -> ColumnElement[bool]:
    """Whether it is in any other form, or no text at all."""
    return func.coalesce(not_(_canonical_instant()), true())


def _upsert(dialect: Name, if_exists: IfExists, insert: sqlite.Insert | postgresql.Insert, *, clocked: bool) -> Insert:
    new = insert.excluded.fire_at
    # a timer that is being fired is about to go, so it counts as absent
    held = _held(dialect, clocked=clocked, waiting=True)
    condition: ColumnElement[bool] | None
    match if_exists:
        case "replace":
            condition = None
        case "keep":
            # not DO NOTHING, which does not wait for a row that another transaction is deleting
            condition = held
        case "earliest":
            condition = or_(new < timers.c.fire_at, held)
        case "latest":
            condition = or_(new > timers.c.fire_at, held)
        case other:
            assert_never(other)
    moved: ColumnElement[Any] = new
    if dialect == SQLITE:
        # a foreign row breaks NOT NULL, which undoes this statement and no other; to look for such rows before they are
        # met takes a sixth of the time of an insert
        moved = case((_canonical_instant(), new))
        if condition is not None:
            condition = or_(condition, _foreign_instant())
    statement = insert.on_conflict_do_update(
        index_elements=["workflow_id", "timer_id"],
        set_={"fire_at": moved, "lease_token": null(), "lease_until": null(), "attempts": _sql("0")},
        where=condition,
    )
    return statement.execution_options(preserve_rowcount=True)


def _insert(dialect: Name) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(timers) if dialect == SQLITE else postgresql.insert(timers)


# -- statements -------------------------------------------------------------------------------------------------------


_TABLE: Final = _sql("timers.tableoid")
_CTID: Final = _sql("timers.ctid")
_LOCATION: Final = (_TABLE.label("tableoid"), _CTID.label("ctid"))


@cache
def schedule(dialect: Name, if_exists: IfExists, *, clocked: bool = False, notify: bool = False) -> Executable:
    """Insert the timer of `entry`, or change the one with its key; the row count says whether the row changed.

    On the SQLite family a row of `foreign_among` makes it fail with an `IntegrityError`, and nothing is changed.

    With ``notify``, PostgreSQL tells its listeners if the timer comes before all others that nobody holds.
    """
    insert = _insert(dialect).values(
        workflow_id=_workflow(dialect), timer_id=_timer(), fire_at=_instant(dialect, "instant")
    )
    upsert = _upsert(dialect, if_exists, insert, clocked=clocked)
    if notify and dialect == POSTGRESQL:
        return upsert.returning(_tell(timers.c.fire_at, _TABLE, clocked=clocked))
    return upsert


@cache
def schedule_many(dialect: Name, if_exists: IfExists, *, clocked: bool = False, notify: bool = False) -> Executable:
    """Like `schedule`, for the timers of `entries`.

    With ``notify``, PostgreSQL tells its listeners once or not at all, and says in a row how many rows changed.
    """
    source = _given_rows(_INSTANT_LENGTH) if dialect == SQLITE else _given_arrays()
    insert = _insert(dialect).from_select(["workflow_id", "timer_id", "fire_at"], source, include_defaults=False)
    upsert = _upsert(dialect, if_exists, insert, clocked=clocked)
    if notify and dialect == POSTGRESQL:
        changed = upsert.returning(timers.c.fire_at, _TABLE.label("of")).cte("changed")
        told = _tell(func.min(changed.c.fire_at), func.max(changed.c.of), clocked=clocked)
        return select(func.count(), told).select_from(changed)
    return upsert


def _tell(instant: ColumnElement[Any], table: ColumnElement[Any], *, clocked: bool) -> ColumnElement[Any]:
    """Notify the listeners of a table, if the instant comes before all timers of it that nobody holds."""
    # the table as it was before the statement: what an upsert writes is seen in its RETURNING alone
    head = (
        select(
            type_coerce(timers.c.fire_at, _RAW).label("fire_at"), type_coerce(timers.c.lease_until, _RAW).label("until")
        )
        .order_by(timers.c.fire_at)
        .limit(_sql(str(_LOOKED_AT)))
        .subquery("head")
    )
    free = or_(head.c.until.is_(None), head.c.until <= _now(POSTGRESQL, clocked=clocked))
    first = select(head.c.fire_at).where(free).order_by(head.c.fire_at).limit(_sql("1")).scalar_subquery()
    # where so many are in flight that no free one was found, the others are left to workers, who are about
    last = (
        select(type_coerce(timers.c.fire_at, _RAW))
        .order_by(timers.c.fire_at)
        .offset(_sql(str(_LOOKED_AT - 1)))
        .limit(_sql("1"))
        .scalar_subquery()
    )
    # by its oid, which tells the tables of two schemas apart, whatever the statement calls them
    channel = _sql(f"'{CHANNEL}'").concat(cast(table, Text))
    serializable = func.current_setting(_sql("'transaction_isolation'"), type_=_RAW) == _sql("'serializable'")
    # nothing is evaluated after a WHEN that holds, so at SERIALIZABLE the index is not read: two transactions that
    # schedule quite different timers would be in conflict
    return case(
        (serializable, null()),
        (
            type_coerce(instant, _RAW) < func.coalesce(first, last, _sql("'infinity'")),
            cast(func.pg_notify(channel, _sql("''"), type_=_RAW), Text),
        ),
        else_=null(),
    )


def _given_rows(length: int) -> Select[*tuple[Any, ...]]:
    """The rows of the JSON parameter: workflow id, timer id, and a text of this length.

    Each is a single string, made by `_joined`: with an array for each, a statement takes an eighth longer.
    """
    row = func.json_each(bindparam("rows", type_=Text())).table_valued("value").c.value
    rest = _WORKFLOW_LENGTH + 1
    places = (f"1, {_WORKFLOW_LENGTH}", f"{rest + length}", f"{rest}, {length}")
    # WHERE tells SQLite's parser that an ON after it is an upsert's, not a join's
    return select(*(func.substr(row, _sql(place), type_=Text()) for place in places)).where(true())


def _is_in_rows(length: int, third: ColumnElement[Any] | None = None) -> ColumnElement[bool]:
    """Whether a row has a key that the JSON parameter names and, if there is a third column, the same value there."""
    columns = _KEY if third is None else (*_KEY, third)
    given = _given_rows(length)
    return tuple_(*columns).in_(given.with_only_columns(*given.selected_columns[: len(columns)]))


def _lines(
    ordinality: str | None = None, /, *, empty_is_null: bool = False, **columns: TypeEngine[Any]
) -> TableValuedAlias:
    """A table made of text parameters that hold a value a line, each named as its column and an s.

    With ``ordinality`` a column of that name numbers the lines from 1 on.
    """
    # psycopg takes as long to write an array as the server to insert it; JSON holds no line break
    null_text = [_sql("''")] * empty_is_null
    arrays = (
        cast(func.string_to_array(bindparam(f"{name}s", type_=Text()), _sql("E'\\n'"), *null_text), ARRAY(type_))
        for name, type_ in columns.items()
    )
    if ordinality is None:
        return func.unnest(*arrays).table_valued(*columns).render_derived()
    # from subselects, so that the planner does not see how many lines there are: for some hundred it would rather read
    # a table of some thousand rows than look up keys in it, and no plan that it keeps for later depends on them
    hidden = (select(array).scalar_subquery() for array in arrays)
    return func.unnest(*hidden).table_valued(*columns, with_ordinality=ordinality).render_derived()


def _given_arrays() -> Select[*tuple[Any, ...]]:
    given = _lines(workflow=postgresql.UUID(), timer=Text(), instant=_TIMESTAMP).c
    return select(given.workflow, given.timer, given.instant)


@cache
def foreign_among() -> Select[*tuple[Any, ...]]:
    """Which rows of the SQLite family stand under keys of `entries`, and cannot be moved: their instant is foreign."""
    return select(*_fetched(SQLITE)).where(_is_in_rows(_INSTANT_LENGTH), _foreign_instant())


@cache
def expired(dialect: Name, *, at_clock: bool, paged: bool, limited: bool) -> Select[*tuple[Any, ...]]:
    """The due timers in order, held or not, from a page's beginning, up to a limit."""
    statement = select(*_fetched(dialect)).where(_due(dialect, at_clock=at_clock)).order_by(*_ORDER)
    if paged:
        last = tuple_(_instant(dialect, "instant"), _workflow(dialect), _timer())
        statement = statement.where(tuple_(*_ORDER) > last)
    return statement.limit(_limit()) if limited else statement


def _limit() -> ColumnElement[Any]:
    return bindparam("limit", type_=BigInteger())


def _free_and_due(
    dialect: Name, columns: Iterable[ColumnElement[Any]], *, at_clock: bool, clocked: bool, with_names: bool
) -> Select[*tuple[Any, ...]]:
    statement = select(*columns).where(_due(dialect, at_clock=at_clock), _free(dialect, clocked=clocked))
    if with_names:
        statement = statement.where(_has_name(dialect))
    return statement.order_by(*_ORDER).limit(_limit())


@cache
def free_and_due(*, at_clock: bool, clocked: bool, with_names: bool) -> Select[*tuple[Any, ...]]:
    """The first due timers of the SQLite family that nobody holds, up to a limit."""
    return _free_and_due(SQLITE, _fetched(SQLITE), at_clock=at_clock, clocked=clocked, with_names=with_names)


@cache
def next_fire_at(dialect: Name) -> Select[*tuple[Any, ...]]:
    """The first timers of all, in order, up to a limit."""
    return select(*_fetched(dialect)).where(_in_range(dialect)).order_by(*_ORDER).limit(_limit())


@cache
def upcoming(dialect: Name, *, clocked: bool, with_names: bool) -> Select[*tuple[Any, ...]]:
    """The first timers of all, in order, up to a limit, each with the end of its lease and with what time it is."""
    now = _now(dialect, clocked=clocked)
    until: ColumnElement[Any] = type_coerce(timers.c.lease_until, _RAW)
    if dialect == POSTGRESQL:
        now, until = func.timezone(_sql("'UTC'"), now), func.timezone(_sql("'UTC'"), until)
    columns = [*_fetched(dialect), type_coerce(until, _RAW), type_coerce(now, _RAW)]
    statement = select(*columns).where(_in_range(dialect))
    if with_names:
        statement = statement.where(_has_name(dialect))
    return statement.order_by(*_ORDER).limit(_limit())


@cache
def now() -> Select[*tuple[Any, ...]]:
    """What time it is by PostgreSQL's clock, as a naive datetime that means UTC."""
    return select(type_coerce(func.timezone(_sql("'UTC'"), _clock(POSTGRESQL)), _RAW))


@cache
def key_index() -> Executable:
    """The columns of the SQLite family's table as an index; there are none if it has rowids, as the other program's."""
    return text("PRAGMA index_info('timers')")


@cache
def get(dialect: Name) -> Select[*tuple[Any, ...]]:
    """The timer of one key."""
    return select(*_fetched(dialect)).where(_same_key(dialect))


@cache
def list_workflow(dialect: Name) -> Select[*tuple[Any, ...]]:
    """All timers of one workflow, in order."""
    return select(*_fetched(dialect)).where(_of_workflow(dialect)).order_by(*_ORDER)


@cache
def cancel(dialect: Name) -> Delete:
    """Delete the timer of one key; the row count says whether there was one."""
    statement = delete(timers).where(_same_key(dialect))
    return statement.where(_canonical_instant()) if dialect == SQLITE else statement


@cache
def lock() -> Executable:
    """Change nothing, but take the write lock of the SQLite family, which a transaction must hold before it reads."""
    return update(timers).values(fire_at=timers.c.fire_at).where(false())


@cache
def delete_rows(*, clocked: bool = False, held: bool = False) -> ReturningDelete[*tuple[Any, ...]]:
    """Delete on the SQLite family the rows of `raw_rows` that are still the same, and return their keys.

    Held ones are left, unless it is said.
    """
    same = _is_in_rows(_INSTANT_LENGTH, timers.c.fire_at)
    free = true() if held else _free(SQLITE, clocked=clocked)
    return delete(timers).where(same, free).returning(*_KEY_BYTES)


@cache
def cancel_workflow() -> ReturningDelete[*tuple[Any, ...]]:
    """Delete on PostgreSQL all timers of one workflow and return them."""
    mine = _locked(select(*_KEY).where(_of_workflow(POSTGRESQL)).order_by(*_KEY).with_for_update())
    # the workflow is said again outside, so that the index serves even where the table has no statistics
    return delete(timers).where(_is_in(mine), _of_workflow(POSTGRESQL)).returning(*_fetched(POSTGRESQL))


@cache
def take(*, at_clock: bool, clocked: bool, with_names: bool) -> CompoundSelect[*tuple[Any, ...]]:
    """Delete on PostgreSQL the first due timers that nobody holds or has locked, and return them, in no order."""
    mine = _free_and_due(POSTGRESQL, (*_KEY, *_LOCATION), at_clock=at_clock, clocked=clocked, with_names=with_names)
    return _changed(delete(timers), mine, *_fetched(POSTGRESQL))


def _locked(mine: Select[*tuple[Any, ...]]) -> CTE:
    # materialized, so that the limit and the locks are taken once
    return mine.cte("mine").prefix_with("MATERIALIZED", dialect=POSTGRESQL)


def _is_in(mine: CTE | TableValuedAlias) -> ColumnElement[bool]:
    # by key: a row that moved meanwhile has another ctid
    return and_(
        type_coerce(timers.c.workflow_id, _RAW) == mine.c.workflow_id,
        type_coerce(timers.c.timer_id, _RAW) == mine.c.timer_id,
    )


def _changed(
    change: Delete | Update, mine: Select[*tuple[Any, ...]], *returned: ColumnElement[Any]
) -> CompoundSelect[*tuple[Any, ...]]:
    """Lock these rows, except those that others have locked, and change them."""
    locked = _locked(mine.with_for_update(skip_locked=True))
    most = change.where(_is_at(locked)).returning(*returned).cte("most")
    key = [locked.c[part.key] for part in _KEY]
    moved = select(*key).where(*_is_missing(key, locked, most)).cte("moved")
    rest = change.where(_is_in(_looked_up(moved))).returning(*returned).cte("rest")
    return select(*most.c).union_all(select(*rest.c))


def _is_at(locked: CTE) -> ColumnElement[bool]:
    """Whether a row is one of those that were locked, by its location: a tenth or more quicker than by its key.

    One that moved since the statement began is not found, since the statement does not see it where it is now; nor, if
    tables inherit from this one, are the rows of more than one table, since each has locations of its own.
    """
    first = select(func.min(locked.c.tableoid)).scalar_subquery()
    locations = select(locked.c.ctid).where(locked.c.tableoid == first).scalar_subquery()
    return and_(any_(func.array(locations)) == _CTID, first == _TABLE)


def _is_missing(key: Sequence[ColumnElement[Any]], of: CTE, among: CTE) -> list[ColumnElement[bool]]:
    """Which keys are not among others; told at once if there are as many here as there."""
    # a count and a hashed set, since the planner takes what was changed for a row, and would compare each with each
    here, there = (select(func.count()).select_from(table).scalar_subquery() for table in (of, among))
    return [there < here, tuple_(*key).not_in(select(*(among.c[part.key] for part in _KEY)))]


def _looked_up(mine: CTE) -> TableValuedAlias:
    """The same keys, to be looked up in the table one by one."""
    # the planner takes arrays that it cannot see for short ones; of the limit it would see how many keys there may be,
    # and for some hundred it would rather read a table of ten thousand rows
    arrays = (func.array(select(mine.c[part.key]).scalar_subquery()) for part in _KEY)
    return func.unnest(*arrays).table_valued(*(part.key for part in _KEY)).render_derived()


# -- leases -----------------------------------------------------------------------------------------------------------


def _lease(dialect: Name, *, clocked: bool) -> dict[str, Any]:
    return {
        "lease_token": _token(dialect),
        "lease_until": _until(dialect, clocked=clocked),
        "attempts": timers.c.attempts + _sql("1"),
    }


@cache
def claim(*, at_clock: bool, clocked: bool, with_names: bool) -> CompoundSelect[*tuple[Any, ...]]:
    """Lease on PostgreSQL the first due timers that nobody holds or has locked, and return them, in no order."""
    mine = _free_and_due(POSTGRESQL, (*_KEY, *_LOCATION), at_clock=at_clock, clocked=clocked, with_names=with_names)
    lease = update(timers).values(_lease(POSTGRESQL, clocked=clocked))
    return _changed(lease, mine, *_fetched(POSTGRESQL), type_coerce(timers.c.attempts, _RAW))


@cache
def lease_rows(*, clocked: bool) -> ReturningUpdate[*tuple[Any, ...]]:
    """Lease on the SQLite family the rows of `raw_rows` that are still the same and that nobody holds.

    It returns their keys, and how often each was claimed.
    """
    same = _is_in_rows(_INSTANT_LENGTH, timers.c.fire_at)
    return (
        update(timers)
        .values(_lease(SQLITE, clocked=clocked))
        .where(same, _free(SQLITE, clocked=clocked))
        .returning(*_KEY_BYTES, type_coerce(timers.c.attempts, _RAW))
    )


@cache
def confirm(dialect: Name) -> Executable:
    """Lock the row of one claim; it has one row, or its row count is one, if the claim still holds the timer."""
    mine = and_(_same_key(dialect), _has_token(_token(dialect)))
    if dialect == POSTGRESQL:
        return select(_sql("1")).select_from(timers).where(mine).with_for_update()
    # an update that changes nothing takes the write lock, however the transaction began
    return update(timers).values(lease_token=timers.c.lease_token).where(mine)


Settle = Literal["complete", "release", "extend"]
"""What ends a claim, or keeps it alive: delete the timer, give it back, lease it for longer."""


@cache
def settle(dialect: Name, how: Settle, *, moved: bool = False, clocked: bool = False) -> Executable:
    """Settle the claims of `claims`. The rows, for `unsettled`, name those that were; on PostgreSQL the others."""
    change = _settling(how, dialect, moved=moved, clocked=clocked)
    if dialect == SQLITE:
        alive = _is_in_rows(_TOKEN_LENGTH, timers.c.lease_token)
        return change.where(alive).returning(*_KEY_BYTES)
    lines = _lines("place", workflow=postgresql.UUID(), timer=Text(), token=postgresql.UUID())
    given = select(*lines.c).cte("given")

    def holds(table: Any) -> ColumnElement[bool]:  # noqa: ANN401 - the table or an alias of it
        return and_(
            type_coerce(table.c.workflow_id, _RAW) == given.c.workflow,
            type_coerce(table.c.timer_id, _RAW) == given.c.timer,
            type_coerce(table.c.lease_token, _RAW) == given.c.token,
        )

    # locked before the clock is looked at: an update that waits would set a time that is over
    mine = _locked(
        select(*_KEY, *_LOCATION).where(holds(timers)).order_by(*_KEY).with_for_update(of=timers, skip_locked=True)
    )
    # one that was moved meanwhile is as good as locked
    done = change.where(_is_at(mine)).returning(*_fetched(POSTGRESQL)[:2]).cte("done")
    before = timers.alias("before")
    return (
        select(given.c.place, type_coerce(before.c.lease_token, _RAW).is_not(None))
        .select_from(given.outerjoin(before, holds(before)))
        .where(*_is_missing([given.c.workflow, given.c.timer], given, done))
    )


def _settling(how: Settle, dialect: Name, *, moved: bool, clocked: bool) -> Delete | Update:
    match how:
        case "complete":
            return delete(timers)
        case "release":
            values: dict[str, Any] = {"lease_token": null(), "lease_until": null()}
            if moved:
                values["fire_at"] = _instant(dialect, "instant")
            return update(timers).values(values)
        case "extend":
            return update(timers).values(lease_until=_until(dialect, clocked=clocked))
        case other:
            assert_never(other)


# -- whole rows, to list and to copy ----------------------------------------------------------------------------------

By = Literal["instant", "key"]
"""In which order whole rows are read."""


def _fetched_lease(dialect: Name) -> list[ColumnElement[Any]]:
    token, until, attempts = timers.c.lease_token, timers.c.lease_until, timers.c.attempts
    if dialect == SQLITE:
        return [
            type_coerce(stored_bytes(token), _RAW),
            type_coerce(stored_bytes(until), _RAW),
            type_coerce(attempts, _RAW),
        ]
    return [
        type_coerce(token, _RAW),
        type_coerce(func.timezone(_sql("'UTC'"), until), _RAW),
        type_coerce(attempts, _RAW),
    ]


def _all_text() -> ColumnElement[bool]:
    return and_(*(func.typeof(type_coerce(of, _RAW)) == _sql("'text'") for of in _ORDER))


def _place(dialect: Name, by: By) -> list[ColumnElement[Any]]:
    if dialect == POSTGRESQL:
        place = [_instant(dialect, "at_instant"), _at_workflow(), bindparam("at_timer", type_=Text())]
    else:
        # as bytes, since a row's text need not be UTF-8
        names = ("at_instant", "at_workflow", "at_timer")
        place = [cast(bindparam(name, type_=LargeBinary()), Text) for name in names]
    return place if by == "instant" else place[1:]


def _at_workflow() -> ColumnElement[Any]:
    return cast(bindparam("at_workflow", type_=Text()), postgresql.UUID())


def place(dialect: Name, instant: str, workflow_id: str, timer_id: str) -> Parameters:
    """The parameters that name the last row of the page before by its stored texts."""
    texts = {"at_instant": instant, "at_workflow": workflow_id, "at_timer": timer_id}
    if dialect == POSTGRESQL:
        return dict(texts)
    return {name: text.encode(errors="surrogateescape") for name, text in texts.items()}


def place_of(dialect: Name, row: Row) -> tuple[str, str, str]:
    """The stored texts that name a fetched row, as `place` takes them."""
    workflow_id, timer_id, fire_at, *_ = row
    if dialect == POSTGRESQL:
        return fire_at.isoformat() + "Z", str(workflow_id), timer_id
    instant, workflow, timer = (value.decode(errors="surrogateescape") for value in (fire_at, workflow_id, timer_id))
    return instant, workflow, timer


def span(dialect: Name, since: datetime | None, before: datetime | None, until: datetime | None) -> Parameters:
    """The parameters of a span of instants: its first one, its end, and its last one."""
    given = {"since": since, "before": before}
    parameters = {name: encode_instant(instant) for name, instant in given.items() if instant is not None}
    return parameters if until is None else {**parameters, **due_at(dialect, until)}


@cache
def records(
    dialect: Name,
    by: By,
    *,
    paged: bool = False,
    of_workflow: bool = False,
    with_names: bool = False,
    since: bool = False,
    before: bool = False,
    until: bool = False,
    held: bool | None = None,
) -> Select[*tuple[Any, ...]]:
    """Whole rows in order, up to a limit; on the SQLite family those whose key and instant are text."""
    order = _ORDER if by == "instant" else _KEY
    statement = select(*_fetched(dialect), *_fetched_lease(dialect)).order_by(*order).limit(_limit())
    if dialect == SQLITE:
        statement = statement.where(_all_text())
    if by == "instant":
        statement = statement.where(_in_range(dialect))
    if paged:
        statement = statement.where(tuple_(*order) > tuple_(*_place(dialect, by)))
    if of_workflow:
        statement = statement.where(_of_workflow(dialect))
    if with_names:
        statement = statement.where(_has_name(dialect))
    if since:
        statement = statement.where(timers.c.fire_at >= _instant(dialect, "since"))
    if before:
        statement = statement.where(timers.c.fire_at < _instant(dialect, "before"))
    if until:
        statement = statement.where(_due(dialect, at_clock=False))
    if held is not None:
        condition = _held(dialect, clocked=False) if held else _free(dialect, clocked=False)
        statement = statement.where(condition)
    return statement


@cache
def not_text() -> Select[*tuple[Any, ...]]:
    """The rows of the SQLite family that `records` passes over in the order of keys, up to a limit."""
    return select(*_fetched(SQLITE)).where(not_(_all_text())).limit(_limit())


def decode_lease(dialect: Name, row: Row) -> tuple[UUID | None, datetime | None, int]:
    """The lease that a row of `records` holds: its token, its end, and how often the timer has been claimed.

    Raises:
        NotCanonicalError: another program wrote it in a form of its own.
    """
    token, until, attempts = row[3:]
    if dialect == POSTGRESQL:
        return token, None if until is None else until.replace(tzinfo=UTC), attempts
    if type(attempts) is not int or not 0 <= attempts <= _MOST_ATTEMPTS or (token is None) != (until is None):
        raise NotCanonicalError(row)
    if token is None:
        return None, None, attempts
    try:
        stored = token.decode()
        made = UUID(stored)
        if str(made) != stored:
            raise NotCanonicalError(row)
        return made, decode_instant(until.decode()), attempts
    except (ValueError, AttributeError) as error:
        raise NotCanonicalError(row) from error


_MOST_ATTEMPTS: Final = 2**31 - 1  # what PostgreSQL's column takes


def keys(dialect: Name, many: Iterable[tuple[UUID, TimerId]]) -> Parameters:
    """The parameters that name many timers."""
    encode = _workflow_encoder(dialect)
    rows = sorted((encode(workflow_id), encode_timer_id(timer_id)) for workflow_id, timer_id in many)
    if dialect == SQLITE:
        return {"rows": _json([_joined(*row, "") for row in rows])}
    workflows, ids = zip(*rows, strict=True)
    return {"workflows": "\n".join(workflows), "timers": "\n".join(ids)}


def _has_given_key(dialect: Name) -> ColumnElement[bool]:
    if dialect == SQLITE:
        return _is_in_rows(0)
    given = select(*_lines(workflow=postgresql.UUID(), timer=Text()).c).cte("given")
    return _is_in_keys(given)


def _is_in_keys(given: CTE) -> ColumnElement[bool]:
    workflow_id, timer_id = type_coerce(timers.c.workflow_id, _RAW), type_coerce(timers.c.timer_id, _RAW)
    return and_(workflow_id == given.c.workflow, timer_id == given.c.timer)


@cache
def records_of(dialect: Name) -> Select[*tuple[Any, ...]]:
    """The whole rows of the timers that `keys` names, in no order."""
    return select(*_fetched(dialect), *_fetched_lease(dialect)).where(_has_given_key(dialect))


@cache
def delete_keys(dialect: Name) -> Delete:
    """Delete the timers that `keys` names."""
    return delete(timers).where(_has_given_key(dialect))


Whole: TypeAlias = tuple[TimerEntry, UUID | None, datetime | None, int]
"""A whole row: its timer, the token and the end of its lease, and how often it has been claimed."""


def whole_rows(dialect: Name, many: Iterable[Whole]) -> Parameters:
    """The parameters of whole rows to write, leases and all."""
    if dialect == SQLITE:
        rows = [
            (
                encode_workflow_id(timer.workflow_id),
                encode_timer_id(timer.timer_id),
                timer.stored_instant,
                None if token is None else str(token),
                None if until is None else encode_instant(until),
                attempts,
            )
            for timer, token, until, attempts in many
        ]
        return {"rows": _json(rows)}
    lines = [
        (
            timer.workflow_id.hex,
            encode_timer_id(timer.timer_id),
            encode_instant(timer.fire_at),
            "" if token is None else token.hex,
            "" if until is None else encode_instant(until),
            str(attempts),
        )
        for timer, token, until, attempts in many
    ]
    names = ("workflows", "timers", "instants", "tokens", "untils", "attemptss")
    return {name: "\n".join(values) for name, values in zip(names, zip(*lines, strict=True), strict=True)}


@cache
def insert_whole(dialect: Name) -> Insert:
    """Insert the rows of `whole_rows`; where a key is taken, its row is left; the row count says how many came in."""
    if dialect == SQLITE:
        row = func.json_each(bindparam("rows", type_=Text())).table_valued("value").c.value
        source = select(*(func.json_extract(row, _sql(f"'$[{at}]'")) for at in range(6))).where(true())
    else:
        columns: dict[str, TypeEngine[Any]] = {
            "workflow": postgresql.UUID(),
            "timer": Text(),
            "instant": _TIMESTAMP,
            "token": postgresql.UUID(),
            "until": _TIMESTAMP,
            "attempts": Integer(),
        }
        source = select(*_lines(empty_is_null=True, **columns).c)
    names = ["workflow_id", "timer_id", "fire_at", "lease_token", "lease_until", "attempts"]
    insert = _insert(dialect).from_select(names, source, include_defaults=False)
    return insert.on_conflict_do_nothing().execution_options(preserve_rowcount=True)


# -- figures ----------------------------------------------------------------------------------------------------------


@cache
def tally(dialect: Name) -> Select[*tuple[Any, ...]]:
    """How many timers up to ``horizon`` are due at ``now`` and free, how many are held, and how many there are."""
    held = _held(dialect, clocked=True)
    free = or_(type_coerce(timers.c.lease_until, _RAW).is_(None), not_(held))
    due = timers.c.fire_at <= _instant(dialect, "now")
    return select(func.count().filter(and_(due, free)), func.count().filter(held), func.count()).where(
        _in_range(dialect), timers.c.fire_at <= _instant(dialect, "horizon")
    )


def tallied(now: datetime, horizon: datetime) -> Parameters:
    """The parameters of `tally`."""
    return {"now": encode_instant(now), "horizon": encode_instant(horizon)}


@cache
def count() -> Select[*tuple[Any, ...]]:
    """How many rows there are."""
    return select(func.count()).select_from(timers)


@cache
def held(dialect: Name) -> Select[*tuple[Any, ...]]:
    """How many timers are held."""
    return select(func.count()).select_from(timers).where(_held(dialect, clocked=False))


@cache
def leases(dialect: Name) -> Select[*tuple[Any, ...]]:
    """How many leases ended before ``ended``, how many last beyond ``far``, and what was attempted ``many`` times."""
    until = type_coerce(timers.c.lease_until, _RAW)
    return select(
        func.count().filter(until < _instant(dialect, "ended")),
        func.count().filter(until > _instant(dialect, "far")),
        func.count().filter(timers.c.attempts >= bindparam("many", type_=Integer())),
        func.max(timers.c.attempts),
    ).select_from(timers)


def leases_at(ended: datetime, far: datetime, many: int) -> Parameters:
    """The parameters of `leases`."""
    return {"ended": encode_instant(ended), "far": encode_instant(far), "many": many}
