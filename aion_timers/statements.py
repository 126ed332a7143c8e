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
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, assert_never

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Delete,
    Dialect,
    Executable,
    Insert,
    Integer,
    LargeBinary,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    false,
    func,
    literal_column,
    not_,
    or_,
    select,
    true,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import NullType

from aion_timers.schema import POSTGRESQL, SQLITE, stored_bytes, timers
from aion_timers.values import (
    TimerEntry,
    TimerId,
    decode_columns,
    decode_row,
    encode_as_of,
    encode_instant,
    encode_timer_id,
    encode_workflow_id,
)

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.sql.dml import ReturningDelete
    from sqlalchemy.types import TypeEngine

IfExists = Literal["replace", "keep", "earliest", "latest"]
"""What becomes of a timer that has the same key: it is moved, left, or moved if that is earlier or later."""

Name = Literal["sqlite", "postgresql"]
"""The name of a dialect that there are statements for."""

Parameters: TypeAlias = dict[str, Any]
Row: TypeAlias = Sequence[Any]

_KEY: Final = (timers.c.workflow_id, timers.c.timer_id)
_ORDER: Final = (timers.c.fire_at, *_KEY)
_EARLIEST: Final = "0001-01-01T00:00:00.000000000Z"
_RAW: Final = NullType()
_TIMESTAMP: Final = postgresql.TIMESTAMP(timezone=True)
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


def entries(dialect: Name, many: Iterable[TimerEntry], if_exists: IfExists) -> Parameters:
    """The parameters of many timers to write: one row a key, as if they were written in the order given."""
    rows: dict[tuple[str, str], str] = {}
    for timer in many:
        # digits alone, which PostgreSQL reads too, take a quarter of the time of the usual text
        workflow_id = timer.workflow_id.hex if dialect == POSTGRESQL else encode_workflow_id(timer.workflow_id)
        place = (workflow_id, encode_timer_id(timer.timer_id))
        instant = encode_instant(timer.fire_at)
        if place not in rows or _moves(if_exists, rows[place], instant):
            rows[place] = instant
    ordered = sorted((*place, instant) for place, instant in rows.items())
    if dialect == SQLITE:
        return {"rows": _json(ordered)}
    workflows, ids, instants = zip(*ordered, strict=True)
    return {"workflows": "\n".join(workflows), "timers": "\n".join(ids), "instants": "\n".join(instants)}


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
    """The parameter of `delete_rows`: rows just as they were fetched as bytes, in canonical form."""
    return {"rows": _json([[value.decode() for value in row] for row in rows])}


def decoder(dialect: Name) -> Callable[..., TimerEntry]:
    """The function that takes a fetched row's values and gives its timer, as `decode` does."""
    return decode_columns if dialect == POSTGRESQL else decode_row


def decode(dialect: Name, row: Row) -> TimerEntry:
    """The timer that a fetched row holds.

    Raises:
        NotCanonicalError: another program wrote the row in a form of its own.
    """
    return decode_columns(*row) if dialect == POSTGRESQL else decode_row(*row)


def order(row: Row) -> tuple[Any, ...]:
    """The sort key of a row that PostgreSQL returned."""
    workflow_id, timer_id, fire_at = row
    return fire_at, workflow_id, timer_id


# -- parts of statements ----------------------------------------------------------------------------------------------


def _sql(text: str) -> ColumnElement[Any]:
    """A constant of ours, written out so that it is not bound again at each execution."""
    return literal_column(text, _RAW)


def _workflow(dialect: Name) -> ColumnElement[Any]:
    return bindparam("workflow", type_=postgresql.UUID() if dialect == POSTGRESQL else Text())


def _timer() -> ColumnElement[Any]:
    return bindparam("timer", type_=Text())


def _instant(dialect: Name, name: str) -> ColumnElement[Any]:
    text = bindparam(name, type_=Text())
    # sent as text to PostgreSQL too, since asyncpg turns the first and the last datetime into infinity
    return cast(text, _TIMESTAMP) if dialect == POSTGRESQL else text


def _fetched(dialect: Name) -> list[ColumnElement[Any]]:
    if dialect == SQLITE:
        # text that is not UTF-8 makes the drivers fail
        return [type_coerce(stored_bytes(of), _RAW).label(of.key) for of in timers.c]
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
    text = type_coerce(timers.c.timer_id, Text())
    # by length, of which there are few, and not by prefix: each row is compared so often
    length = _each(dialect, "lengths", BigInteger()).subquery().columns[0]
    beginning = func.substr(text, _sql("1"), cast(length, Integer))
    begins = select(_sql("1")).where(beginning.in_(_each(dialect, "prefixes", Text()))).select_from(length.table)
    return or_(text.in_(_each(dialect, "exact", Text())), begins.exists())


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


def _upsert(dialect: Name, if_exists: IfExists, insert: sqlite.Insert | postgresql.Insert) -> Insert:
    new = insert.excluded.fire_at
    condition: ColumnElement[bool]
    match if_exists:
        case "replace":
            condition = true()
        case "keep":
            # not DO NOTHING, which does not wait for a row that another transaction is deleting
            condition = false()
        case "earliest":
            condition = new < timers.c.fire_at
        case "latest":
            condition = new > timers.c.fire_at
        case other:
            assert_never(other)
    if dialect == SQLITE:
        condition = and_(condition, _canonical_instant())
    statement = insert.on_conflict_do_update(
        index_elements=["workflow_id", "timer_id"], set_={"fire_at": new}, where=condition
    )
    return statement.execution_options(preserve_rowcount=True)


