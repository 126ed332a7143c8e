"""Random statements with parameters of every type do the same here as with Python's own ``sqlite3``, on files apart.

Left out is what the two SQLite libraries answer differently, being of different versions and settings: JSON, functions
of mathematics, regular expressions, LIKE on blobs, what RETURNING says of REAL columns, and fractions that are not of
few binary digits.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aion_timers.libsql import dbapi

Part: TypeAlias = tuple[str, tuple[Any, ...]]
"""A piece of SQL with the values of its ``?`` marks."""


class Word(str):
    """A str that is not quite one."""

    __slots__ = ()


class Number(int):
    """An int that is not quite one."""


def put(template: str, *parts: Part) -> Part:
    """The template with its ``{}`` filled; values come in the order of the text."""
    return template.format(*(sql for sql, _ in parts)), tuple(value for _, values in parts for value in values)


# -- values ------------------------------------------------------------------------------------------------------------

INTEGERS = st.one_of(
    st.integers(-3, 5),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, -(2**63)]),
)
REALS = st.one_of(st.integers(-9999, 9999).map(lambda n: n / 8), st.sampled_from([-0.0, 1e18, float("inf"), -1e-300]))
TEXTS = st.text("aAzéß😀 019-.e%_'\"?;", max_size=5)
BLOBS = st.text("aZ09 -.%", max_size=4).map(str.encode)
STORABLE = st.one_of(st.none(), INTEGERS, REALS, TEXTS, BLOBS)
ODD = st.one_of(
    st.booleans(),
    TEXTS.map(Word),
    st.integers(-9, 2**40).map(Number),
    BLOBS.map(bytearray),
    BLOBS.map(memoryview),
    st.just(float("nan")),
    # refused by both
    st.sampled_from([2**63, -(2**63) - 1, 10**30, Number(2**63), Decimal(1), (), [1], 1j, object()]),
)
VALUES = st.one_of(STORABLE, STORABLE, STORABLE, ODD)

# -- expressions -------------------------------------------------------------------------------------------------------

COLUMNS = ("id", "i", "r", "x", "b", "n")
MARKS: st.SearchStrategy[Part] = STORABLE.map(lambda value: ("?", (value,)))
LITERALS = st.sampled_from(["NULL", "0", "1", "-1", "2.5", "'a'", "'it''s ?'", "''", "x'61'", "9223372036854775807"])
CONSTANTS: st.SearchStrategy[Part] = st.one_of(MARKS, MARKS, LITERALS.map(lambda text: (text, ())))
UNARY = """
(-_{}) (~{}) (NOT_{}) ({}_IS_NULL) ({}_COLLATE_NOCASE) CAST({}_AS_INTEGER) CAST({}_AS_REAL) CAST({}_AS_TEXT)
CAST({}_AS_BLOB) CAST({}_AS_NUMERIC) abs({}) length({}) upper({}) lower({}) typeof({}) hex({}) trim({}) unicode({})
"""
BINARY = """
({}+{}) ({}_-_{}) ({}*{}) ({}/{}) ({}%{}) ({}||{}) ({}&{}) ({}|{}) ({}<<{}) ({}>>{}) ({}={}) ({}<>{}) ({}<{}) ({}<={})
({}_AND_{}) ({}_OR_{}) ({}_IS_{}) ({}_IS_NOT_{}) coalesce({},{}) nullif({},{}) instr({},{}) min({},{})
max({},{}) (CAST({}_AS_TEXT)_LIKE_CAST({}_AS_TEXT)) (CAST({}_AS_TEXT)_GLOB_CAST({}_AS_TEXT))
"""
TERNARY = "({}_BETWEEN_{}_AND_{}) ({}_IN_({},{})) CASE_WHEN_{}_THEN_{}_ELSE_{}_END replace({},{},{})"


def expressions(leaves: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
    """Expressions of these leaves."""

    def larger(smaller: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
        return st.one_of(
            st.builds(put, st.sampled_from([one.replace("_", " ") for one in table.split()]), *[smaller] * size)
            for size, table in enumerate((UNARY, BINARY, TERNARY), 1)
        )

    return st.recursive(leaves, larger, max_leaves=5)


ON_NOTHING = expressions(CONSTANTS)
ON_ROWS = expressions(st.one_of(CONSTANTS, st.sampled_from(COLUMNS).map(lambda name: (name, ()))))

# -- statements --------------------------------------------------------------------------------------------------------

TABLE = """
CREATE TABLE t (
    id INTEGER PRIMARY KEY, i INTEGER, r REAL, x TEXT UNIQUE, b BLOB, n NUMERIC NOT NULL DEFAULT 0, CHECK (id < 50)
)
"""
ROWS = [
    (1, 7, 2.5, "a", b"a", 1),
    (2, 2**62 + 1, -0.125, "Éa😀", b"", "12"),
    (3, None, None, None, None, 0.5),
    (4, -(2**31) - 1, 1e18, "10", b"10", "ten"),
]

Statement: TypeAlias = tuple[str, list[tuple[Any, ...]]]
"""The SQL, and one set of values or several."""


def once(part: Part) -> Statement:
    return part[0], [part[1]]


def insertion(conflict: str, rows: list[tuple[Any, ...]], upsert: Part, returning: str) -> Statement:
    sql, values = upsert
    returning *= len(rows) == 1  # executemany() drops the rows that are returned
    return f"INSERT {conflict} INTO t (id, x, n) VALUES (?, ?, ?) {sql} {returning}", [row + values for row in rows]


CONFLICTS = st.sampled_from(["", "", "OR IGNORE", "OR REPLACE", "OR FAIL", "OR ABORT", "OR ROLLBACK"])
RETURNING = st.sampled_from(["", "RETURNING id, typeof(x), i, x, b"])
NEW_ROWS = st.tuples(
    st.one_of(st.none(), st.integers(1, 60), VALUES),
    st.one_of(st.sampled_from(["a", "b", "10"]), VALUES),
    st.one_of(st.integers(0, 3), VALUES),
)
UPSERTS: st.SearchStrategy[Part] = st.one_of(
    st.just(("", ())),
    st.just(("ON CONFLICT (x) DO NOTHING", ())),
    ON_ROWS.map(partial(put, "ON CONFLICT (x) DO UPDATE SET i = {}, n = excluded.n")),
)
STATEMENTS: st.SearchStrategy[Statement] = st.one_of(
    st.builds(partial(put, "SELECT {}, {}"), ON_NOTHING, ON_NOTHING).map(once),
    st.builds(partial(put, "SELECT id, {}, {} FROM t WHERE {} ORDER BY {}, id"), *[ON_ROWS] * 4).map(once),
    st.builds(
        partial(put, "SELECT {}, count(*), sum({}), min({}), max({}), total(i) FROM t WHERE {} GROUP BY 1 ORDER BY 1"),
        *[ON_ROWS] * 5,
    ).map(once),
    st.builds(partial(put, "WITH s AS (SELECT {} AS a FROM t) SELECT DISTINCT a FROM s ORDER BY 1"), ON_ROWS).map(once),
    st.builds(insertion, CONFLICTS, st.lists(NEW_ROWS, min_size=1, max_size=3), UPSERTS, RETURNING),
    st.builds(
        lambda conflict, column, value, where, returning: once(
            put(f"UPDATE {conflict} t SET {column} = {{}} WHERE {{}} {returning}", value, where)
        ),
        CONFLICTS,
        st.sampled_from(COLUMNS),
        ON_ROWS,
        ON_ROWS,
        RETURNING,
    ),
    st.builds(lambda where, returning: once(put(f"DELETE FROM t WHERE {{}} {returning}", where)), ON_ROWS, RETURNING),
    VALUES.map(lambda value: ("SELECT ?", [(value,)])),
    st.binary(max_size=8).map(lambda data: ("SELECT ?, hex(?), length(?), typeof(?)", [(data,) * 4])),
    st.lists(VALUES, max_size=3).map(lambda values: ("INSERT INTO t (i, b) VALUES (?, ?)", [tuple(values)])),
    st.sampled_from(
        [
            *("SAVEPOINT s", "RELEASE s", "ROLLBACK TO s", "SELECT nothing FROM t", "SELECT * FROM nobody"),
            *("SELEC 1", "SELECT 1 FROM", "SELECT 1; SELECT 2", "-- ;\nSELECT 1;", "SELECT (1, 2)"),
            *("SELECT abs(-9223372036854775808)", "SELECT zeroblob(2000000000)", "INSERT INTO t VALUES (1)"),
            *("INSERT INTO t (id) VALUES (1)", "INSERT INTO t (n) VALUES (NULL)", "CREATE TABLE t (a)"),
            *("CREATE TABLE IF NOT EXISTS other (a)", "DROP TABLE other"),
        ]
    ).map(lambda sql: (sql, [()])),
)

# -- running them ------------------------------------------------------------------------------------------------------


class World:
    """A connection of one of the two modules, each with a database of its own."""

    def __init__(self, connection: Any, module: Any) -> None:
        self.connection = connection
        self._module = module

    def fill(self) -> None:
        """Make the table, with four rows."""
        self.connection.execute(TABLE)
        self.connection.cursor().executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", ROWS)
        self.connection.commit()

    def run(self, sql: str, sets: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """All that can be seen of a statement: its rows and counts, or the class of its error."""
        cursor = self.connection.cursor()
        try:
            if len(sets) > 1:
                cursor.executemany(sql, sets)
            else:
                cursor.execute(sql, sets[0])
            rows = cursor.fetchall() if cursor.description else None
        except (self._module.Error, OverflowError) as error:
            return (self._class_of(error),)
        # the name of an expression is its text as SQLite sees it, and wide integers are written into that here
        names = cursor.description and [name if name.isidentifier() else "" for name, *_ in cursor.description]
        # as text, since 1, 1.0 and True are equal, as are -0.0 and 0.0
        found = None if rows is None else [repr(row) for row in rows]
        if found and "RETURNING" in sql:
            found.sort()
        changes = cursor.rowcount if rows is None and sql.startswith(("INSERT", "UPDATE", "DELETE")) else None
        inserted = cursor.lastrowid if sql.startswith("INSERT  INTO") and len(sets) == 1 else None
        return names, found, changes, inserted

    def _class_of(self, error: Exception) -> str:
        # what sqlite3 leaves to Python's own errors is of the class that PEP 249 has for such values
        return type(error).__name__ if isinstance(error, self._module.Error) else "DataError"


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[tuple[World, World]]:
    """Ours on a file, and SQLite in memory."""
    ours = World(dbapi.connect(tmp_path / "ours.db"), dbapi)
    # a statement in its cache that has failed gives its error to a later one whose values can't be bound
    theirs = World(sqlite3.connect(":memory:", isolation_level=None, cached_statements=0), sqlite3)
    theirs.connection.execute("PRAGMA foreign_keys=ON")
    for world in (ours, theirs):
        world.fill()
    yield ours, theirs
    for world in (ours, theirs):
        world.connection.close()


PER_EXAMPLE = 10


@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE"])
@pytest.mark.parametrize("examples", [20, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_random_statements(
    worlds: tuple[World, World], level: str, examples: int, record_property: Callable[..., None]
) -> None:
    ours, theirs = worlds
    ours.connection.isolation_level = level
    counts: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, database=None)
    @given(st.lists(STATEMENTS, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
    def compare(program: list[Statement]) -> None:
        theirs.connection.execute("BEGIN")
        try:
            for sql, sets in program:
                expected = theirs.run(sql, sets)
                assert ours.run(sql, sets) == expected, (sql, sets)
                counts["statements"] += 1
                counts["errors"] += len(expected) == 1
                if not theirs.connection.in_transaction:
                    # SQLite has rolled back; a statement more would be a transaction of its own, and is refused here
                    assert ours.run("SELECT 1", [()]) == ("OperationalError",)
                    return
        finally:
            for world in worlds:
                world.connection.rollback()

    compare()
    assert counts["statements"] > examples * PER_EXAMPLE * 0.8
    assert counts["errors"] > examples * PER_EXAMPLE * 0.02
    row = {"level": level, "statements": counts["statements"], "of them errors": counts["errors"], "different": 0}
    record_property("libSQL file: random statements against sqlite3", row)
