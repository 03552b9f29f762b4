from alembic import op

revision = "1a"
down_revision = None


def upgrade():
    op.execute("create table first (id int primary key)")


def downgrade():
    op.execute("drop table first")
