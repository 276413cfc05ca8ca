"""Answers on an address of this machine until Ctrl-C."""

import errno
import ipaddress
import os
import socket
import sys

import uvicorn

from selfdev_jax import errors
from selfdev_jax import progress
from selfdev_jax.dashboard import app


def serve(workdir: str | os.PathLike, host: str, port: int):
  """Serves the dashboard of one run and prints its address.

  Args:
    workdir: the run's directory.
    host: name or address of this machine to listen on. Any but a loopback one
      shows the run to whoever reaches it.
    port: 0 takes a free one.

  Raises:
    errors.UserError: if there is no run, or the port or host cannot be had.
  """
  listener = _listen(host, port)
  with listener:
    own = _is_loopback(listener.getsockname()[0])
    print(f"Reading {workdir}", file=sys.stderr, flush=True)
    names = (host,) if own else (host, socket.gethostname())
    site = app.application(workdir, names)
    if not own:
      progress.note(
          f"--host={host} is not a loopback address: whoever reaches it can"
          " read this run; nothing asks for a password"
      )
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    print(f"Dashboard: http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(
        site,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    try:
      uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
      print(file=sys.stderr)


def _listen(host, port):
  """A listening socket.

  Raises:
    errors.UserError: naming the flag to change.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family)
  except (OSError, UnicodeError) as error:
    reason = getattr(error, "strerror", error)
    line = f"--host={host} is no address of this machine: {reason}"
    is_name = isinstance(error, (socket.gaierror, UnicodeError))
    if not is_name and error.errno != errno.EADDRNOTAVAIL:
      line = (
          f"cannot listen on {host}, port {port} ({reason}); choose another"
          " --port"
      )
    raise errors.UserError(line) from None


def _is_loopback(address):
  return ipaddress.ip_address(address.partition("%")[0]).is_loopback
