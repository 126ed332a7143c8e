"""Create or adopt the table timers.

What can be adopted is the table that Aion's crate ``aion-store-libsql`` made. A table of ours is WITHOUT ROWID on the
SQLite family and the crate's is not, which is how the two are told apart. An adopted table only gets a wider index, and
the way down puts the crate's own index back.

Revision ID: aion0001
Revises:
Create Date: 2026-11-25
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from aion_timers.errors import DowngradeRefusedError, MigrationError, UnsupportedBindError

revision = "aion0001"
down_revision = None
branch_labels = ("aion_timers",)
depends_on = None

TABLE = "timers"
INDEX = "idx_timers_fire_at"
KEY = ("workflow_id", "timer_id")
INDEXED = ("fire_at", "workflow_id", "timer_id")
# to the letter, so that sqlite_master is afterwards what it was before
INDEX_OF_THE_CRATE = "CREATE INDEX {index}\nON timers (fire_at)"

TIMER_ID_SHAPE = r'^\{("Named":"([^"\\\x01-\x1f]|\\(["\\bfnrt]|u00[01][0-9a-f]))*"|"Anonymous":(0|[1-9][0-9]{0,19}))\}$'
TIMER_ID_CHECK = (
    f"timer_id ~ '{TIMER_ID_SHAPE}' AND octet_length(timer_id) <= 1024"
    " AND CASE WHEN left(timer_id, 13) = '{\"Anonymous\":'"
    " THEN substr(timer_id, 14, length(timer_id) - 14)::numeric <= 18446744073709551615 ELSE true END"
)
FIRE_AT_CHECK = "fire_at >= '0001-01-01 00:00:00+00' AND fire_at <= '9999-12-31 23:59:59.999999+00'"

# Only `alembic downgrade --sql` writes it: online the rows are counted from here, which gives a better message.
GUARD = """\
DO $$
BEGIN
    LOCK TABLE timers IN ACCESS EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM timers) THEN
        RAISE EXCEPTION 'the downgrade would drop timers'
            USING HINT = 'Cancel them first, or write this SQL with alembic -x force=true.';
    END IF;
