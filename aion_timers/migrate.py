"""Migrations of the table ``timers``, on a connection or an engine that the caller owns.

The scripts are those of Alembic's command line; the version is kept in a table of its own, ``aion_timers_version``, so
a host's own migrations are not touched. With an async engine::

    async with engine.begin() as connection:
        await connection.run_sync(migrate.upgrade)
"""

from __future__ import annotations

import asyncio
import re
import time
from argparse import Namespace
from contextlib import contextmanager
from functools import cache
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import alembic.context
import alembic.op
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import (
    CheckConstraint,
    Connection,
    DefaultClause,
    Engine,
    Row,
    Table,
    column,
    inspect,
    select,
    table,
    text,
)
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError, MissingGreenlet
from sqlalchemy.schema import CreateColumn, CreateTable
from sqlalchemy.util import await_only

from aion_timers.engine import MIGRATE, explained, require_dependable, schema_of
from aion_timers.errors import InvalidInputError, MigrationError, NotMigratedError, UnsupportedBindError
from aion_timers.schema import POSTGRESQL, MovedTrigger, timers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy.sql.schema import SchemaItem

__all__ = ["check", "current", "downgrade", "include_object", "locked", "offline", "upgrade"]

Bind: TypeAlias = Connection | Engine

VERSION_TABLE: Final = "aion_timers_version"

_LOCK_TIMEOUT: Final = 30  # seconds
_LOCK_KEY: Final = int.from_bytes(b"aiontmrs")
POSTGRESQL_LOCK: Final = (
    f"SELECT set_config('lock_timeout', '{_LOCK_TIMEOUT}s', true) WHERE current_setting('lock_timeout') = '0'",
    f"SELECT pg_advisory_xact_lock({_LOCK_KEY})",
)
"""What makes one migration of a PostgreSQL database wait for another; a lock timeout that a host has set stands."""


# -- what hosts call --------------------------------------------------------------------------------------------------


def upgrade(bind: Bind, revision: str = "head") -> None:
    """Create or adopt the table ``timers``, or bring it up to a revision.

    On an engine it is one transaction of its own, committed here; an engine that is at the head already takes no lock.
    On a connection it belongs to the caller's transaction, which the caller commits; a failed one leaves nothing
    behind there, even if the caller commits. Programs that migrate one database at once wait for each other; on
    PostgreSQL that needs READ COMMITTED, PostgreSQL's default. Up to the head it also sees that nothing of the table is
    missing, as it would be where a migration was run halfway by hand.

    Args:
        bind: a connection or an engine; of async ones, what ``run_sync`` hands over.
        revision: how far.

    Raises:
        NotMigratedError: the database is at the head, but a part of the table is missing.
        MigrationError: a table, a column or a trigger of that name is there that is another one, another migration
            holds the lock for too long, or a newer version of the library has migrated the database.
        InvalidInputError: there is no such revision.
        UnsupportedBindError: not a connection or engine, or one at isolation level AUTOCOMMIT.
        StoreUnavailableError: the database cannot be opened or written.
    """
    if revision == "head" and isinstance(bind, Engine) and _is_whole(bind):
        return
    with _writing(bind) as connection:
        _run(command.upgrade, connection, revision)
        if revision == "head":
            _require_whole(connection)


def downgrade(bind: Bind, revision: str = "base", *, force: bool = False) -> None:
    """Take the table ``timers`` back to a revision, by default to what was there before.

    A table that the other program made is afterwards as that program made it, and keeps its timers. One of ours is
    dropped, which is refused while it holds timers. Short of that, a revision's columns are dropped and timers stay.
    Transactions are those of `upgrade`.

    Args:
        bind: a connection or an engine; of async ones, what ``run_sync`` hands over.
        revision: how far.
        force: drop the timers, too.

    Raises:
        DowngradeRefusedError: timers would be dropped, and ``force`` was not given.
        MigrationError: another migration holds the lock for too long, or a newer version of the library has migrated
            the database.
        InvalidInputError: there is no such revision.
        UnsupportedBindError: not a connection or engine, or one at isolation level AUTOCOMMIT.
        StoreUnavailableError: the database cannot be opened or written.
    """
    with _writing(bind) as connection:
        _run(command.downgrade, connection, revision, force=force)


