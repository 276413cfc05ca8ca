"""Two runs side by side."""

import contextlib
import dataclasses
import sqlite3

import pytest

from selfdev_jax import records
from selfdev_jax import store as store_lib
from selfdev_jax.inspection import compare as compare_lib


@pytest.fixture
def comparison(build, workdir, tmp_path, config):
  """The finished run, and one of another seed that is not as far."""
  other = dataclasses.replace(config, seed=7)
  build(tmp_path, "first", other)
  with store_lib.Store.create(tmp_path, other, {}, {"jax": "1", "git": "new"}):
    pass
  with contextlib.closing(
      sqlite3.connect(tmp_path / store_lib.ARCHIVE)
  ) as archive:
    archive.execute("UPDATE scores SET correct = 2 WHERE model = 'program:a1'")
    archive.commit()
  with (
      store_lib.Store.read(workdir) as here,
      store_lib.Store.read(tmp_path) as there,
  ):
    yield compare_lib.compare(here, there)


def test_config_and_versions(comparison):
  assert comparison.config == [compare_lib.Difference("seed", 0, 7)]
  assert comparison.identity == []
  assert comparison.versions == [
      compare_lib.Difference("git", "abc", ["abc", "new"])
  ]


def test_iterations_stand_side_by_side(comparison):
  first, *rest = comparison.iterations
  assert (first[0].arm, first[0].iteration) == (records.LOOP, 1)
  assert (first[0].mean, first[1].mean) == (0.75, 0.5)
  assert [(here.arm, there) for here, there in rest] == [
      (records.LOOP, None),
      (records.CONTROL, None),
  ]


def test_programs(comparison):
  assert comparison.both == 2
  assert comparison.only_here == [("a9", 1.0), ("c3", 0.75), ("d4", 0.25)]
  assert comparison.only_there == []
  # b2 failed in both; a test score that only one has is none that differs.
  assert comparison.scores == [
      compare_lib.ScoreDifference("a1", "dev", (3, 4), (2, 4))
  ]


def test_a_run_is_as_itself(store, workdir):
  with store_lib.Store.read(workdir) as same:
    found = compare_lib.compare(store, same)
  assert found.both == 5
  assert not any((found.config, found.versions, found.only_here, found.scores))
