"""Schema 6: what happened to workers of a run over many hosts."""

import pathlib

from alembic import op

revision = "6"
down_revision = "5"


def upgrade():
  ddl = pathlib.Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
  op.get_bind().exec_driver_sql(ddl)