def current(bind: Bind) -> str | None:
    """The revision that the database is at, None if it was never migrated. It only reads, and takes no lock.

    Raises:
        UnsupportedBindError: not a connection or engine.
        StoreUnavailableError: the database cannot be opened.
    """
    with _reading(bind) as connection:
        return ", ".join(sorted(_revisions(connection))) or None


def check(bind: Bind) -> None:
    """Compare the database with what this version works with. It only reads, and takes no lock.

    Compared are the revision and the whole table: types, collations, defaults, keys, indexes, CHECK constraints, the
    trigger, how it is stored. Columns, indexes and other things that a host has added are left alone as long as rows
    without them can be written; so are the values to which it has tuned PostgreSQL's autovacuum. Where the host's own
    Alembic runs our scripts the revision is in its version table, and only the table is compared.

    Raises:
        NotMigratedError: something is missing; the message names all of it and the command that mends it.
        MigrationError: something is different, or a newer version of the library has migrated the database.
        UnsupportedBindError: not a connection or engine.
        StoreUnavailableError: the database cannot be opened.
    """
    with _reading(bind) as connection:
        revisions = _revisions(connection)
        differences = list(_differences(connection))
        if not revisions and differences:
            raise NotMigratedError("the database is not migrated", MIGRATE)
        require_known(connection)
        if revisions and revisions != {_head()}:
            raise NotMigratedError(
                f"the database is at revision {', '.join(sorted(revisions))}, and this version works with {_head()}",
                MIGRATE,
            )
        if differences:
            what, cure = _told(connection, differences)
            missing = any(difference.is_missing for difference in differences)
            raise (NotMigratedError if missing else MigrationError)(f"the table {timers.name!r} differs: {what}", cure)


def include_object(
    item: SchemaItem,
    name: str | None,
    kind: str,
    reflected: bool,  # noqa: FBT001 - Alembic's signature
    compare_to: SchemaItem | None,
) -> bool:
    """Keep a host's ``alembic check`` and ``--autogenerate`` off what belongs to this library.

    For ``context.configure(include_object=...)`` in the host's ``env.py``. Our tables are left out, in any schema,
    where the database has them and the host's metadata has not; a table of the host's own that is also called
    ``timers`` is not. Beside a filter of one's own: ``lambda *its: mine(*its) and migrate.include_object(*its)``.
    """
    if kind != "table" or not reflected or compare_to is not None or not isinstance(item, Table):
        return True
    is_ours = name == timers.name and set(_SHARED) <= set(item.columns.keys())
    return not is_ours and name != VERSION_TABLE


@contextmanager
def locked(connection: Connection) -> Iterator[None]:
    """A transaction that runs while no other migration of the database does, to be used in a host's ``env.py``.

    It holds the lock that `upgrade` takes, too, and is committed at the end; on a connection that is in a transaction
    already, that one goes on and belongs to the caller. Others wait: on PostgreSQL up to the ``lock_timeout`` of the
    session, else 30 seconds; on the SQLite family, where it is the write lock, up to the ``timeout`` of the engine.

    Raises:
        MigrationError: another program holds the lock for too long.
        UnsupportedBindError: the database or its driver is not supported, or the isolation level is AUTOCOMMIT.
    """
    _require_supported(connection)
    if connection.in_transaction():
        _refuse_autocommit(connection)
        with _locked(connection):
            yield
        return
    if connection.dialect.name == POSTGRESQL:
        connection.execution_options(isolation_level="READ COMMITTED")
    elif "libsql" in connection.dialect.driver:
        connection.execution_options(isolation_level="IMMEDIATE")
    with connection.begin(), _locked(connection):
        yield


