"""The table ``timers``: its metadata, its column types, and the declarative model `Timer`.

On PostgreSQL the columns have native types. On the SQLite family they hold the text of `aion_timers.values`, which
another program reads and writes too. Columns are read as bytes there, since text that is not UTF-8 makes the drivers
fail, and decoded here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    ColumnElement,
    DateTime,
    Dialect,
    ExecutableDDLElement,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    Uuid,
    and_,
    case,
    cast,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates
from sqlalchemy.sql import operators
from sqlalchemy.sql.expression import FunctionElement, SelectBase

from aion_timers.errors import ForeignRowError, InvalidInputError
from aion_timers.values import (
    MAX_ENCODED_TIMER_ID,
    NotCanonicalError,
    TimerId,
    check_workflow_id,
    decode_instant,
    decode_timer_id,
    decode_workflow_id,
    encode_instant,
    encode_timer_id,
    encode_workflow_id,
    utc,
)

if TYPE_CHECKING:
    from sqlalchemy.sql.compiler import DDLCompiler, SQLCompiler
    from sqlalchemy.types import TypeEngine

SQLITE: Final = "sqlite"
POSTGRESQL: Final = "postgresql"


# -- columns as they are read -----------------------------------------------------------------------------------------


class _AsRead(FunctionElement[Any]):
    """A column in the form in which a SELECT list or RETURNING fetches it."""

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        super().__init__(column)
        self.type = column.type


@compiles(_AsRead)
def _as_is(element: _AsRead, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    return compiler.process(column, **options)


def stored_bytes(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """The bytes of stored text on the SQLite family; of NULL, NULL; of any other value, a ``str`` that shows it."""
    return case(
        (func.typeof(column) == literal_column("'text'"), cast(column, LargeBinary)),
        (column.is_not(None), literal_column("'not text: '").concat(func.hex(column))),
    )


@compiles(_AsRead, SQLITE)
def _as_bytes(element: _AsRead, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    return compiler.process(stored_bytes(column), **options)


class _InstantAsRead(_AsRead):
    inherit_cache = True


@compiles(_InstantAsRead, POSTGRESQL)
def _in_utc(element: _InstantAsRead, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    # psycopg reads an instant in the session's time zone, where the ends of the range are no datetimes
    (column,) = element.clauses
    return compiler.process(func.timezone(literal_column("'UTC'"), column), **options)


# -- ids that meet a host's own columns -------------------------------------------------------------------------------


class _WorkflowIdOf(FunctionElement[Any]):
    """A host's UUID column, written as ``timers.workflow_id`` is."""

    inherit_cache = True
    name = "workflow_id_of"


class _UuidOf(FunctionElement[Any]):
    """``timers.workflow_id``, written as SQLAlchemy's `Uuid` column type is."""

    inherit_cache = True
    name = "uuid_of"


class _DigitsOf(_UuidOf):
    """``timers.workflow_id``, written as `Uuid` is that a host doesn't want to be native: 32 digits everywhere."""

    inherit_cache = True
    name = "digits_of"


