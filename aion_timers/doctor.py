"""What is wrong with a database, or with the way an engine uses it, and how to mend it.

`examine` looks at everything, reads only, and gives one `Finding` for each thing it looked at. With an async engine::

    async with engine.connect() as connection:
        findings = await connection.run_sync(doctor.examine)
"""

from __future__ import annotations

import json
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Engine, Select, text

from aion_timers import inventory, migrate, statements
from aion_timers.engine import explained, name_of_table, require_dependable
from aion_timers.errors import (
    MigrationError,
    NotMigratedError,
    StoreUnavailableError,
    TimerStoreError,
    UnsupportedBindError,
)
from aion_timers.inventory import Criteria
from aion_timers.repository import TimerRepository
from aion_timers.schema import POSTGRESQL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Finding", "Limits", "examine"]

Status: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at a database found.

    Attributes:
        name: what was looked at, one word.
        status: ``ok``; ``warn`` if it may be meant so, or will do harm later; ``fail`` if timers are lost, late or
            not fired because of it.
        found: what is the case.
        cure: what to do about it, None if nothing.
    """

    name: str
    status: Status
    found: str
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is worth a finding.

    Attributes:
        skew: how far this machine's clock may be from the database's.
        overdue: how long a timer may be due and free.
        abandoned: how long ago a lease may have ended without anybody claiming the timer again.
        lease: how long a lease may last from now on.
        attempts: how often a timer may have been claimed.
        horizon: how long a transaction may stay open on PostgreSQL.
        dead: how many dead rows there may be on PostgreSQL, beside a fifth of the living.
        busy: how many seconds a connection to a SQLite file has to wait for a lock, at least.
        log: how large the write-ahead log of a SQLite file may be, in bytes.
    """

    skew: timedelta = timedelta(seconds=1)
    overdue: timedelta = timedelta(minutes=1)
    abandoned: timedelta = timedelta(minutes=5)
    lease: timedelta = timedelta(hours=1)
    attempts: int = 20
    horizon: timedelta = timedelta(minutes=5)
    dead: int = 10_000
    busy: float = 1.0
    log: int = 128 * 2**20


_DEFAULT: Final = Limits()


def examine(bind: Connection | Engine, limits: Limits = _DEFAULT) -> list[Finding]:
    """Look at everything. It reads only, and leaves the connection without a transaction of its own.

    The journal mode of a libSQL file is what the library's own dialect has made it when it connected. What belongs to
    an engine, such as ``synchronous`` and the timeout, is that of this engine: pass the application's own.

    Args:
        bind: a connection that is in no transaction, or an engine; of async ones, what ``run_sync`` hands over.
        limits: from where on something is worth a finding.

    Raises:
        UnsupportedBindError: not a connection or engine, or no supported database.
        StoreUnavailableError: the database cannot be reached or read.
    """
    if isinstance(bind, Engine):
        with explained():
            connection = bind.connect()
        with connection:
            return examine(connection, limits)
    if not isinstance(bind, Connection):
        raise UnsupportedBindError(
            f"the doctor looks at a connection or an engine, not at a {type(bind).__name__}",
            "pass a sync one, or write: await connection.run_sync(doctor.examine)",
        )
    with explained():
        return list(_findings(bind, limits))


def _findings(connection: Connection, limits: Limits) -> Iterator[Finding]:
    on_postgresql = connection.dialect.name == POSTGRESQL
    with _undone(connection):
        yield (dialect := _dialect(connection))
    if dialect.status == "fail":
        return
    with _undone(connection):
        yield _versions(connection)
        yield from (_durability(connection),) if on_postgresql else _journal(connection, limits)
        yield (migration := _migration(connection))
    if migration.status == "fail" and not _is_readable(connection):
        return
    looks: list[Callable[[Connection, Limits], Finding]] = [_plan, _clock, _overdue, _leases, _attempts, _foreign]
    looks += [_dead, _horizon] if on_postgresql else [_log]
    for look in looks:
        with _undone(connection):
            yield look(connection, limits)


@contextmanager
def _undone(connection: Connection) -> Iterator[None]:
    try:
        yield
    finally:
        connection.rollback()


def _is_readable(connection: Connection) -> bool:
    """Whether the table is such that the other looks make sense: all its columns are there."""
    try:
        with _undone(connection), explained():
            inventory.page(connection, limit=1)
    except NotMigratedError:
        return False
    return True


# -- the engine -------------------------------------------------------------------------------------------------------


def _dialect(connection: Connection) -> Finding:
    name = f"{connection.dialect.name}+{connection.dialect.driver}"
    try:
        require_dependable(connection)
    except TimerStoreError as error:
        return Finding("dialect", "fail", *_halves(error))
    return Finding("dialect", "ok", name)