def offline(dialect: str, revision: str = "head", *, down: bool = False, schema: str | None = None) -> str:
    """The SQL of a migration, for another tool to run; no database is asked.

    For the SQLite family the last step of the way down is left out: whether the table is dropped or given back there,
    SQL alone can't decide.

    Args:
        dialect: ``postgresql`` or ``sqlite``.
        revision: how far; ``a:b`` is from one to another. By default it begins at nothing, or at the head on the way
            down.
        down: whether it is a downgrade.
        schema: the PostgreSQL schema of the table, by default the first one of the search path.

    Raises:
        InvalidInputError: there is no such revision.
    """
    if down and dialect != POSTGRESQL and revision.rpartition(":")[2] == "base":
        raise InvalidInputError(
            "revision",
            revision,
            "whether a file's table is dropped or given back depends on the program that made it",
            "run downgrade() on the file itself, or stop at 'aion0001'",
        )
    # a name is enough: Alembic asks the URL for the dialect, and connects to nothing
    config = Config(cmd_opts=Namespace(x=[f"url={dialect}://"]), output_buffer=(written := StringIO()))
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    if down and ":" not in revision:
        revision = f"{_head()}:{revision}"
    with _one_at_a_time:
        try:
            (command.downgrade if down else command.upgrade)(config, revision, sql=True)
        except CommandError as error:
            raise InvalidInputError(
                "revision", revision, str(error), "pass 'head', 'base' or a revision of this library"
            ) from error
    if schema is None:
        return written.getvalue()
    quoted = PGDialect().identifier_preparer.quote(schema)  # type: ignore[no-untyped-call] # it has no types
    return f"SET search_path TO {quoted};\n\n{written.getvalue()}RESET search_path;\n"


# -- connections ------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(bind: Bind) -> Iterator[Connection]:
    with explained(), _connection(bind) as connection:
        _require_supported(connection)
        yield connection


@contextmanager
def _writing(bind: Bind) -> Iterator[Connection]:
    with _connection(bind) as connection:
        _require_supported(connection)
        if connection is not bind:
            with locked(connection):
                yield connection
        else:
            _refuse_autocommit(connection)
            with _locked(connection):
                yield connection


@contextmanager
def _connection(bind: Bind) -> Iterator[Connection]:
    if isinstance(bind, Connection):
        yield bind
    elif isinstance(bind, Engine):
        try:
            with explained():
                connection = bind.connect()
        except MissingGreenlet as error:
            raise _unsupported(bind) from error
        with connection:
            yield connection
    else:
        raise _unsupported(bind)


def _unsupported(bind: object) -> UnsupportedBindError:
    name = type(bind).__name__
    if "sync" in type(bind).__module__ or isinstance(bind, Engine):
        cure = "async with engine.begin() as connection: await connection.run_sync(migrate.upgrade)"
        if name in {"AsyncSession", "async_scoped_session"}:
            cure = "connection = await session.connection(); await connection.run_sync(migrate.upgrade)"
        return UnsupportedBindError(f"migrations run on a sync connection, not on an {name}", f"write: {cure}")
    if hasattr(bind, "connection"):
        return UnsupportedBindError(
            f"migrations run on a connection or an engine, not on a {name}", "pass session.connection()"
        )
    return UnsupportedBindError(f"a {name} is no connection", "pass a Connection or an Engine of SQLAlchemy")


def _require_supported(connection: Connection) -> None:
    # a plain sqlite3 connection in its default mode is not good enough for the repository, but it is once BEGIN is said
    if connection.dialect.driver not in {"pysqlite", "aiosqlite"}:
        require_dependable(connection)


def _is_autocommit(connection: Connection) -> bool:
    return "AUTOCOMMIT" in {connection.get_execution_options().get("isolation_level"), connection.get_isolation_level()}


def _refuse_autocommit(connection: Connection) -> None:
    if _is_autocommit(connection):
        raise UnsupportedBindError(
            "the connection is at isolation level AUTOCOMMIT, where a failed migration leaves half of it behind",
            "pass the engine, or a connection with a transaction, as in: with engine.begin() as connection",
        )


