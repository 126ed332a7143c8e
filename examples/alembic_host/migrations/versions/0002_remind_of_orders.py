"""Let orders be paid until a certain instant, and remind of those that are there already.

It writes timers, so their table has to be there: that is what ``depends_on`` says. The oldest revision of aion_timers
that has what a migration needs is enough.
"""

import sqlalchemy as sa
from alembic import context, op
from shop import SCHEMA

from aion_timers import TimerEntry, TimerRepository

revision = "shop0002"
down_revision = "shop0001"
branch_labels = None
depends_on = "aion0002"


def upgrade() -> None:
    """Add the column, and a timer to each order."""
    with op.batch_alter_table("orders", schema=SCHEMA) as orders:
        orders.add_column(sa.Column("pay_until", sa.DateTime()))
    if context.is_offline_mode():
        return  # a timer is written through the repository, not as SQL
    table = sa.table("orders", sa.column("id", sa.Uuid()), schema=SCHEMA)
    timers = TimerRepository(op.get_bind())
    now = timers.now()
    timers.schedule_many(
        TimerEntry(order_id, "payment-reminder", now) for order_id in op.get_bind().scalars(sa.select(table.c.id)).all()
    )


def downgrade() -> None:
    """Drop the column; the timers stay."""
    with op.batch_alter_table("orders", schema=SCHEMA) as orders:
        orders.drop_column("pay_until")
