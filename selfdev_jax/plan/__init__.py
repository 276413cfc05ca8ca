"""What a run would take, said before anything is spent."""

from selfdev_jax.plan.checks import Check
from selfdev_jax.plan.checks import MISSING
from selfdev_jax.plan.checks import OK
from selfdev_jax.plan.checks import UNKNOWN
from selfdev_jax.plan.devices import DEVICES
from selfdev_jax.plan.show import show

__all__ = ["DEVICES", "MISSING", "OK", "UNKNOWN", "Check", "show"]