# -- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(connection: Connection) -> Iterator[None]:
    """Hold the lock that the whole database's migrations share until the transaction ends, and undo what fails."""
    if connection.dialect.name == POSTGRESQL:
        with connection.begin_nested():
            before = connection.exec_driver_sql("SHOW lock_timeout").scalar_one()
            with explained(), _lock_explained():
                for statement in POSTGRESQL_LOCK:
                    connection.exec_driver_sql(statement)
            yield
            connection.execute(text("SELECT set_config('lock_timeout', :before, true)"), {"before": before})
    else:
        with explained(), _lock_explained():
            _take_write_lock(connection)
        with connection.begin_nested():
            yield


def _take_write_lock(connection: Connection) -> None:
    if not connection.in_transaction():
        connection.begin()
    driver: Any = connection.connection.driver_connection
    if "libsql" not in connection.dialect.driver and not driver.in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    # a transaction that began as a reader takes the lock with its first write; this one leaves nothing behind
    attempt = connection.begin_nested()
    connection.exec_driver_sql(f"CREATE TABLE {_prefix(connection)}{VERSION_TABLE}_lock (held)")
    attempt.rollback()


@contextmanager
def _lock_explained() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "55P03" or "is locked" in str(error.orig):
            raise MigrationError(
                f"a lock could not be had: {str(error.orig).partition(chr(10))[0]}",
                "another program migrates or writes this database: try again in a new transaction once it has finished",
            ) from error
        raise


# -- Alembic ----------------------------------------------------------------------------------------------------------

_one_at_a_time = Lock()


def _run(work: Callable[[Config, str], None], connection: Connection, revision: str, *, force: bool = False) -> None:
    config = Config(cmd_opts=Namespace(x=["force=true"] if force else []))
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _alembic_to_itself(connection), _lock_explained():
        try:
            work(config, revision)
        except CommandError as error:
            raise InvalidInputError(
                "revision", revision, str(error), "pass 'head', 'base' or a revision of this library"
            ) from error


@contextmanager
def _alembic_to_itself(connection: Connection) -> Iterator[None]:
    """Keep others of this process off Alembic's global context, and give it back to whoever called from within it."""
    while not _one_at_a_time.acquire(blocking=False):
        if connection.dialect.is_async:
            await_only(asyncio.sleep(0.005))
        else:
            time.sleep(0.005)
    outer = [getattr(module, "_proxy", None) for module in (alembic.context, alembic.op)]
    try:
        yield
    finally:
        for proxy in outer:
            if proxy is not None:
                proxy._install_proxy()  # noqa: SLF001 - Alembic can't be nested otherwise
        _one_at_a_time.release()


@cache
def _scripts() -> Path:
    """The migration scripts: beside the package in a checkout, inside it where it was installed from a wheel."""
    beside, inside = Path(__file__).parents[1] / "migrations", Path(__file__).parent / "migrations"
    # in site-packages a stranger's folder may stand beside the package
    return beside if (beside / "versions" / "0001_create_timers.py").is_file() else inside


@cache
def _known_revisions() -> tuple[str, ...]:
    """All revisions that there are, the newest first."""
    return tuple(script.revision for script in ScriptDirectory(str(_scripts())).walk_revisions())


def _head() -> str:
    return _known_revisions()[0]


def _revisions(connection: Connection) -> set[str]:
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema_of(connection)):
        return set()
    version = table(VERSION_TABLE, column("version_num"), schema=schema_of(connection))
    return set(connection.scalars(select(version.c.version_num)))


def require_known(connection: Connection) -> None:
    """Refuse a database that a newer version of the library has migrated, or that is said to be at two revisions.

    Raises:
        MigrationError: it is at a revision that this version doesn't have, or at more than one.
    """
    revisions = _revisions(connection)
    if unknown := sorted(revisions - set(_known_revisions())):
        raise MigrationError(
            f"the database is at revision {', '.join(unknown)}, which this version of aion_timers does not know",
            "upgrade the library: a newer version has migrated this database",
        )
    if len(revisions) > 1:
        newest = next(revision for revision in _known_revisions() if revision in revisions)
        raise MigrationError(
            f"the database is half migrated: it is said to be at revision {' and '.join(sorted(revisions))} at once",
            f"run DELETE FROM {_prefix(connection)}{VERSION_TABLE}"  # noqa: S608 - told, not run
            f" WHERE version_num <> '{newest}'; then `alembic check`",
        )


