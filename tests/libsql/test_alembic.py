"""Alembic on libSQL files: what migrations of an application rely on; sync and async."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.exc import IntegrityError, ProgrammingError

from aion_timers.libsql import dbapi


def fill(connection: sa.Connection, on_delete: str | None) -> None:
    """Two customers and three orders, which refer to them."""
    shop = sa.MetaData()
    customers = sa.Table(
        "customers",
        shop,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(20), nullable=False),
        sa.Index("ix_customers_name", "name", unique=True),
    )
    customer = sa.Column("customer", sa.ForeignKey("customers.id", ondelete=on_delete), server_default="1")
    orders = sa.Table("orders", shop, sa.Column("id", sa.Integer, primary_key=True), customer)
    shop.create_all(connection)
    connection.execute(customers.insert(), [{"id": 1, "name": "Ada"}, {"id": 2, "name": "Bob"}])
    connection.execute(orders.insert(), [{"id": 1, "customer": 1}, {"id": 2, "customer": 2}, {"id": 3, "customer": 2}])
    connection.commit()


def widen_names(connection: sa.Connection) -> None:
    """A migration in batch mode, as an application's env.py runs it."""
    context = MigrationContext.configure(connection)
    with context.begin_transaction(_per_migration=True), Operations(context).batch_alter_table("customers") as batch:
        batch.alter_column("name", type_=sa.String(40), existing_nullable=False)
        batch.add_column(sa.Column("city", sa.String))


def state(connection: sa.Connection) -> tuple[int, int, list[Any], list[str]]:
    """The customers, the orders, whose they are, and the tables."""
    return (
        connection.exec_driver_sql("SELECT count(*) FROM customers").scalar_one(),
        connection.exec_driver_sql("SELECT count(*) FROM orders").scalar_one(),
        list(connection.exec_driver_sql("SELECT customer FROM orders ORDER BY id").scalars()),
        sa.inspect(connection).get_table_names(),
    )


FILLED = (2, 3, [1, 2, 2], ["customers", "items", "orders"])


# -- tables that others refer to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_delete", ["CASCADE", "SET NULL", "SET DEFAULT"])
@pytest.mark.parametrize("read_first", [False, True])
def test_batch_mode_deletes_nothing_in_other_tables(world: Any, on_delete: str, read_first: bool) -> None:
    def body(connection: sa.Connection) -> None:
        fill(connection, on_delete)
        if read_first:
            connection.exec_driver_sql("SELECT * FROM orders").all()
            connection.commit()
        with pytest.raises(IntegrityError, match=rf"other tables .*: orders \({on_delete}\).* foreign_keys=OFF"):
            widen_names(connection)
        connection.rollback()
        assert state(connection) == FILLED
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []

    world.connection(body)


@pytest.mark.parametrize("on_delete", ["CASCADE", "SET NULL", "SET DEFAULT", "RESTRICT", None])
def test_batch_mode_with_foreign_keys_off(world: Any, on_delete: str | None) -> None:
    def body(connection: sa.Connection) -> None:
        fill(connection, on_delete)
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.commit()
        widen_names(connection)
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        connection.commit()
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        connection.commit()
        assert state(connection) == FILLED
        columns = {column["name"]: str(column["type"]) for column in sa.inspect(connection).get_columns("customers")}
        assert columns == {"id": "INTEGER", "name": "VARCHAR(40)", "city": "VARCHAR"}
        assert [index["name"] for index in sa.inspect(connection).get_indexes("customers")] == ["ix_customers_name"]
        (key,) = sa.inspect(connection).get_foreign_keys("orders")
        assert (key["referred_table"], key["options"].get("ondelete")) == ("customers", on_delete)
        with pytest.raises(IntegrityError):
            connection.exec_driver_sql("INSERT INTO orders VALUES (9, 9)")

    world.connection(body)


