"""A host's own comparison with its metadata leaves alone what is ours, and nothing else."""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Connection, Integer, MetaData, Table

from aion_timers import Timer, migrate
from tests.migrations.conftest import Database


def differences(database: Database, metadata: Any, **options: Any) -> list[tuple[str, str]]:
    """What Alembic would do: the operation, and the name of its table."""

    def compare(connection: Connection) -> list[Any]:
        opts = {"include_object": migrate.include_object, "target_metadata": metadata, **options}
        return list(compare_metadata(MigrationContext.configure(connection, opts=opts), metadata))

    return sorted((each[0], each[1].name) for each in database.run(compare))


def test_our_tables_are_left_out(database: Database) -> None:
    database.run(migrate.upgrade)
    database.sql("CREATE TABLE orders (id INTEGER)", "CREATE TABLE leftover (id INTEGER)")
    metadata = MetaData()
    Table("orders", metadata, Column("id", Integer, nullable=True))
    Table("parcels", metadata, Column("id", Integer))
    assert differences(database, metadata) == [("add_table", "parcels"), ("remove_table", "leftover")]
    assert ("remove_table", "timers") in differences(database, metadata, include_object=None)


def test_a_table_of_the_hosts_own_that_has_our_name_is_not(database: Database) -> None:
    database.sql("CREATE TABLE timers (id INTEGER, egg INTEGER)")
    assert differences(database, MetaData()) == [("remove_table", "timers")]
    metadata = MetaData()
    Table("timers", metadata, Column("id", Integer), Column("egg", Integer), Column("minutes", Integer))

    def compare(connection: Connection) -> list[Any]:
        opts = {"include_object": migrate.include_object}
        return list(compare_metadata(MigrationContext.configure(connection, opts=opts), metadata))

    (change,) = database.run(compare)
    assert (change[0], change[2], change[3].name) == ("add_column", "timers", "minutes")


def test_our_metadata_may_be_listed_instead(database: Database) -> None:
    assert ("add_table", "timers") in differences(database, Timer.metadata)
    database.run(migrate.upgrade)
    assert differences(database, Timer.metadata) == []
    database.sql("DROP INDEX idx_timers_fire_at")
    assert differences(database, Timer.metadata) == [("add_index", "idx_timers_fire_at")]