def _is_whole(engine: Engine) -> bool:
    with _reading(engine) as connection:
        if _revisions(connection) != {_head()}:
            return False
        _require_whole(connection)
        return True


def _require_whole(connection: Connection) -> None:
    if missing := [difference for difference in _differences(connection) if difference.is_missing]:
        what, cure = _told(connection, missing)
        raise NotMigratedError(
            f"the database is half migrated: it is said to be at revision {_head()}, and the table {timers.name!r}"
            f" lacks what belongs there: {what}",
            cure,
        )


# -- the table as it is and as it should be ---------------------------------------------------------------------------
#
# Each is a mapping from a part of the table ("column fire_at", "index idx_timers_fire_at") to a text that says what it
# is like, so that comparing them is comparing two dictionaries, and what is blind to nothing is the texts.

_Parts: TypeAlias = dict[str, str]

_PLAIN: Final = "as usual"


class _Difference(NamedTuple):
    """What is different, the statement that mends it, and whether it is missing altogether."""

    what: str
    mend: str
    is_missing: bool


def _told(connection: Connection, differences: Iterable[_Difference]) -> tuple[str, str]:
    """All the differences, and one cure for them."""
    mends = dict.fromkeys(difference.mend for difference in differences)
    anew = _make_anew(connection)
    cure = anew if anew in mends else "; ".join(mends)
    return "; ".join(difference.what for difference in differences), f"run {cure}"


def _differences(connection: Connection) -> Iterator[_Difference]:
    on_postgresql = connection.dialect.name == POSTGRESQL
    found = _found_on_postgresql(connection) if on_postgresql else _found_on_sqlite(connection)
    if not found:
        anew = f"DROP TABLE {_prefix(connection)}{VERSION_TABLE}; then `alembic upgrade head`"
        yield _Difference("it is missing", anew, is_missing=True)
        return
    expected = _expected(connection)
    # first the columns, which what is made of them needs
    for part in sorted(expected | found, key=lambda part: (not part.startswith("column"), part)):
        if found.get(part) == expected.get(part):
            continue
        if part not in found:
            what = f"{part} is missing"
        elif part not in expected:
            what = f"{part} does not belong there"
        elif part.startswith(("CHECK", "trigger")):
            what = f"{part} is another one"
        else:
            what = f"{part} is {found[part]}, not {expected[part]}"
        mend = _mend_index if part.startswith("index") else _mend_on_postgresql if on_postgresql else _mend_on_sqlite
        yield _Difference(what, mend(connection, part, found), part not in found)


def _expected(connection: Connection) -> _Parts:
    dialect = connection.dialect
    parts = {"storage": _PLAIN, "primary key": _listed(timers.primary_key.columns.keys())}
    for name, its in timers.columns.items():
        parts[f"column {name}"] = _type(connection, name) + " NOT NULL" * (not its.nullable) + _default(name)
    for index in timers.indexes:
        parts[f"index {index.name}"] = _listed(index.columns.keys())
    if dialect.name == POSTGRESQL:
        parts["storage"] = _storage(_OPTIONS)
        for check in _checks(connection):
            parts[f"CHECK {check.name}"] = _canonical(connection, str(check.sqltext))
    else:
        parts[f"trigger {MovedTrigger.name}"] = _squeezed(MovedTrigger(timers).sql())
    return parts


def _type(connection: Connection, name: str) -> str:
    kind, collate, collation = connection.dialect.type_compiler_instance.process(timers.c[name].type).partition(
        " COLLATE "
    )
    return (kind.lower() if connection.dialect.name == POSTGRESQL else kind) + collate + collation


def _default(name: str) -> str:
    default = timers.c[name].server_default
    return f" DEFAULT {default.arg}" if isinstance(default, DefaultClause) else ""