def _halves(error: TimerStoreError) -> tuple[str, str]:
    cure = str(getattr(error, "cure", ""))
    return str(error).removesuffix(cure).removesuffix("; "), cure


_OLDEST: Final = {"postgresql": (15,), "sqlite": (3, 35)}


def _versions(connection: Connection) -> Finding:
    server = connection.dialect.server_version_info or ()
    name = "PostgreSQL" if connection.dialect.name == POSTGRESQL else "SQLite"
    found = (
        f"aion-timers {version('aion-timers')}, SQLAlchemy {version('sqlalchemy')}, Alembic {version('alembic')},"
        f" Python {platform.python_version()}, {name} {'.'.join(map(str, server))}"
    )
    oldest = _OLDEST[statements.dialect_name(connection.dialect)]
    if tuple(server) < oldest:
        cure = f"upgrade to {name} {'.'.join(map(str, oldest))} or later"
        return Finding("versions", "fail", found, cure)
    return Finding("versions", "ok", found)


def _durability(connection: Connection) -> Finding:
    settings = ("fsync", "synchronous_commit", "full_page_writes")
    values = {name: connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in settings}
    found = ", ".join(f"{name} {value}" for name, value in values.items())
    if "off" in (values["fsync"], values["full_page_writes"]):
        cure = "set fsync and full_page_writes to on in postgresql.conf: a power failure can destroy the database"
        return Finding("durability", "fail", found, cure)
    if values["synchronous_commit"] == "off":
        cure = "set synchronous_commit to on, or accept that a crash of the server takes back the last commits"
        return Finding("durability", "warn", found, cure)
    return Finding("durability", "ok", found)


_SYNCHRONOUS: Final = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}


def _journal(connection: Connection, limits: Limits) -> Iterator[Finding]:
    mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()).lower()
    if mode in {"wal", "memory"} and (mode == "wal" or _file(connection) is None):
        yield Finding("journal", "ok", f"journal mode {mode}")
    elif mode in {"off", "memory"}:
        cure = "run PRAGMA journal_mode=WAL: a crash in the middle of a commit destroys the file"
        yield Finding("journal", "fail", f"journal mode {mode}", cure)
    else:
        cure = "run PRAGMA journal_mode=WAL once: readers and the writer then don't wait for each other"
        yield Finding("journal", "warn", f"journal mode {mode}", cure)
    synchronous = _SYNCHRONOUS[int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())]
    if synchronous == "OFF":
        cure = "set PRAGMA synchronous=FULL: a power failure can destroy the file"
        yield Finding("synchronous", "fail", "synchronous OFF", cure)
    elif synchronous == "NORMAL":
        cure = "set it to FULL, or accept that a power failure takes back the last commits"
        if connection.engine.url.host:
            cure = "that is how sqld runs: a power failure of its machine takes back the last commits"
        yield Finding("synchronous", "warn", "synchronous NORMAL", cure)
    else:
        yield Finding("synchronous", "ok", f"synchronous {synchronous}")
    seconds = _busy_seconds(connection)
    if seconds < limits.busy:
        cure = "give the engine a timeout, as in create_engine(url, connect_args={'timeout': 15})"
        yield Finding("busy", "warn", f"a connection waits {seconds:g} s for a lock", cure)
    else:
        yield Finding("busy", "ok", f"a connection waits {seconds:g} s for a lock")


def _busy_seconds(connection: Connection) -> float:
    if connection.dialect.driver.endswith("libsql"):
        # the dialect waits itself, and not in SQLite
        driver: Any = connection.connection.driver_connection
        return float(getattr(driver, "timeout", 0.0))
    return float(connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() / 1000)


def _file(connection: Connection) -> Path | None:
    if connection.engine.url.host:  # the path is one of the server's machine
        return None
    rows = connection.exec_driver_sql("PRAGMA database_list").all()
    return next((Path(row[2]) for row in rows if row[1] == "main" and row[2]), None)


# -- the table --------------------------------------------------------------------------------------------------------


def _migration(connection: Connection) -> Finding:
    try:
        migrate.check(connection)
    except MigrationError as error:
        return Finding("migration", "fail", *_halves(error))
    return Finding("migration", "ok", f"at revision {migrate.current(connection)}, and the table is as it should be")


_PLAN_ROWS: Final = 10_000
_SCANS: Final = ("Seq Scan", '"Sort"', "TEMP B-TREE")