def test_foreign_keys_can_not_be_switched_where_it_would_be_ignored(world: Any) -> None:
    def body(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT * FROM items").all()
        with pytest.raises(ProgrammingError, match="first statement after"):
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")

    world.connection(body)


@pytest.fixture
def connection(database: Any) -> Any:
    connection = database.connect()
    yield connection
    connection.close()


def run(connection: dbapi.Connection, *statements: str) -> None:
    for statement in statements:
        connection.execute(statement)
    connection.commit()


REFERRED = ("CREATE TABLE parent (a INTEGER PRIMARY KEY, b, UNIQUE (a, b))", "INSERT INTO parent VALUES (1, 2)")


@pytest.mark.parametrize(
    "child",
    [
        "CREATE TABLE child (x REFERENCES parent ON DELETE CASCADE)",
        "CREATE TABLE child (x, y, FOREIGN KEY (x, y) REFERENCES PARENT (a, b) ON DELETE SET NULL)",
        'CREATE TABLE child ("odd "" name" REFERENCES "parent" ON DELETE CASCADE)',
    ],
)
@pytest.mark.parametrize(
    "drop",
    [
        "DROP TABLE parent",
        "drop table if exists main.PARENT;",
        'DROP /* it */ TABLE "main" . "parent" -- now',
        "DROP TABLE [parent]",
        "DROP TABLE `parent`",
        "DROP TABLE 'parent'",
    ],
)
@pytest.mark.parametrize("level", ["SERIALIZABLE", "IMMEDIATE", "AUTOCOMMIT"])
def test_a_table_that_others_refer_to_is_not_dropped(
    connection: dbapi.Connection, child: str, drop: str, level: str
) -> None:
    values = "1, 2" if "x, y" in child else "1"
    run(connection, *REFERRED, child, f"INSERT INTO child VALUES ({values})")
    connection.isolation_level = level
    with pytest.raises(dbapi.IntegrityError, match=r"child \((CASCADE|SET NULL)\)"):
        connection.execute(drop)
    connection.rollback()
    assert connection.execute("SELECT * FROM child").fetchall() == [tuple(map(int, values.split(", ")))]
    run(connection, "DELETE FROM child", drop)


@pytest.mark.parametrize(
    "others",
    [
        (),
        ("CREATE TABLE child (x REFERENCES parent ON DELETE CASCADE)",),
        ("CREATE TABLE child (x REFERENCES parent ON DELETE CASCADE)", "INSERT INTO child VALUES (NULL)"),
        (
            "CREATE TABLE child (x, y, FOREIGN KEY (x, y) REFERENCES parent (a, b) ON DELETE CASCADE)",
            "INSERT INTO child VALUES (1, NULL)",
        ),
        (
            "CREATE TABLE child (x REFERENCES parent ON DELETE CASCADE)",
            "INSERT INTO child VALUES (1)",
            "DELETE FROM parent",
        ),
        (
            "ALTER TABLE parent ADD COLUMN c REFERENCES parent ON DELETE CASCADE",
            "UPDATE parent SET c = 1",
        ),
    ],
    ids=["nothing", "no row", "null", "half null", "deleted before", "itself"],
)
def test_a_table_is_dropped_where_no_other_row_would_change(
    connection: dbapi.Connection, others: tuple[str, ...]
) -> None:
    run(connection, *REFERRED, *others, "DROP TABLE parent")
    with pytest.raises(dbapi.OperationalError, match="no such table"):
        connection.execute("SELECT * FROM parent")


def test_what_sqlite_refuses_itself(connection: dbapi.Connection) -> None:
    run(connection, *REFERRED, "CREATE TABLE child (x REFERENCES parent)", "INSERT INTO child VALUES (1)")
    with pytest.raises(dbapi.IntegrityError, match="FOREIGN KEY constraint failed"):
        connection.execute("DROP TABLE parent")
    with pytest.raises(dbapi.OperationalError, match="no such table: nobody"):
        connection.execute("DROP TABLE nobody")


def test_a_temporary_table_hides_one_that_others_refer_to(connection: dbapi.Connection) -> None:
    run(
        connection,
        *REFERRED,
        "CREATE TABLE child (x REFERENCES parent ON DELETE CASCADE)",
        "INSERT INTO child VALUES (1)",
        "CREATE TEMPORARY TABLE parent (a)",
        "DROP TABLE parent",
    )
    with pytest.raises(dbapi.IntegrityError):
        connection.execute("DROP TABLE parent")


def test_rows_that_another_connection_has_added_meanwhile(connection: dbapi.Connection, database: Any) -> None:
    run(connection, *REFERRED, "CREATE TABLE child (x REFERENCES parent ON DELETE CASCADE)")
    connection.execute("SELECT 1 FROM items").fetchall()
    database.run("INSERT INTO child VALUES (1)")
    with pytest.raises(dbapi.IntegrityError, match="child"):
        connection.execute("DROP TABLE parent")


# -- the command line --------------------------------------------------------------------------------------------------

ENV = """
import sqlalchemy as sa
from alembic import context

def run(connection):
    context.configure(connection=connection, target_metadata=sa.MetaData(), render_as_batch=True, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()

OPTIONS = context.config.attributes["options"]
context.config.attributes["world"].connection(run)
"""
FIRST = """
revision, down_revision = "1", None
from alembic import op
import sqlalchemy as sa

def upgrade():
    op.create_table("first", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String))
    op.execute("INSERT INTO first VALUES (1, 'a'), (2, NULL)")

def downgrade():
    op.drop_table("first")
"""
SECOND = """
revision, down_revision = "2", "1"
from alembic import op
import sqlalchemy as sa

def upgrade():
    op.create_table("halfway", sa.Column("id", sa.Integer))
    op.execute("INSERT INTO halfway VALUES (1)")
    with op.batch_alter_table("first") as batch:
        batch.alter_column("name", nullable=False)

def downgrade():
    with op.batch_alter_table("first") as batch:
        batch.alter_column("name", nullable=True)
    op.drop_table("halfway")
"""


@pytest.fixture
def alembic(tmp_path: Path, world: Any) -> Callable[..., None]:
    """Runs a command of Alembic on two migrations, of which the second fails at its end while a name is null."""
    from alembic import command  # noqa: PLC0415 - a fixture of that name
    from alembic.config import Config  # noqa: PLC0415 - beside it

    scripts = tmp_path / "scripts"
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(ENV)
    (scripts / "versions" / "one.py").write_text(FIRST)
    (scripts / "versions" / "two.py").write_text(SECOND)
    config = Config()
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("path_separator", "os")
    config.attributes["world"] = world

    def run(name: str, *arguments: str, **options: bool) -> None:
        config.attributes["options"] = options
        getattr(command, name)(config, *arguments)

    return run


def tables(connection: sa.Connection) -> list[str]:
    return sa.inspect(connection).get_table_names()


def version(connection: sa.Connection) -> object:
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


@pytest.mark.parametrize("whole", [False, True], ids=["a transaction each", "one transaction"])
def test_a_migration_that_fails_leaves_nothing(world: Any, alembic: Callable[..., None], whole: bool) -> None:
    with pytest.raises(IntegrityError, match="NOT NULL"):
        alembic("upgrade", "head", transactional_ddl=whole)
    if whole:
        assert world.connection(tables) == ["items"]
        alembic("upgrade", "1", transactional_ddl=whole)
    assert world.connection(tables) == ["alembic_version", "first", "items"]
    assert world.connection(version) == "1"

    world.connection(lambda c: (c.exec_driver_sql("DELETE FROM first WHERE name IS NULL"), c.commit()))
    alembic("upgrade", "head", transactional_ddl=whole)
    assert world.connection(tables) == ["alembic_version", "first", "halfway", "items"]
    with pytest.raises(IntegrityError):
        world.connection(lambda c: c.exec_driver_sql("INSERT INTO first VALUES (3, NULL)"))
    alembic("downgrade", "base", transactional_ddl=whole)
    assert world.connection(tables) == ["alembic_version", "items"]
    assert world.connection(version) is None


def test_autogenerate_in_batch_mode(world: Any) -> None:
    """What Alembic writes by itself makes the database equal to the models."""

    def body(connection: sa.Connection) -> None:
        fill(connection, None)
        wanted = sa.MetaData()
        sa.Table(
            "customers",
            wanted,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(20)),
            sa.Column("city", sa.String(20), nullable=False, server_default="-"),
        )
        options = {"render_as_batch": True, "include_object": lambda thing, *_: getattr(thing, "name", "") != "items"}
        context = MigrationContext.configure(connection, opts=options)
        connection.exec_driver_sql("DROP TABLE orders")  # it would have to go first, and Alembic begins with the other
        assert compare_metadata(context, wanted)
        code = render_python_code(produce_migrations(context, wanted).upgrade_ops, render_as_batch=True)
        assert "batch_alter_table" in code
        exec(f"def upgrade(op, sa):\n    {code.strip()}", scope := {})  # noqa: S102 - as Alembic runs it
        scope["upgrade"](Operations(context), sa)
        connection.commit()
        assert compare_metadata(context, wanted) == []
        assert connection.exec_driver_sql("SELECT * FROM customers").all() == [(1, "Ada", "-"), (2, "Bob", "-")]

    world.connection(body)


def test_a_failed_migration_frees_the_lock(database: Any, alembic: Callable[..., None]) -> None:
    with pytest.raises(IntegrityError):
        alembic("upgrade", "head")
    assert not database.locked