def _insert(dialect: Name) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(timers) if dialect == SQLITE else postgresql.insert(timers)


# -- statements -------------------------------------------------------------------------------------------------------


@cache
def schedule(dialect: Name, if_exists: IfExists) -> Insert:
    """Insert the timer of `entry`, or change the one with its key; the row count says whether the row changed."""
    insert = _insert(dialect).values(
        workflow_id=_workflow(dialect), timer_id=_timer(), fire_at=_instant(dialect, "instant")
    )
    return _upsert(dialect, if_exists, insert)


@cache
def schedule_many(dialect: Name, if_exists: IfExists) -> Insert:
    """Like `schedule`, for the timers of `entries`."""
    # on the SQLite family all or nothing: a row that cannot be moved stops its whole chunk
    source = _given_rows().where(not_(_foreign_among().exists())) if dialect == SQLITE else _given_arrays()
    return _upsert(dialect, if_exists, _insert(dialect).from_select([*timers.c.keys()], source))


def _given_rows() -> Select[*tuple[Any, ...]]:
    row = func.json_each(bindparam("rows", type_=Text())).table_valued("value").c.value
    # WHERE tells the parser that the ON after it is the upsert's, not a join's
    return select(*(func.json_extract(row, _sql(f"'$[{place}]'"), type_=Text()) for place in range(3))).where(true())


def _given_arrays() -> Select[*tuple[Any, ...]]:
    # lines of text, since psycopg takes as long to write an array as the server to insert it; JSON holds no line break
    arrays: dict[str, ARRAY[Any]] = {
        "workflows": ARRAY(postgresql.UUID()),
        "timers": ARRAY(Text()),
        "instants": ARRAY(_TIMESTAMP),
    }
    lines = (
        cast(func.string_to_array(bindparam(name, type_=Text()), _sql("E'\\n'")), type_)
        for name, type_ in arrays.items()
    )
    columns = func.unnest(*lines).table_valued("workflow_id", "timer_id", "fire_at").render_derived().c
    return select(columns.workflow_id, columns.timer_id, columns.fire_at)


def _foreign_among() -> Select[*tuple[Any, ...]]:
    given = _given_rows().subquery()
    same = tuple_(*_KEY).in_(select(given.columns[0], given.columns[1]))
    return select(*_fetched(SQLITE)).where(same, func.coalesce(not_(_canonical_instant()), true()))


@cache
def foreign_among() -> Select[*tuple[Any, ...]]:
    """Which rows of the SQLite family stand under keys of `entries`, and cannot be moved: their instant is foreign."""
    return _foreign_among()


@cache
def expired(
    dialect: Name, *, at_clock: bool, paged: bool, limited: bool, with_names: bool = False
) -> Select[*tuple[Any, ...]]:
    """The due timers in order, from a page's beginning, up to a limit, of some names."""
    statement = select(*_fetched(dialect)).where(_due(dialect, at_clock=at_clock)).order_by(*_ORDER)
    if paged:
        last = tuple_(_instant(dialect, "instant"), _workflow(dialect), _timer())
        statement = statement.where(tuple_(*_ORDER) > last)
    if with_names:
        statement = statement.where(_has_name(dialect))
    return statement.limit(bindparam("limit", type_=BigInteger())) if limited else statement


@cache
def next_fire_at(dialect: Name) -> Select[*tuple[Any, ...]]:
    """The first timers of all, in order, up to a limit."""
    return (
        select(*_fetched(dialect))
        .where(_in_range(dialect))
        .order_by(*_ORDER)
        .limit(bindparam("limit", type_=BigInteger()))
    )


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
def delete_rows() -> ReturningDelete[*tuple[Any, ...]]:
    """Delete on the SQLite family the rows of `raw_rows`, as far as they are still the same, and return their keys."""
    row = func.json_each(bindparam("rows", type_=Text())).table_valued("value").c.value
    stored = [func.json_extract(row, _sql(f"'$[{place}]'"), type_=Text()) for place in range(3)]
    return delete(timers).where(tuple_(*timers.c).in_(select(*stored))).returning(*_fetched(SQLITE))


@cache
def cancel_workflow() -> ReturningDelete[*tuple[Any, ...]]:
    """Delete on PostgreSQL all timers of one workflow and return them."""
    mine = select(*_KEY).where(_of_workflow(POSTGRESQL)).order_by(*_KEY).with_for_update()
    # said again outside, so that the index serves even where the table has no statistics
    return _delete_locked(mine).where(_of_workflow(POSTGRESQL))


@cache
def take(*, at_clock: bool, with_names: bool) -> ReturningDelete[*tuple[Any, ...]]:
    """Delete on PostgreSQL the first due timers that nobody has locked, up to a limit, and return them, in no order."""
    mine = select(*_KEY).where(_due(POSTGRESQL, at_clock=at_clock)).order_by(*_ORDER)
    if with_names:
        mine = mine.where(_has_name(POSTGRESQL))
    return _delete_locked(mine.limit(bindparam("limit", type_=BigInteger())).with_for_update(skip_locked=True))


def _delete_locked(mine: Select[*tuple[Any, ...]]) -> ReturningDelete[*tuple[Any, ...]]:
    # materialized, so that the limit and the locks are taken once; joined by key, since a row that moved meanwhile
    # has another ctid
    locked = mine.cte("mine").prefix_with("MATERIALIZED", dialect=POSTGRESQL)
    return (
        delete(timers)
        .where(timers.c.workflow_id == locked.c.workflow_id, timers.c.timer_id == locked.c.timer_id)
        .returning(*_fetched(POSTGRESQL))
    )