def _checks(connection: Connection) -> list[CheckConstraint]:
    # the compiler leaves out the constraints of other databases
    ddl = str(CreateTable(timers).compile(dialect=connection.dialect))
    return [its for its in timers.constraints if isinstance(its, CheckConstraint) and f" {its.name} CHECK" in ddl]


def _squeezed(sql: str) -> str:
    return " ".join(sql.split())


def _listed(names: list[str]) -> str:
    return f"({', '.join(names)})"


def _storage(options: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(options.items())) or _PLAIN


def _definition(connection: Connection, name: str) -> str:
    return str(CreateColumn(timers.c[name]).compile(dialect=connection.dialect))


def _prefix(connection: Connection) -> str:
    schema = schema_of(connection)
    return f"{connection.dialect.identifier_preparer.quote(schema)}." if schema else ""


# PostgreSQL

_OPTIONS: Final[dict[str, str]] = {
    name: str(value) for name, value in timers.dialect_options[POSTGRESQL]["with"].items()
}
_AUTOVACUUM: Final = "autovacuum_"


def _found_on_postgresql(connection: Connection) -> _Parts:
    name = {"name": _prefix(connection) + timers.name}
    relation = connection.execute(text(_RELATION), name).one_or_none()
    if relation is None:
        return {}
    options = dict(option.split("=", 1) for option in relation.options or ())
    own = {key: value for key, value in options.items() if not key.startswith((_AUTOVACUUM, "toast."))}
    # a host may tune what is set for autovacuum, but not drop it
    tuned = {key: value for key, value in _OPTIONS.items() if key.startswith(_AUTOVACUUM) and key in options}
    parts = {"storage": relation.kind or _storage(own | tuned)}
    for its in connection.execute(text(_COLUMNS), name):
        if its.name in timers.columns or (its.required and its.value is None):
            parts[f"column {its.name}"] = (
                its.type
                + (f" COLLATE {its.collation}" if its.collation else "")
                + " NOT NULL" * its.required
                + (f" {its.value}" if its.value else "")
            )
    for its in connection.execute(text(_CONSTRAINTS), name):
        if its.type == "p":
            parts["primary key"] = its.definition.removeprefix("PRIMARY KEY ")
        else:
            parts[f"CHECK {its.name}"] = _canonical(connection, its.definition)
    names = {index.name for index in timers.indexes}
    for its in connection.execute(text(_INDEXES), name):
        if its.name in names:
            method = its.definition.partition(" USING ")[2].removeprefix("btree ")
            parts[f"index {its.name}"] = "UNIQUE " * its.is_unique + method + " INVALID" * (not its.is_valid)
    return parts


_RELATION: Final = """
SELECT c.reloptions AS options, CASE WHEN c.relkind <> 'r' THEN 'no ordinary table'
    WHEN c.relpersistence <> 'p' THEN 'UNLOGGED or temporary' END AS kind
FROM pg_catalog.pg_class c WHERE c.oid = to_regclass(CAST(:name AS text))"""
_COLUMNS: Final = """
SELECT CAST(a.attname AS text) AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS required,
    CASE WHEN a.attcollation <> t.typcollation THEN quote_ident(l.collname) END AS collation,
    CASE WHEN a.attidentity <> '' THEN 'IDENTITY' WHEN a.attgenerated <> '' THEN 'GENERATED'
        ELSE 'DEFAULT ' || pg_get_expr(d.adbin, d.adrelid) END AS value
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
    LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = to_regclass(CAST(:name AS text)) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""
_CONSTRAINTS: Final = """
SELECT CAST(c.conname AS text) AS name, CAST(c.contype AS text) AS type, pg_get_constraintdef(c.oid) AS definition
FROM pg_catalog.pg_constraint c
WHERE c.conrelid = to_regclass(CAST(:name AS text)) AND c.contype IN ('p', 'c') ORDER BY c.conname"""
_INDEXES: Final = """
SELECT CAST(c.relname AS text) AS name, pg_get_indexdef(c.oid) AS definition, i.indisunique AS is_unique,
    i.indisvalid AS is_valid
FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = to_regclass(CAST(:name AS text))"""
_IN_UTC: Final = """
SELECT to_char(timezone('UTC', CAST(CAST(:instant AS text) AS timestamptz)), 'YYYY-MM-DD HH24:MI:SS.US BC')"""

_INSTANT: Final = re.compile(r"'([^']*)'::timestamp with time zone|'(\d{4}-\d\d-\d\d [^']*)'")
_LITERAL: Final = re.compile(r"('(?:[^']|'')*')")
_CAST: Final = re.compile(r"::\w+")


def _canonical(connection: Connection, check: str) -> str:
    """The condition of a CHECK without what PostgreSQL adds when it shows one, and without the session's time zone."""

    def in_utc(literal: re.Match[str]) -> str:
        instant = literal[1] or literal[2]
        return f"'{connection.scalar(text(_IN_UTC), {'instant': instant})}'"

    pieces = _LITERAL.split(_INSTANT.sub(in_utc, check.removeprefix("CHECK ")))
    for place in range(0, len(pieces), 2):
        pieces[place] = re.sub(r'[\s()"]', "", _CAST.sub("", pieces[place])).lower()
    return "".join(piece.strip("'") if piece.strip("'").isdecimal() else piece for piece in pieces)


def _mend_on_postgresql(connection: Connection, part: str, found: _Parts) -> str:
    alter = f"ALTER TABLE {_prefix(connection)}{timers.name}"
    kind, _, name = part.partition(" ")
    if kind == "CHECK":
        drop = f"{alter} DROP CONSTRAINT {name}"
        add = [
            f"{alter} ADD CONSTRAINT {name} CHECK ({its.sqltext})" for its in _checks(connection) if its.name == name
        ]
        return "; ".join([drop] * (part in found) + add)
    if part == "primary key":
        return f"{alter} ADD PRIMARY KEY {_listed(timers.primary_key.columns.keys())}"
    if part == "storage":
        return f"{alter} {_mend_storage(found[part])}"
    if name not in timers.columns:
        return f"{alter} ALTER COLUMN {name} DROP NOT NULL"
    if part not in found:
        return f"{alter} ADD COLUMN {_definition(connection, name)}"
    type_ = _type(connection, name)
    change = f"ALTER COLUMN {name}"
    changes = [f"{change} DROP DEFAULT", f"{change} TYPE {type_} USING {name}::{type_}"]
    changes.append(f"{change} {'DROP' if timers.c[name].nullable else 'SET'} NOT NULL")
    changes += [f"{change} SET{_default(name)}"] * bool(_default(name))
    return f"{alter} {', '.join(changes)}"


def _mend_storage(found: str) -> str:
    if found != _PLAIN and "=" not in found:
        return "SET LOGGED"
    has = {} if found == _PLAIN else dict(option.split("=", 1) for option in found.split(", "))
    set_ = _storage({name: value for name, value in _OPTIONS.items() if has.get(name) != value})
    reset = ", ".join(sorted(has.keys() - _OPTIONS.keys()))
    return ", ".join([f"SET ({set_})"] * (set_ != _PLAIN) + [f"RESET ({reset})"] * bool(reset))


def _mend_index(connection: Connection, part: str, found: _Parts) -> str:
    (index,) = (its for its in timers.indexes if part == f"index {its.name}")
    prefix, on_postgresql = _prefix(connection), connection.dialect.name == POSTGRESQL
    drop = f"DROP INDEX {prefix}{index.name}; " if part in found else ""
    # PostgreSQL makes an index in the schema of its table, and SQLite looks for the table in the schema of the index
    name, of = (index.name, prefix + timers.name) if on_postgresql else (f"{prefix}{index.name}", timers.name)
    return f"{drop}CREATE INDEX {name} ON {of} {_listed(index.columns.keys())}"


# the SQLite family

_SHARED: Final = ("workflow_id", "timer_id", "fire_at")
"""The columns that the other program has and writes, too."""
_TRIGGER: Final = "SELECT sql FROM {}sqlite_master WHERE type = 'trigger' AND name = :name AND tbl_name = :table"


