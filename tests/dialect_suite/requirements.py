"""What SQLite can do, for the baseline and for libSQL alike: neither skips what the other has to pass."""

from typing import Any

from sqlalchemy.testing import exclusions
from sqlalchemy.testing.requirements import SuiteRequirements

_SUPPORTED = """
    autocommit autoincrement_insert autoincrement_without_sequence cast_precision_numerics_many_significant_digits
    check_constraint_reflection computed_columns computed_columns_reflect_persisted computed_columns_stored
    computed_columns_virtual create_table create_temp_table_as ctes ctes_on_dml ctes_with_update_delete ctes_with_values
    date date_implicit_bound datetime datetime_literals dbapi_lastrowid duplicate_key_raises_integrity_error except_
    expression_server_defaults fk_constraint_option_reflection_ondelete_noaction
    fk_constraint_option_reflection_ondelete_restrict fk_constraint_option_reflection_onupdate_restrict
    float_or_double_precision_behaves_generically foreign_key_constraint_name_reflection
    foreign_key_constraint_option_reflection_ondelete foreign_key_constraint_option_reflection_onupdate foreign_key_ddl
    foreign_keys get_isolation_level_values has_temp_table implicit_decimal_binds index_ddl_if_exists
    indexes_check_column_order indexes_with_ascdesc indexes_with_expressions infinity_floats
    inline_check_constraint_reflection isolation_level json_array_indexes json_type nullable_booleans
    order_by_col_from_union percent_schema_names precision_generic_float_type precision_numerics_enotation_large
    precision_numerics_general queue_pool recursive_fk_cascade reflect_table_options reflects_pk_names regexp_match
    repeated_remote_col_foreign_keys schemas skip_autocommit_rollback standalone_binds standard_cursor_sql
    supports_bitwise_and supports_bitwise_not supports_bitwise_or supports_bitwise_shift supports_is_distinct_from
    symbol_names_w_double_quote table_ddl_if_exists temp_table_names temporary_tables temporary_views time
    timestamp_microseconds_implicit_bound tuple_in tuple_in_w_empty unicode_connections unicode_data_no_special_types
    unique_constraint_reflection update_from update_where_target_in_subquery uuid_data_type view_column_reflection views
    window_functions window_range window_range_numeric
""".split()  # noqa: SIM905 - one name a line would fill a page

_UNSUPPORTED = """
    implicitly_named_constraints parens_in_union_contained_select_w_limit_offset
    parens_in_union_contained_select_wo_limit_offset
""".split()  # noqa: SIM905 - as above


class Requirements(SuiteRequirements):  # type: ignore[misc] # it has no types
    """SQLAlchemy's defaults for an unknown database, corrected for SQLite."""

    def get_isolation_levels(self, config: Any) -> dict[str, Any]:
        """The levels of a dialect."""
        return {"default": "SERIALIZABLE", "supported": list(config.db.dialect.get_isolation_level_values(None))}


for _name in _SUPPORTED:
    setattr(Requirements, _name, property(lambda _: exclusions.open()))
for _name in _UNSUPPORTED:
    setattr(Requirements, _name, property(lambda _: exclusions.closed()))
