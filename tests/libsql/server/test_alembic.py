"""Alembic on a libSQL server: what holds for a file holds here, with the same tests."""

from tests.libsql.test_alembic import (  # noqa: F401 - pytest finds them by their names
    alembic,
    test_a_migration_that_fails_leaves_nothing,
    test_autogenerate_in_batch_mode,
    test_batch_mode_deletes_nothing_in_other_tables,
    test_batch_mode_with_foreign_keys_off,
    test_foreign_keys_can_not_be_switched_where_it_would_be_ignored,
)
