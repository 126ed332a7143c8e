"""Let an order carry a note, and shorten the customer; SQLite makes the table anew for that."""

import sqlalchemy as sa
from alembic import op
from shop import SCHEMA

revision = "shop0002"
down_revision = "shop0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and change the other."""
    with op.batch_alter_table("orders", schema=SCHEMA) as orders:
        orders.add_column(sa.Column("note", sa.String()))
        orders.alter_column("customer", existing_type=sa.Text(), type_=sa.String(), existing_nullable=False)


def downgrade() -> None:
    """Change it back and drop the note."""
    with op.batch_alter_table("orders", schema=SCHEMA) as orders:
        orders.alter_column("customer", existing_type=sa.String(), type_=sa.Text(), existing_nullable=False)
        orders.drop_column("note")
