"""Schema 4, the first that can be brought up to date."""

import pathlib

from alembic import op

revision = "4"
down_revision = None


def upgrade():
  tables = pathlib.Path(__file__).with_suffix(".sql")
  for statement in tables.read_text(encoding="utf-8").split(";\n"):
    op.get_bind().exec_driver_sql(statement)
