"""What this room raises."""

from selfdev_jax import errors


class ConvertError(errors.UserError):
  """A model directory that is missing, unreadable or not as expected."""
