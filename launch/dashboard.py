"""Shows a run as a web page on this machine, also while it runs.

python -m launch.dashboard --workdir=runs/tiny

Read-only. The page needs no network; it listens on the loopback address, which
only this machine reaches. --host=0.0.0.0 shows the run to whoever reaches the
machine, by its addresses and its name. Ctrl-C ends it. A run at a URL is shown
as it was pushed there, which is looked at again once a minute.
"""

from absl import flags

from launch import app
from selfdev_jax import dashboard
from selfdev_jax import storage

_EVERY_S = 60.0  # A workdir at a URL is looked at again so often.

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory or URL of the run.", required=True
)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Name or address of this machine to listen on."
)
_PORT = flags.DEFINE_integer(
    "port", 8642, "Port; 0 takes a free one.", lower_bound=0, upper_bound=65535
)


def main(_):
  with storage.fetch(_WORKDIR.value, every_s=_EVERY_S) as workdir:
    dashboard.serve(workdir, _HOST.value, _PORT.value)


if __name__ == "__main__":
  app.run(main)
