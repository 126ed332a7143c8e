"""Let a timer be leased.

On the SQLite family another program goes on inserting and moving rows of this table while it is migrated, and
afterwards: it gives no value for a column of ours, and a trigger ends the lease of a row that it moves.

Revision ID: aion0002
Revises: aion0001
Create Date: 2026-11-25
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from aion_timers.errors import MigrationError

revision = "aion0002"
down_revision = "aion0001"
branch_labels = None
depends_on = None

TABLE = "timers"
TRIGGER = "timers_moved"

COLUMNS_ON_SQLITE = {
    "lease_token": "TEXT",
    "lease_until": "TEXT",
    "attempts": "INTEGER DEFAULT 0 NOT NULL",
}
CREATE_TRIGGER = """\
CREATE TRIGGER {trigger}
AFTER UPDATE OF fire_at ON timers
WHEN NEW.lease_token IS OLD.lease_token AND (OLD.lease_token IS NOT NULL OR OLD.attempts <> 0)
BEGIN
    UPDATE timers SET lease_token = NULL, lease_until = NULL, attempts = 0
    WHERE workflow_id = NEW.workflow_id AND timer_id = NEW.timer_id;
END"""

# in one statement the rows are read once, to see that they keep the constraints
UPGRADE_ON_POSTGRESQL = """\
ALTER TABLE {table}
    ADD COLUMN lease_token UUID,
    ADD COLUMN lease_until TIMESTAMP WITH TIME ZONE,
    ADD COLUMN attempts INTEGER DEFAULT 0 NOT NULL,
    ADD CONSTRAINT ck_timers_lease CHECK ((lease_token IS NULL) = (lease_until IS NULL)),
    ADD CONSTRAINT ck_timers_lease_until
        CHECK (lease_until >= '0001-01-01 00:00:00+00' AND lease_until <= '9999-12-31 23:59:59.999999+00'),
    ADD CONSTRAINT ck_timers_attempts CHECK (attempts >= 0),
    SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000)"""
DOWNGRADE_ON_POSTGRESQL = """\
ALTER TABLE {table}
    DROP CONSTRAINT ck_timers_lease,
    DROP CONSTRAINT ck_timers_lease_until,
    DROP CONSTRAINT ck_timers_attempts,
    DROP COLUMN lease_token,
    DROP COLUMN lease_until,
    DROP COLUMN attempts,
    RESET (fillfactor, autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold)"""


def upgrade() -> None:
    """Add the columns of a lease.

    Raises:
        MigrationError: the table has a column or a trigger of such a name that is another one.
    """
    if _on_postgresql():
        if not _offline():
            _require_free_names()
        op.execute(UPGRADE_ON_POSTGRESQL.format(table=_prefix() + TABLE))
        return
    has_columns, has_trigger = (False, False) if _offline() else _found_on_sqlite()
    if not has_columns:
        for name, definition in COLUMNS_ON_SQLITE.items():
            op.execute(f"ALTER TABLE {_prefix()}{TABLE} ADD COLUMN {name} {definition}")
    if not has_trigger:
        op.execute(CREATE_TRIGGER.format(trigger=_prefix() + TRIGGER))


def downgrade() -> None:
    """Drop the columns, and so the leases, of a table that keeps its timers."""
    if _on_postgresql():
        op.execute(DOWNGRADE_ON_POSTGRESQL.format(table=_prefix() + TABLE))
    elif _offline() or _columns_on_sqlite():
        # SQLite drops no column that a trigger names; dropped from the last to the first, they leave the table's SQL
        # to the letter as it was
        op.execute(f"DROP TRIGGER IF EXISTS {_prefix()}{TRIGGER}")
        for name in reversed(COLUMNS_ON_SQLITE):
            op.execute(f"ALTER TABLE {_prefix()}{TABLE} DROP COLUMN {name}")


# -- where it runs ----------------------------------------------------------------------------------------------------


def _on_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"


def _offline() -> bool:
    return op.get_context().as_sql


def _schema() -> str | None:
    translated: dict[str | None, str | None] = op.get_bind().get_execution_options().get("schema_translate_map") or {}
    return translated.get(None)


def _prefix() -> str:
    schema = None if _offline() else _schema()
    return f"{op.get_context().dialect.identifier_preparer.quote(schema)}." if schema else ""


# -- what is there already --------------------------------------------------------------------------------------------


def _require_free_names() -> None:
    inspector = sa.inspect(op.get_bind())
    taken = {column["name"] for column in inspector.get_columns(TABLE, schema=_schema())}
    _refuse([f"a column {name!r}" for name in COLUMNS_ON_SQLITE if name in taken])


def _found_on_sqlite() -> tuple[bool, bool]:
    """Whether the columns and the trigger of this revision are there already, as after a lost version table."""
    columns = _columns_on_sqlite()
    is_ours = columns == COLUMNS_ON_SQLITE
    others = [] if is_ours else [f"a column {name!r}" for name in COLUMNS_ON_SQLITE if name in columns]
    statement = f"SELECT sql FROM {_prefix()}sqlite_master WHERE type = 'trigger' AND lower(name) = :name"  # noqa: S608 - names of ours
    triggers = [row.sql for row in op.get_bind().execute(sa.text(statement), {"name": TRIGGER})]
    if any(sql != CREATE_TRIGGER.format(trigger=TRIGGER) for sql in triggers):
        others.append(f"a trigger {TRIGGER!r}")
    _refuse(others)
    return is_ours, bool(triggers)


def _columns_on_sqlite() -> dict[str, str]:
    found = op.get_bind().exec_driver_sql(f"PRAGMA {_prefix()}table_xinfo('{TABLE}')")
    return {row.name.lower(): _definition(row) for row in found if row.name.lower() in COLUMNS_ON_SQLITE}


def _definition(row: Any) -> str:  # noqa: ANN401 - a row of table_xinfo
    default = "" if row.dflt_value is None else f" DEFAULT {row.dflt_value}"
    return row.type.upper() + default + " NOT NULL" * row.notnull + " GENERATED" * bool(row.hidden)


def _refuse(others: list[str]) -> None:
    if others:
        raise MigrationError(
            f"{TABLE!r} already has {' and '.join(others)}, which no migration of this library made",
            "rename or drop what has the name, and migrate again; if it is this library's own, run"
            f" `alembic stamp {revision}` and `alembic check`",
        )
