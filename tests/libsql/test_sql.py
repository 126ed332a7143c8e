import pytest

from aion_timers.libsql import DataError, NotSupportedError, ProgrammingError
from aion_timers.libsql.sql import Kind, bindable, parse


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("select 1", Kind.READ),
        ("\ufeff ;; -- comment\n/* another */ SELECT 1", Kind.READ),
        ("values (1)", Kind.READ),
        ("explain insert into t values (1)", Kind.READ),
        ("explain query plan select 1", Kind.READ),
        ("with q as (select 1) select * from q", Kind.READ),
        ("with q as materialized (select 1) values (2)", Kind.READ),
        ("with q as (select 'insert' x) select x from q", Kind.READ),
        ("with insert_ as (select 1) select 1", Kind.READ),
        ('with "update" as (select 1) select 1', Kind.READ),
        ("with q as (select 1) -- update\n select 1", Kind.READ),
        ("with q(a) as (values (1)), r as (select a from q) insert into t select a from r", Kind.WRITE),
        ("with recursive q(a) as (select 1 union select a + 1 from q) update t set a = 1", Kind.WRITE),
        ("with q as (select 1) delete from t", Kind.WRITE),
        ("with q as (select 1) replace into t values (1)", Kind.WRITE),
        ("insert into t values (1) returning a", Kind.WRITE),
        ("/* c */ insert into t values (1)", Kind.WRITE),
        ("replace into t values (1)", Kind.WRITE),
        ("create temp table t (a)", Kind.WRITE),
        ("drop table if exists t", Kind.WRITE),
        ("alter table t add column b", Kind.WRITE),
        ("reindex", Kind.WRITE),
        ("analyze", Kind.WRITE),
        ("pragma user_version", Kind.INSPECT),
        ("pragma table_info(t)", Kind.INSPECT),
        ('PRAGMA main.table_xinfo("t")', Kind.INSPECT),
        ("PRAGMA [main] . [table_xinfo] (t)", Kind.INSPECT),
        ("PRAGMA/**/user_version -- looks\n", Kind.INSPECT),
        ("PRAGMA user_version/**/=/**/8", Kind.CONFIGURE),
        ("PRAGMA main/**/.user_version=7", Kind.CONFIGURE),
        ("PRAGMA user_version -- one\n = 9", Kind.CONFIGURE),
        ("pragma user_version = 3", Kind.CONFIGURE),
        ("pragma foreign_keys(0)", Kind.CONFIGURE),
        ("pragma wal_checkpoint", Kind.CONFIGURE),
        ("attach ':memory:' as m", Kind.CONFIGURE),
        ("detach m", Kind.CONFIGURE),
        ("vacuum", Kind.CONFIGURE),
        ("begin immediate", Kind.BEGIN),
        ("commit", Kind.COMMIT),
        ("end transaction", Kind.COMMIT),
        ("rollback", Kind.ROLLBACK),
        ("rollback transaction", Kind.ROLLBACK),
        ("savepoint a", Kind.SAVEPOINT),
        ("release a", Kind.RELEASE),
        ("rollback to a", Kind.ROLLBACK_TO),
        ("rollback transaction to savepoint a", Kind.ROLLBACK_TO),
    ],
)
def test_kind(sql: str, kind: Kind) -> None:
    assert parse(sql).kind is kind


@pytest.mark.parametrize(
    ("sql", "name"),
    [
        ('SAVEPOINT "Sp 1"', "sp 1"),
        ("release savepoint sp", "sp"),
        ("release savepoint", "savepoint"),
        ("rollback to sp", "sp"),
        ("rollback transaction to savepoint sp", "sp"),
    ],
)
def test_savepoint_name(sql: str, name: str) -> None:
    assert parse(sql).name == name


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("select ?, '?', \"?\", `?`, [?] /* ? */, ? -- ?", 2),
        ("select '''?', ?", 1),
        ("select 1", 0),
        ("select a->>'$.b', c$d, 1e5 from t", 0),
    ],
)
def test_parameters_are_counted_outside_quotes_and_comments(sql: str, count: int) -> None:
    assert parse(sql).parameter_count == count


@pytest.mark.parametrize("sql", ["select ?1", "select :a", "select @a", "select $a"])
def test_other_parameter_styles_are_refused(sql: str) -> None:
    with pytest.raises(NotSupportedError, match="written '\\?'"):
        parse(sql)


def test_one_statement_at_a_time() -> None:
    with pytest.raises(ProgrammingError, match="one statement"):
        parse("insert into t values (1); drop table t")
    parse("select 1; -- nothing more")
    parse("create trigger a after insert on t begin update t set a = 1; update t set a = 2; end")
    parse("create temp trigger if not exists a after insert on t begin select 1; end;")


def test_only_whole_text_is_a_statement() -> None:
    with pytest.raises(ProgrammingError, match="NUL"):
        parse("select 1\0")
    with pytest.raises(ProgrammingError, match="a str, not bytes"):
        parse(b"select 1")  # type: ignore[arg-type]


def test_wide_integers_are_written_into_the_text() -> None:
    statement = parse("select ?, '?', ?, ?")
    sql, parameters = statement.inlined((2**40, -(2**63), "x"))
    assert parameters == ("x",)
    assert str(2**40) in sql
    assert str(-(2**63)) in sql
    assert parse(sql).parameter_count == 1


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, "a\0b", "\ud800"])
def test_what_cannot_be_stored(value: object) -> None:
    with pytest.raises(DataError):
        bindable(value)