def _plan(connection: Connection, _: Limits) -> Finding:
    if connection.dialect.name == POSTGRESQL:
        rows: Any = connection.execute(text(_TABLE_ROWS), {"name": name_of_table(connection)}).scalar()
        if (rows or 0) < _PLAN_ROWS:
            # a small table is rightly read as a whole: can the index be used at all?
            for how in ("seqscan", "bitmapscan", "sort"):
                connection.exec_driver_sql(f"SET LOCAL enable_{how} = off")
    dialect = statements.dialect_name(connection.dialect)
    plan = _explain(connection, statements.expired(dialect, at_clock=True, paged=False, limited=True))
    if "idx_timers_fire_at" in plan and not any(scan in plan for scan in _SCANS):
        return Finding("plan", "ok", "due timers are found by the index")
    cure = (
        "run ANALYZE timers; if that changes nothing, see what `aion-timers check` says of the index"
        " idx_timers_fire_at (fire_at, workflow_id, timer_id)"
    )
    return Finding("plan", "fail", "due timers are found by reading the whole table", cure)


_TABLE_ROWS: Final = "SELECT reltuples FROM pg_catalog.pg_class WHERE oid = to_regclass(CAST(:name AS text))"


def _explain(connection: Connection, statement: Select[Any]) -> str:
    schemas = connection.get_execution_options().get("schema_translate_map")
    compiled = statement.params(limit=100).compile(
        dialect=connection.dialect,
        schema_translate_map=schemas,
        render_schema_translate=schemas is not None,
        compile_kwargs={"literal_binds": True},
    )
    how = "EXPLAIN (FORMAT JSON)" if connection.dialect.name == POSTGRESQL else "EXPLAIN QUERY PLAN"
    # a driver keeps prepared statements, and an explanation is not made anew when an index is gone
    rows = connection.exec_driver_sql(f"{how} {compiled} /* {time.monotonic_ns()} */").all()
    return "\n".join(json.dumps(row[-1]) for row in rows)


# -- time and work ----------------------------------------------------------------------------------------------------


def _clock(connection: Connection, limits: Limits) -> Finding:
    if connection.dialect.name != POSTGRESQL and not connection.engine.url.host:
        return Finding("clock", "ok", "the clock of a file is this machine's")
    timers = TimerRepository(connection)
    timers.now()  # so that the one that counts has only a round trip to wait for
    before = datetime.now(UTC)
    there = timers.now()
    after = datetime.now(UTC)
    # it was read at some moment between: only what is outside is surely skew
    skew = max(there - after, before - there, timedelta(0))
    found = f"the database's clock is {_seconds(skew)} {'ahead of' if there > after else 'behind'} this machine's"
    if skew > limits.skew:
        cure = "set both clocks by NTP: the database's decides when a timer is due, and your fire_at comes from here"
        return Finding("clock", "warn", found, cure)
    return Finding("clock", "ok", "this machine's clock and the database's agree")


def _seconds(length: timedelta) -> str:
    if length < timedelta(minutes=1):
        return f"{length.total_seconds():.1f} s"
    return str(timedelta(seconds=round(length.total_seconds())))


def _overdue(connection: Connection, limits: Limits) -> Finding:
    now = TimerRepository(connection).now()
    oldest = inventory.page(connection, criteria=Criteria(until=now, held=False), limit=100).records
    if not oldest:
        return Finding("overdue", "ok", "no timer is due")
    first = oldest[0].timer
    late = max(now - first.fire_at, timedelta(0))
    found = f"the oldest due timer, {first.timer_id} of {first.workflow_id}, waits for {_seconds(late)}"
    if late > limits.overdue:
        cure = (
            "start a worker that has a handler for its name, or more of them (`aion-timers run`);"
            " cancel it if nobody shall fire it"
        )
        return Finding("overdue", "fail", found, cure)
    return Finding("overdue", "ok", found)


def _leases(connection: Connection, limits: Limits) -> Finding:
    ended, long_, _, _ = _lease_figures(connection, limits)
    if ended:
        found = f"{_many(ended, 'lease')} ended more than {_seconds(limits.abandoned)} ago, and nobody took over"
        cure = "a worker died and none is left for these names: start one (`aion-timers run`)"
        return Finding("leases", "fail", found, cure)
    if long_:
        found = f"{_many(long_, 'timer')} held for more than {_seconds(limits.lease)} from now on"
        cure = (
            "give claims a lease of 30 to 60 seconds and extend it; if the worker is dead, schedule these timers again:"
            " that ends the lease"
        )
        return Finding("leases", "warn", found, cure)
    return Finding("leases", "ok", f"{_many(inventory.count_held(connection), 'timer')} held")


def _attempts(connection: Connection, limits: Limits) -> Finding:
    _, _, often, most = _lease_figures(connection, limits)
    if often:
        found = f"{_many(often, 'timer')} claimed {limits.attempts} times or more, one of them {most} times"
        cure = "the handler fails, or its process dies, again and again: see the worker's log, or cancel the timer"
        return Finding("attempts", "warn", found, cure)
    return Finding("attempts", "ok", f"no timer was claimed more than {most or 0} times")


