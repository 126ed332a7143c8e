"""What else goes when a table is dropped.

libSQL enforces foreign keys from the start, and ``DROP TABLE`` then deletes the rows first. What other tables say about
that with ``ON DELETE CASCADE``, ``SET NULL`` or ``SET DEFAULT`` is done without a word. So a migration that copies a
table, drops it and renames the copy would lose the rows that refer to it.
"""

from collections.abc import Callable

from aion_timers.libsql.errors import IntegrityError
from aion_timers.libsql.sql import Parameters, Rows, Table, quoted

Fetch = Callable[[str, Parameters], Rows]
"""Runs a statement that reads, and returns its rows."""


def require_no_losses(table: Table, fetch: Fetch) -> None:
    """See that dropping a table changes no row of another one.

    Raises:
        IntegrityError: it would.
    """
    if fetch("PRAGMA foreign_keys", ()) != [(1,)]:
        return
    schema = table.schema or _schema_of(table.name, fetch)
    if schema is None:
        return
    losers = [
        f"{child!s} ({action!s})"
        for child, action, columns in fetch(_REFERENCES.format(schema=quoted(schema)), (schema, table.name, table.name))
        if fetch(_ANY.format(_path(schema, str(child)), columns), ())
    ]
    if losers and fetch(_ANY.format(_path(schema, table.name), "true"), ()):
        raise IntegrityError(
            f"DROP TABLE {table.name} would change or delete rows of other tables that refer to it:"
            f" {', '.join(losers)}; to keep them, run PRAGMA foreign_keys=OFF as the first statement on the connection,"
            f" and commit() before the next one; to let them go, delete the rows of {table.name} first"
        )


def _schema_of(name: str, fetch: Fetch) -> str | None:
    """The first schema with such a table, in the order in which SQLite looks."""
    schemas = [str(schema) for _, schema, _ in fetch("PRAGMA database_list", ())]
    for schema in sorted(schemas, key="temp".__ne__):
        if fetch(_ANY.format(_path(schema, "sqlite_schema"), "type = 'table' AND lower(name) = lower(?)"), (name,)):
            return schema
    return None


def _path(schema: str, table: str) -> str:
    return f"{quoted(schema)}.{quoted(table)}"


_REFERENCES = """
SELECT child.name, key.on_delete, group_concat('"' || replace(key."from", '"', '""') || '" IS NOT NULL', ' AND ')
FROM {schema}.sqlite_schema AS child, pragma_foreign_key_list(child.name, ?) AS key
WHERE child.type = 'table' AND lower(key."table") = lower(?) AND lower(child.name) <> lower(?)
    AND key.on_delete IN ('CASCADE', 'SET NULL', 'SET DEFAULT')
GROUP BY child.name, key.id
ORDER BY child.name, key.id
"""
_ANY = "SELECT 1 FROM {} WHERE {} LIMIT 1"