END
$$"""


def upgrade() -> None:
    """Make ``timers`` and its index.

    Raises:
        MigrationError: something else of that name is there.
    """
    if _dialect() == "postgresql":
        if not _offline():
            _require_free_names()
        op.create_table(
            TABLE,
            sa.Column("workflow_id", sa.Uuid(), nullable=False),
            sa.Column("timer_id", sa.Text(collation="C"), nullable=False),
            sa.Column("fire_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
            sa.PrimaryKeyConstraint(*KEY),
            sa.CheckConstraint(TIMER_ID_CHECK, name=op.f("ck_timers_timer_id")),
            sa.CheckConstraint(FIRE_AT_CHECK, name=op.f("ck_timers_fire_at")),
        )
    else:
        if _offline() or not _adopted():
            op.create_table(
                TABLE,
                *(sa.Column(name, sa.Text(), nullable=False) for name in ("workflow_id", "timer_id", "fire_at")),
                sa.PrimaryKeyConstraint(*KEY),
                sqlite_with_rowid=False,
                if_not_exists=_offline(),
            )
        op.drop_index(INDEX, TABLE, if_exists=True)
    op.create_index(INDEX, TABLE, list(INDEXED))


def downgrade() -> None:
    """Drop ``timers`` if it is ours and empty, or give it back to the program that made it.

    Raises:
        DowngradeRefusedError: it is ours and holds timers, and ``-x force=true`` was not given.
    """
    if _dialect() == "postgresql":
        _drop_on_postgresql()
    elif _offline():
        raise MigrationError(
            "a downgrade of a SQLite file cannot be written as SQL: whether the table is dropped or given back depends"
            " on the program that made it",
            "run `alembic downgrade` on the file itself, without --sql",
        )
    elif _pragma("index_info", TABLE):
        _refuse_to_drop_timers()
        op.drop_table(TABLE)
    elif _pragma("table_info", TABLE):
        op.drop_index(INDEX, TABLE, if_exists=True)
        op.execute(INDEX_OF_THE_CRATE.format(index=_prefix() + INDEX))


# -- where it runs ----------------------------------------------------------------------------------------------------


def _dialect() -> str:
    name = op.get_context().dialect.name
    if name not in {"postgresql", "sqlite"}:
        raise UnsupportedBindError(f"there is no support for the database {name!r}", "use PostgreSQL, libSQL or SQLite")
    return name


def _offline() -> bool:
    return op.get_context().as_sql


def _rows(statement: str, **parameters: Any) -> list[Any]:  # noqa: ANN401 - what a driver binds
    return list(op.get_bind().execute(sa.text(statement), parameters))


def _schema() -> str | None:
    # operations follow a host's schema_translate_map by themselves; SQL that is written here does not
    translated: dict[str | None, str | None] = op.get_bind().get_execution_options().get("schema_translate_map") or {}
    return translated.get(None)


def _prefix() -> str:
    schema = _schema()
    return f"{op.get_context().dialect.identifier_preparer.quote(schema)}." if schema else ""


# -- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_to_drop_timers() -> None:
    if _forced():
        return
    ((count,),) = _rows(f"SELECT count(*) FROM {_prefix()}{TABLE}")  # noqa: S608 - names of ours
    if count:
        raise DowngradeRefusedError(
            f"the downgrade would drop {count} timer{'s' * (count > 1)}",
            "let them fire or cancel them first, or drop them by `alembic -x force=true downgrade base` or"
            " aion_timers.migrate.downgrade(engine, force=True)",
        )


def _forced() -> bool:
    environment = op.get_context().environment_context
    given = environment.get_x_argument(as_dictionary=True) if environment is not None else {}
    return given.get("force", "false").lower() in {"", "1", "true", "yes"}


def _drop_on_postgresql() -> None:
    if _offline():
        if not _forced():
            op.execute(GUARD)
        op.drop_table(TABLE)
    elif TABLE in _relations():
        op.execute(f"LOCK TABLE {_prefix()}{TABLE} IN ACCESS EXCLUSIVE MODE")
        _refuse_to_drop_timers()
        op.drop_table(TABLE)


def _relations() -> list[str]:
    schema = _schema()
    where = "n.nspname = :schema" if schema else "pg_catalog.pg_table_is_visible(c.oid)"
    found = _rows(
        "SELECT CAST(c.relname AS text) FROM pg_catalog.pg_class c"  # noqa: S608 - a condition of ours
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        f" WHERE c.relname IN (:table, :index) AND {where} ORDER BY c.relname DESC",
        table=TABLE,
        index=INDEX,
        **({"schema": schema} if schema else {}),
    )
    return [name for (name,) in found]


def _require_free_names() -> None:
    for name in _relations():
        raise MigrationError(
            f"there is already a relation {name!r}, which no migration of this library made",
            f"rename or drop it, or use another schema; if {TABLE!r} is this library's own table, run `alembic stamp`"
            f" with its revision, {revision!r} or a later one, and `alembic check`",
        )


# -- the other program's table ----------------------------------------------------------------------------------------


def _pragma(name: str, of: str) -> list[Any]:
    # SQLite answers index_info for the name of a table only if that table is WITHOUT ROWID
    return list(op.get_bind().exec_driver_sql(f"PRAGMA {_prefix()}{name}('{of}')"))


def _adopted() -> bool:
    """Whether there is a table already, which then has to be one that both programs can work on."""
    found = _rows(
        f"SELECT type, name, tbl_name, sql FROM {_prefix()}sqlite_master"  # noqa: S608 - names of ours
        " WHERE lower(name) IN (:table, :index) AND type <> 'trigger'",
        table=TABLE,
        index=INDEX,
    )
    there = [row for row in found if row.name.lower() == TABLE]
    problems = _problems_of_table(there[0]) if there else []
    if not problems:
        problems = [f"{row.name!r} is taken by {row.tbl_name!r}" for row in found if row.tbl_name.lower() != TABLE]
    if not problems and there:
        problems = _problems_of_index()
    if problems:
        raise MigrationError(
            f"what stands where {TABLE!r} should be is not the table of Aion's crate aion-store-libsql:"
            f" {', '.join(problems)}; nothing was changed",
            "rename or drop it, or put the timers into another file",
        )
    return bool(there)


def _problems_of_table(its: Any) -> list[str]:  # noqa: ANN401 - a row of sqlite_master
    if its.type != "table" or its.sql.upper().startswith("CREATE VIRTUAL"):
        return ["it is a virtual table" if its.type == "table" else f"it is no table but {its.type} {its.name!r}"]
    if its.name != TABLE:
        return [f"its name is {its.name!r}"]
    columns = {row.name: row for row in _pragma("table_xinfo", TABLE)}
    problems = [f"it has no column {name!r}" for name in INDEXED if name not in columns]
    for name, column in columns.items():
        if name not in INDEXED:
            if column.notnull and column.dflt_value is None and not column.hidden:
                problems.append(f"its column {name!r} is NOT NULL and has no default")
        elif column.type.upper() != "TEXT" or not column.notnull or column.hidden:
            problems.append(f"its column {name!r} is {column.type}{' NOT NULL' * column.notnull}, not TEXT NOT NULL")
    key = [name for _, name in sorted((column.pk, name) for name, column in columns.items() if column.pk)]
    if key != list(KEY):
        problems.append(f"its primary key is ({', '.join(key)}), not ({', '.join(KEY)})")
    return problems


def _problems_of_index() -> list[str]:
    problems = []
    for index in _pragma("index_list", TABLE):
        if index.origin != "pk" and index.name != INDEX:
            continue
        columns = [column for column in _pragma("index_xinfo", index.name) if column.key]
        problems += [
            f"{column.name!r} has the collation {column.coll}" for column in columns if column.coll != "BINARY"
        ]
        if index.origin != "pk":
            names = tuple(column.name for column in columns)
            plain = not (index.unique or index.partial or any(column.desc for column in columns))
            if not plain or names not in {("fire_at",), INDEXED}:
                problems.append(f"its index {INDEX!r} is another one")
    return problems