def _found_on_sqlite(connection: Connection) -> _Parts:
    schema, prefix = schema_of(connection), _prefix(connection)

    def pragma(name: str, of: str) -> list[Row[Any]]:
        return list(connection.exec_driver_sql(f"PRAGMA {prefix}{name}('{of}')"))

    columns = {its.name: its for its in pragma("table_xinfo", timers.name)}
    if not columns:
        return {}
    parts = {"storage": _PLAIN if pragma("index_list", timers.name) else "no table with a key"}
    collations: dict[str, str] = {}
    for index in pragma("index_list", timers.name):
        if index.origin == "pk" or index.name in {its.name for its in timers.indexes}:
            keys = [its for its in pragma("index_xinfo", index.name) if its.key]
            collations |= {str(its.name): its.coll for its in keys if its.coll != "BINARY"}
            listed = _listed([f"{its.name}{' DESC' * its.desc}" for its in keys])
            if index.origin != "pk":
                parts[f"index {index.name}"] = "UNIQUE " * index.unique + listed + " WHERE ..." * index.partial
    key = sorted((its.pk, name) for name, its in columns.items() if its.pk)
    parts["primary key"] = _listed([name for _, name in key])
    for name, its in columns.items():
        if name in timers.columns or (its.notnull and its.dflt_value is None and not its.hidden):
            parts[f"column {name}"] = _column_on_sqlite(its, collations.get(name))
    parts |= _trigger_on_sqlite(connection)
    # SQLite answers index_info for the name of a table only if that table is WITHOUT ROWID, as the one is that we make
    if pragma("index_info", timers.name):
        for check in inspect(connection).get_check_constraints(timers.name, schema=schema):
            parts[f"CHECK {check['name'] or check['sqltext']}"] = check["sqltext"]
    return parts


def _trigger_on_sqlite(connection: Connection) -> _Parts:
    its = {"name": MovedTrigger.name, "table": timers.name}
    sql = connection.scalar(text(_TRIGGER.format(_prefix(connection))), its)
    return {f"trigger {MovedTrigger.name}": _squeezed(sql)} if sql else {}


def _column_on_sqlite(its: Row[Any], collation: str | None) -> str:
    # a default of these three is nobody's: both programs always give a value
    default = None if its.name in _SHARED else its.dflt_value
    return str(
        its.type.upper()
        + (f" COLLATE {collation}" if collation else "")
        + " NOT NULL" * its.notnull
        + (f" DEFAULT {default}" if default is not None else "")
        + " GENERATED" * bool(its.hidden)
    )


def _mend_on_sqlite(connection: Connection, part: str, found: _Parts) -> str:
    prefix = _prefix(connection)
    # what mends a column makes the trigger as well
    drop_trigger = f"DROP TRIGGER IF EXISTS {prefix}{MovedTrigger.name}"
    create_trigger = MovedTrigger(timers).sql(prefix)
    kind, _, name = part.partition(" ")
    if kind == "trigger":
        return f"{drop_trigger}; {create_trigger}"
    if kind == "column" and name in timers.columns and name not in _SHARED:
        alter = f"ALTER TABLE {prefix}{timers.name}"
        add = f"{alter} ADD COLUMN {_definition(connection, name)}"
        # SQLite can't change a column, and drops none that a trigger names
        again = [drop_trigger, f"{alter} DROP COLUMN {name}", add, create_trigger]
        return "; ".join(again if part in found else [add])
    return _make_anew(connection)


def _make_anew(connection: Connection) -> str:
    prefix = _prefix(connection)
    return (
        f"ALTER TABLE {prefix}{timers.name} RENAME TO {timers.name}_before;"
        f" DROP INDEX IF EXISTS {prefix}idx_timers_fire_at; DROP TRIGGER IF EXISTS {prefix}{MovedTrigger.name};"
        f" DROP TABLE {prefix}{VERSION_TABLE}; then `alembic upgrade head`, and copy the rows over"
    )