@compiles(_WorkflowIdOf, POSTGRESQL)
def _as_uuid(element: _WorkflowIdOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    native = not isinstance(column.type, Uuid) or column.type.native_uuid
    return compiler.process(column if native else cast(column, PG_UUID), **options)


@compiles(_UuidOf, POSTGRESQL)
def _native(element: _UuidOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    return compiler.process(column, **options)


@compiles(_DigitsOf, POSTGRESQL)
def _digits_of_native(element: _DigitsOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    return compiler.process(func.replace(cast(column, Text), "-", ""), **options)


@compiles(_WorkflowIdOf, SQLITE)
def _quoted(element: _WorkflowIdOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    digits = [
        func.substr(column, start, length, type_=Text) for start, length in ((1, 8), (9, 4), (13, 4), (17, 4), (21, 12))
    ]
    text = func.lower(digits[0] + "-" + digits[1] + "-" + digits[2] + "-" + digits[3] + "-" + digits[4])
    return "(" + compiler.process(func.json_quote(text), **options) + ")"


@compiles(_UuidOf, SQLITE)
def _digits(element: _UuidOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (column,) = element.clauses
    return compiler.process(func.replace(func.trim(column, '"'), "-", ""), **options)


class _WorkflowIds(TypeDecorator.Comparator[UUID]):
    """Compares with a host's `Uuid` columns, which the SQLite family stores in another form.

    Only the left operand of an operator is asked, so the timer's column has to stand there.
    """

    def operate(self, op: Any, *other: Any, **kwargs: Any) -> ColumnElement[Any]:  # noqa: ANN401 - as the base declares
        if len(other) == 1:
            operand = other[0].__clause_element__() if hasattr(other[0], "__clause_element__") else other[0]
            if isinstance(operand, ColumnElement) and isinstance(operand.type, String):
                raise InvalidInputError(
                    "workflow_id",
                    str(operand),
                    "compared with a column of text",
                    "compare it with a column of type Uuid",
                )
            if isinstance(operand, ColumnElement) and isinstance(operand.type, Uuid):
                same = super().operate(op, _WorkflowIdOf(operand), **kwargs)
                if op is not operators.eq:
                    return same
                # said both ways round, either table's index can serve the join
                uuid_of = _UuidOf if operand.type.native_uuid else _DigitsOf
                return and_(same, operators.eq(operand, uuid_of(self.expr)))
            if op in (operators.in_op, operators.not_in_op) and isinstance(operand, SelectBase):
                (column,) = operand.subquery().columns
                if isinstance(column.type, Uuid):
                    return super().operate(op, select(_WorkflowIdOf(column)), **kwargs)
        return super().operate(op, *other, **kwargs)


class _TimerIds(TypeDecorator.Comparator[TimerId]):
    """Compares whole ids: what is stored is their JSON text, of which no part is worth comparing."""

    def operate(self, op: Any, *other: Any, **kwargs: Any) -> ColumnElement[Any]:  # noqa: ANN401 - as the base declares
        if op in _LIKE:
            raise InvalidInputError(
                "timer_id",
                other[0],
                "a part of an id cannot be compared",
                "use the repository's take(names=['retry-*'])",
            )
        return super().operate(op, *other, **kwargs)


_LIKE: Final = {
    *(operators.like_op, operators.not_like_op, operators.ilike_op, operators.not_ilike_op),
    *(operators.startswith_op, operators.not_startswith_op, operators.istartswith_op, operators.not_istartswith_op),
    *(operators.endswith_op, operators.not_endswith_op, operators.iendswith_op, operators.not_iendswith_op),
    *(operators.contains_op, operators.not_contains_op, operators.icontains_op, operators.not_icontains_op),
}


class _InstantOf(FunctionElement[Any]):
    """An instant of another type, such as ``func.now()`` or a host's `DateTime` column, written as ours are."""

    inherit_cache = True
    name = "instant_of"


@compiles(_InstantOf, POSTGRESQL)
def _instant_as_is(element: _InstantOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    (value,) = element.clauses
    return compiler.process(value, **options)


@compiles(_InstantOf, SQLITE)
def _instant_text(element: _InstantOf, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ANN401 - the compiler's own options
    # SQLAlchemy and SQLite write UTC with a space, and with six digits of fraction or none
    (value,) = element.clauses
    rest = func.substr(literal_column("'.000000000Z'"), func.length(value) - literal_column("18"))
    text = func.replace(value, literal_column("' '"), literal_column("'T'"), type_=Text)
    return "(" + compiler.process(text.concat(rest), **options) + ")"


class _Instants(TypeDecorator.Comparator[datetime]):
    """Compares with instants of other types, which the SQLite family stores in another form."""

    def operate(self, op: Any, *other: Any, **kwargs: Any) -> ColumnElement[Any]:  # noqa: ANN401 - as the base declares
        if len(other) == 1:
            operand = other[0].__clause_element__() if hasattr(other[0], "__clause_element__") else other[0]
            if isinstance(operand, ColumnElement) and isinstance(operand.type, DateTime):
                return super().operate(op, _InstantOf(operand), **kwargs)
        return super().operate(op, *other, **kwargs)


# -- column types -----------------------------------------------------------------------------------------------------


def _foreign(problem: str, stored: object) -> ForeignRowError:
    return ForeignRowError(
        (stored,),
        problem,
        "another program wrote it, and it is left as it is; the methods of the repository read round such rows",
    )


def _text(value: bytes | str) -> str:
    # text where the host's own SQL fetched the column as it is
    return value.decode() if isinstance(value, bytes) else value


class WorkflowIdType(TypeDecorator[UUID]):
    """A UUID: native on PostgreSQL, the UUID as a JSON string on the SQLite family.

    Compares with a host's `Uuid` column if it stands on the left: ``Timer.workflow_id == Order.id``.
    """

    impl = Text
    cache_ok = True
    comparator_factory = _WorkflowIds

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return Uuid() if dialect.name == POSTGRESQL else Text()

    def process_bind_param(self, value: UUID | None, dialect: Dialect) -> UUID | str | None:
        if value is None:
            return None
        workflow_id = check_workflow_id(value)
        return workflow_id if dialect.name == POSTGRESQL else encode_workflow_id(workflow_id)

    def process_result_value(self, value: Any, dialect: Dialect) -> UUID | None:  # noqa: ANN401 - what the driver gives
        if value is None or isinstance(value, UUID):
            return value
        try:
            return decode_workflow_id(_text(value))
        except (NotCanonicalError, UnicodeDecodeError):
            raise _foreign("its workflow id is not in canonical form", value) from None

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return _AsRead(column)


class TimerIdType(TypeDecorator[TimerId]):
    """A `TimerId` as compact JSON text, in byte order on every database. Binds a plain ``str`` or ``int`` too."""

    impl = Text
    cache_ok = True
    comparator_factory = _TimerIds

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return Text(collation="C") if dialect.name == POSTGRESQL else Text()

    def process_bind_param(self, value: TimerId | str | int | None, dialect: Dialect) -> str | None:
        return None if value is None else encode_timer_id(TimerId.of(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> TimerId | None:  # noqa: ANN401 - what the driver gives
        if value is None:
            return None
        try:
            return decode_timer_id(_text(value))
        except (NotCanonicalError, UnicodeDecodeError):
            raise _foreign("its timer id is not in canonical form", value) from None

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return _AsRead(column)


class InstantType(TypeDecorator[datetime]):
    """An aware datetime, read in UTC: a timestamp on PostgreSQL, RFC 3339 text with nine digits on the SQLite family.

    A stored fraction finer than a microsecond is rounded up when it is read. Compares with ``func.now()`` and with a
    host's `DateTime` columns, whose values mean UTC on the SQLite family, if it stands on the left.
    """

    impl = Text
    cache_ok = True
    comparator_factory = _Instants

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return TIMESTAMP(timezone=True) if dialect.name == POSTGRESQL else Text()

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | str | None:
        if value is None:
            return None
        instant = utc("instant", value)
        return instant if dialect.name == POSTGRESQL else encode_instant(instant)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ANN401 - what the driver gives
        if value is None:
            return None
        if isinstance(value, datetime):
            # aware where the host's own SQL fetched the column as it is
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        try:
            return decode_instant(_text(value))
        except (NotCanonicalError, UnicodeDecodeError):
            raise _foreign("its instant is not in canonical form", value) from None

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return _InstantAsRead(column)


class LeaseTokenType(TypeDecorator[UUID]):
    """A UUID that no other program reads: native on PostgreSQL, its 36 characters on the SQLite family."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return Uuid() if dialect.name == POSTGRESQL else Text()

    def process_bind_param(self, value: UUID | None, dialect: Dialect) -> UUID | str | None:
        return value if value is None or dialect.name == POSTGRESQL else str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> UUID | None:  # noqa: ANN401 - what the driver gives
        if value is None or isinstance(value, UUID):
            return value
        try:
            stored = value.decode()
            token = UUID(stored)
        except (ValueError, AttributeError):
            raise _foreign("its lease token is no UUID", value) from None
        if stored != str(token):
            raise _foreign("its lease token is not in canonical form", value)
        return token

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return _AsRead(column)


# -- the table --------------------------------------------------------------------------------------------------------

metadata = MetaData()


class Base(DeclarativeBase):
    """The base of this library's model, with a metadata of its own, apart from a host's."""

    metadata = metadata


_TIMER_ID_SHAPE: Final = (
    r'^\{("Named":"([^"\\\x01-\x1f]|\\(["\\bfnrt]|u00[01][0-9a-f]))*"|"Anonymous":(0|[1-9][0-9]{0,19}))\}$'
)


_STORAGE: Final = {
    # a batch of timers that fall due together stands together: half of a page lets nearly all of them be leased without
    # a new entry in either index
    "fillfactor": 50,
    # what was fired lies dead at the head of the index, where every claim begins: by default a fifth of all timers
    "autovacuum_vacuum_scale_factor": 0.01,
    "autovacuum_vacuum_threshold": 1000,
}


class Timer(Base):
    """A timer, for reading and for joining with a host's own tables.

    In a comparison with a host's `Uuid` column the timer's column has to stand on the left, since the SQLite family
    stores the two in different forms and only the left operand can know::

        select(Order).join(Timer, Timer.workflow_id == Order.id)
        select(Timer).where(Timer.workflow_id.in_(select(Order.id)))
        select(Order).where(~exists().where(Timer.workflow_id == Order.id))  # not Order.id.not_in(...)

    On PostgreSQL, where an instant is fetched in UTC whatever the session's time zone, ``ORDER BY`` of a ``SELECT
    DISTINCT`` cannot name ``fire_at``.

    Writing through the model goes past what the repository does when a timer is moved or cancelled: use
    `TimerRepository` for that. On the SQLite family a row that another program wrote in a form of its own raises
    `ForeignRowError` when it is loaded here; the repository reads round it.
    """

    __tablename__ = "timers"

    workflow_id: Mapped[UUID] = mapped_column(WorkflowIdType, primary_key=True)
    timer_id: Mapped[TimerId] = mapped_column(TimerIdType, primary_key=True)
    fire_at: Mapped[datetime] = mapped_column(InstantType)
    lease_token: Mapped[UUID | None] = mapped_column(LeaseTokenType)
    lease_until: Mapped[datetime | None] = mapped_column(InstantType)
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))

    __table_args__ = (
        Index("idx_timers_fire_at", "fire_at", "workflow_id", "timer_id"),
        # the SQLite family's table is shared with another program, which may write what it likes
        CheckConstraint(
            f"timer_id ~ '{_TIMER_ID_SHAPE}' AND octet_length(timer_id) <= {MAX_ENCODED_TIMER_ID}"
            " AND CASE WHEN left(timer_id, 13) = '{\"Anonymous\":'"
            " THEN substr(timer_id, 14, length(timer_id) - 14)::numeric <= 18446744073709551615 ELSE true END",
            name="ck_timers_timer_id",
        ).ddl_if(dialect=POSTGRESQL),
        CheckConstraint(
            "fire_at >= '0001-01-01 00:00:00+00' AND fire_at <= '9999-12-31 23:59:59.999999+00'",
            name="ck_timers_fire_at",
        ).ddl_if(dialect=POSTGRESQL),
        CheckConstraint("(lease_token IS NULL) = (lease_until IS NULL)", name="ck_timers_lease").ddl_if(
            dialect=POSTGRESQL
        ),
        CheckConstraint(
            "lease_until >= '0001-01-01 00:00:00+00' AND lease_until <= '9999-12-31 23:59:59.999999+00'",
            name="ck_timers_lease_until",
        ).ddl_if(dialect=POSTGRESQL),
        CheckConstraint("attempts >= 0", name="ck_timers_attempts").ddl_if(dialect=POSTGRESQL),
        {"sqlite_with_rowid": False, "postgresql_with": _STORAGE},
    )

    @validates("timer_id")
    def _as_id(self, _: str, value: TimerId | str | int | None) -> TimerId | None:
        # else a timer that is made with a name would not be found by its id
        return None if value is None else TimerId.of(value)

    def __repr__(self) -> str:
        # what is not loaded stays so: a line of a log must not go to the database
        loaded = self.__dict__
        shown = ", ".join(f"{name}={loaded.get(name, '...')!r}" for name in ("workflow_id", "timer_id", "fire_at"))
        return f"Timer({shown})"


timers: Final[Table] = metadata.tables["timers"]


class MovedTrigger(ExecutableDDLElement):
    """Ends the lease on a row, and restarts its attempts, if a statement moves it that knows nothing of leases.

    That is how the other program moves a timer. Without it the claimer would settle, and so delete, a timer that is due
    at another time by now. A statement of ours that moves a row sets its token and its attempts as they shall be.
    """

    name: Final = "timers_moved"

    def __init__(self, table: Table) -> None:
        self.table = table

    def sql(self, prefix: str = "") -> str:
        """The statement that makes it in the schema of the prefix, which has to be its table's."""
        return _MOVED.format(name=prefix + self.name)


# what it sets is no fire_at, so it doesn't call itself where recursive triggers are on
_MOVED: Final = """\
CREATE TRIGGER {name}
AFTER UPDATE OF fire_at ON timers
WHEN NEW.lease_token IS OLD.lease_token AND (OLD.lease_token IS NOT NULL OR OLD.attempts <> 0)
BEGIN
    UPDATE timers SET lease_token = NULL, lease_until = NULL, attempts = 0
    WHERE workflow_id = NEW.workflow_id AND timer_id = NEW.timer_id;
END"""


@compiles(MovedTrigger, SQLITE)
def _create_trigger(element: MovedTrigger, compiler: DDLCompiler, **_: Any) -> str:  # noqa: ANN401 - the compiler's own options
    schema = compiler.preparer.schema_for_object(element.table)
    return element.sql(f"{compiler.preparer.quote_schema(schema)}." if schema else "")


event.listen(timers, "after_create", MovedTrigger(timers).execute_if(dialect=SQLITE))