def _lease_figures(connection: Connection, limits: Limits) -> tuple[int, int, int, int | None]:
    now = TimerRepository(connection).now()
    parameters = statements.leases_at(now - limits.abandoned, now + limits.lease, limits.attempts)
    statement = statements.leases(statements.dialect_name(connection.dialect))
    ended, long_, often, most = connection.execute(statement, parameters).one()
    return ended, long_, often, most


def _many(number: int, of: str) -> str:
    return f"{number:,} {of}{'' if number == 1 else 's'}"


_SHOWN: Final = 3


def _foreign(connection: Connection, _: Limits) -> Finding:
    rows = inventory.foreign_rows(connection)
    first = list(islice(rows, _SHOWN))
    if not first:
        return Finding("foreign", "ok", "every row is in the form that this library writes")
    number = len(first) + sum(1 for _ in rows)
    shown = "; ".join(inventory.shown_row(row) for row in first)
    found = f"{_many(number, 'row')} written by another program in a form of its own, and never fired here: {shown}"
    cure = "correct or delete these rows by hand, or let the program that wrote them fire them"
    return Finding("foreign", "warn", found + " ..." * (number > _SHOWN), cure)


# -- PostgreSQL -------------------------------------------------------------------------------------------------------

_DEAD: Final = """
SELECT n_dead_tup AS dead, n_live_tup AS live FROM pg_catalog.pg_stat_user_tables
WHERE relid = to_regclass(CAST(:name AS text))"""
_HOLDERS: Final = """
SELECT what, age, cure FROM (
    SELECT format('the transaction of process %s (%s, %s)', pid, coalesce(nullif(application_name, ''), 'no name'),
            state) AS what,
        clock_timestamp() - xact_start AS age, format('end it: SELECT pg_terminate_backend(%s)', pid) AS cure
    FROM pg_catalog.pg_stat_activity
    WHERE pid <> pg_backend_pid() AND datname = current_database()
        AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL OR state LIKE 'idle in transaction%')
    UNION ALL
    SELECT format('the prepared transaction %L', gid), clock_timestamp() - prepared,
        format('finish it: COMMIT PREPARED %1$L or ROLLBACK PREPARED %1$L', gid)
    FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()
) AS holders WHERE age > :limit ORDER BY age DESC LIMIT 1"""
_SLOTS: Final = """
SELECT slot_name, greatest(age(xmin), age(catalog_xmin)) AS age FROM pg_catalog.pg_replication_slots
WHERE NOT active AND greatest(age(xmin), age(catalog_xmin)) > 1000000 ORDER BY 2 DESC LIMIT 1"""


def _dead(connection: Connection, limits: Limits) -> Finding:
    row = connection.execute(text(_DEAD), {"name": name_of_table(connection)}).one_or_none()
    dead, live = (row.dead, row.live) if row is not None else (0, 0)
    found = f"{_many(dead, 'dead row')} beside {live:,} living"
    if dead > limits.dead + live // 5:
        cure = "run VACUUM timers; if they stay, see what holds the horizon, and that autovacuum is on"
        return Finding("dead", "warn", found, cure)
    return Finding("dead", "ok", found)


def _horizon(connection: Connection, limits: Limits) -> Finding:
    held = connection.execute(text(_HOLDERS), {"limit": limits.horizon}).one_or_none()
    if held is not None:
        found = f"{held.what} is open for {_seconds(held.age)}, so that VACUUM removes nothing that is younger"
        return Finding("horizon", "warn", found, held.cure)
    slot = connection.execute(text(_SLOTS)).one_or_none()
    if slot is not None:
        found = f"the replication slot {slot.slot_name!r} is not used and {slot.age:,} transactions behind"
        cure = "start its consumer, or drop it with pg_drop_replication_slot()"
        return Finding("horizon", "warn", found, cure)
    return Finding("horizon", "ok", "no old transaction is open")


# -- a file -----------------------------------------------------------------------------------------------------------


def _log(connection: Connection, limits: Limits) -> Finding:
    file = _file(connection)
    log = file.with_name(file.name + "-wal") if file is not None else None
    try:
        # looking doesn't open: closing a handle on the file would drop the locks of this process
        size = log.stat().st_size if log is not None else 0
    except FileNotFoundError:
        size = 0
    except OSError as error:
        raise StoreUnavailableError(f"{log} cannot be looked at ({error.strerror})", "let this user read it") from error
    found = f"the write-ahead log has {size / 2**20:,.1f} MiB"
    if size > limits.log:
        cure = "close readers that stay open, they keep it from being emptied; then run PRAGMA wal_checkpoint(TRUNCATE)"
        return Finding("log", "warn", found, cure)
    return Finding("log", "ok", found)
