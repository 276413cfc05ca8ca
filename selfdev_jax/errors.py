"""The one exception that a user sees as one line."""


class UserError(Exception):
  """Something the user can mend. The message names the thing and the way out.

  `launch/app.py` prints it without a traceback and exits with status 2.
  """
