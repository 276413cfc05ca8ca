"""Brings archives of earlier versions up to date, by Alembic.

Each file of `versions/` leads from one schema to the next and is never changed
again; it imports nothing of this package.
"""

import pathlib

import alembic.command
import alembic.config
import sqlalchemy as sa

from selfdev_jax import errors


def stamp(connection: sa.Connection):
  """Says of an archive whose tables were just made that it is up to date."""
  alembic.command.stamp(_config(connection), "head")


def upgrade(connection: sa.Connection):
  """Brings an archive to the present schema, in the caller's transaction.

  Args:
    connection: within a transaction, with foreign keys off: tables are renamed
      and replaced.

  Raises:
    UserError: if a row names another that there is not.
  """
  config = _config(connection)
  if not sa.inspect(connection).has_table("alembic_version"):
    alembic.command.stamp(config, "4")  # The last that did not say so.
  alembic.command.upgrade(config, "head")
  broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
  if broken is not None:
    raise errors.UserError(
        f"the archive is damaged: a row of {broken.table} names what"
        f" {broken.parent} does not have"
    )


def _config(connection):
  config = alembic.config.Config()
  config.set_main_option(
      "script_location", str(pathlib.Path(__file__).parent).replace("%", "%%")
  )
  config.attributes["connection"] = connection
  return config
