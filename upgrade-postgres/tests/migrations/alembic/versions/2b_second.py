import os

from alembic import op

revision = "2b"
down_revision = "1a"


def upgrade():
    op.execute("create table second (id int references first)")
    if os.environ.get("FAIL"):
        print("the password is", os.environ["PGPASSWORD"])
        raise RuntimeError("a failure in the middle, of " + os.environ["DATABASE_URL"])
    if os.environ.get("HANG"):
        op.execute("select pg_sleep(600)")


def downgrade():
    op.execute("drop table second")
