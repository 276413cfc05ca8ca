"""Ray reads these when it is imported, whichever test does that first."""

import os
import secrets

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Several loopback addresses make a cluster of several hosts: no `guard_local`,
# which keeps to one, but its token all the same.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# What Ray will do anyway, and warns of.
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
