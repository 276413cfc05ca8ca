"""Who may use a cluster; to be settled before Ray is imported."""

import os
import secrets


def guard_local():
  """Keeps the cluster that this process will start on loopback, with a token.

  Otherwise whoever reaches its ports could have it run what they like. The
  token is in the environment of this process and of those that it starts. What
  the user has set stays.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  # A name from systems where Ray does not leave the machine by default: without
  # this, 127.0.0.1 is replaced by the host's address, on Linux.
  os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
  if "RAY_AUTH_MODE" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
