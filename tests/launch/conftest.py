"""Launch scripts run in the process of the tests."""

import runpy

from absl import flags
import pytest


@pytest.fixture
def launch(request, capsys):
  """launch(flag=value, ...) runs main of the module's SCRIPT, gives its output.

  In this process: one of its own costs 5 s.
  """
  before = set(flags.FLAGS)
  try:
    script = runpy.run_path(str(request.module.SCRIPT), run_name="launched")

    def run(**values):
      for name in set(flags.FLAGS) - before:
        flags.FLAGS[name].unparse()
      for name, value in values.items():
        flags.FLAGS[name].parse(str(value))
      flags.FLAGS.mark_as_parsed()
      capsys.readouterr()
      script["main"]([])
      return capsys.readouterr().out

    yield run
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
