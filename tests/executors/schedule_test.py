"""Bookkeeping of pieces under whatever workers do."""

import collections
import heapq
import random

from hypothesis import stateful
from hypothesis import strategies as st
import pytest

from selfdev_jax.executors import schedule as schedule_lib

_DEPTH = 2


def _model(piece):
  """Pieces of one model go to one worker, 9 to any."""
  model = piece // 10
  return None if model == 9 else model


def _schedule(workers=(), depth=_DEPTH):
  schedule = schedule_lib.Schedule(_model, depth)
  for worker in workers:
    schedule.join(worker)
  return schedule


def _has(schedule, pieces):
  return {piece: schedule.holders(piece) for piece in pieces}


def test_urgent_pieces_go_to_the_idle_first():
  schedule = _schedule("ab")
  schedule.want([0, 10, 20, 30, 40])
  # One each, then one that waits behind it; 40 stays here.
  expected = [("a", 0), ("b", 10), ("a", 20), ("b", 30)]
  assert schedule.deal(0.0) == expected
  assert not schedule.deal(0.0)


def test_a_worker_keeps_its_model():
  schedule = _schedule("ab")
  schedule.want([0, 10, 1, 2, 11, 12])
  assert schedule.deal(0.0) == [("a", 0), ("b", 10), ("a", 1), ("b", 11)]
  assert schedule.finish("b", 10) == (True, [])
  # More urgent, but a has the model.
  assert schedule.deal(0.0) == [("b", 12)]


def test_nobody_stays_idle_for_the_sake_of_a_model():
  schedule = _schedule("ab")
  schedule.want([0, 1, 2, 3])
  dealt = schedule.deal(0.0)
  assert dealt[:2] == [("a", 0), ("b", 1)]


def test_a_model_of_another_does_not_wait_behind_what_a_worker_does():
  schedule = _schedule("ab")
  schedule.want([0, 10, 1, 2])
  # b would have to merge for 2, a has it merged when it comes to it.
  assert schedule.deal(0.0) == [("a", 0), ("b", 10), ("a", 1)]


def test_pieces_without_a_model_go_anywhere():
  schedule = _schedule("ab")
  schedule.want([90, 91, 92, 93])
  assert schedule.deal(0.0) == [("a", 90), ("b", 91), ("a", 92), ("b", 93)]


def test_what_is_in_vain_is_named():
  schedule = _schedule("ab")
  schedule.want([0, 10, 20])
  schedule.deal(0.0)
  assert sorted(schedule.want([10])) == [("a", 0), ("a", 20)]
  assert _has(schedule, [0, 10, 20]) == {0: [], 10: ["b"], 20: []}
  assert schedule.finish("a", 0) == (False, [])


def test_pieces_of_a_dead_worker_go_to_the_others():
  schedule = _schedule("ab")
  schedule.want([0, 10, 1])
  schedule.deal(0.0)
  assert schedule.leave("a") == [0, 1]
  assert schedule.finish("b", 10) == (True, [])
  assert schedule.deal(1.0) == [("b", 0), ("b", 1)]
  assert schedule.leave("a") == []


def test_what_waits_is_stolen_by_the_idle():
  schedule = _schedule("a")
  schedule.want([0, 1])
  schedule.deal(0.0)
  schedule.join("b")
  assert schedule.steal(1.0) == [("b", 1, "a")]
  # What a does stays with it.
  assert not schedule.steal(1.0)
  assert _has(schedule, [0, 1]) == {0: ["a"], 1: ["b"]}


def test_the_first_of_two_counts():
  schedule = _schedule("ab")
  schedule.want([0])
  schedule.deal(0.0)
  assert not schedule.duplicate(4.0, patience_s=5.0)
  assert schedule.duplicate(6.0, patience_s=5.0) == [("b", 0)]
  assert not schedule.duplicate(60.0, patience_s=5.0)
  assert schedule.finish("b", 0) == (True, [("a", 0)])
  assert schedule.finish("a", 0) == (False, [])
  assert not schedule.deal(7.0)


def test_one_gives_a_late_piece_twice_not_three_times():
  schedule = _schedule("abc")
  schedule.want([0])
  schedule.deal(0.0)
  assert schedule.duplicate(6.0, patience_s=5.0) == [("b", 0)]
  assert not schedule.duplicate(60.0, patience_s=5.0)


def test_a_refused_piece_goes_to_another_then_to_any():
  schedule = _schedule("ab")
  schedule.want([0])
  schedule.deal(0.0)
  schedule.refuse("a", 0)
  assert schedule.deal(1.0) == [("b", 0)]
  schedule.refuse("b", 0)
  assert schedule.deal(2.0) == [("a", 0)]


def test_whoever_refused_tries_again_where_the_others_are_late():
  schedule = _schedule("abc")
  schedule.want([0, 10])
  assert schedule.deal(0.0) == [("a", 0), ("b", 10)]
  schedule.refuse("a", 0)
  schedule.take_back("b", 10)
  schedule.want([0])
  assert schedule.deal(1.0) == [("b", 0)]
  assert schedule.duplicate(60.0, patience_s=5.0) == [("c", 0)]
  schedule.refuse("c", 0)
  # Else it would wait for b alone.
  assert schedule.duplicate(60.0, patience_s=5.0) == [("a", 0)]


def test_a_piece_is_open_whoever_has_it_until_it_is_done():
  schedule = _schedule("ab")
  schedule.want([0])
  schedule.deal(0.0)
  schedule.want([])
  assert not schedule.is_open(0)
  # Wanted again: what a says of it counts, though it has it in vain.
  schedule.want([0])
  assert schedule.is_open(0) and not schedule.holders(0)
  assert schedule.finish("a", 0) == (True, [])
  assert not schedule.is_open(0)


def test_what_is_in_vain_takes_a_place_until_it_is_left():
  schedule = _schedule("a")
  schedule.want([0, 1])
  schedule.deal(0.0)
  schedule.want([2, 3])
  assert not schedule.deal(1.0)
  assert schedule.oldest("a") == 0.0
  schedule.take_back("a", 0)
  assert schedule.deal(2.0) == [("a", 2)]
  assert schedule.finish("a", 1) == (False, [])
  assert schedule.deal(3.0) == [("a", 3)]
  assert schedule.oldest("a") == 2.0


def test_a_piece_refused_by_all_that_are_left_is_tried_again():
  schedule = _schedule("ab")
  schedule.want([0])
  schedule.deal(0.0)
  schedule.refuse("a", 0)
  schedule.leave("b")
  assert schedule.deal(1.0) == [("a", 0)]


class _Anything(stateful.RuleBasedStateMachine):
  """Workers come, work, refuse and die in any order."""

  def __init__(self):
    super().__init__()
    self.schedule = _schedule()
    self.now, self.names = 0.0, 0
    self.wanted, self.counted = [], collections.Counter()
    # What workers really hold: they hear later, or not at all.
    self.held = {}

  def _pick(self, data, worker):
    return data.draw(st.sampled_from(self.held[worker]))

  def _busy(self, data):
    return data.draw(st.sampled_from([w for w, h in self.held.items() if h]))

  @stateful.rule()
  def join(self):
    self.names += 1
    self.schedule.join(f"w{self.names}")
    self.held[f"w{self.names}"] = []

  @stateful.precondition(lambda self: self.held)
  @stateful.rule(data=st.data())
  def leave(self, data):
    worker = data.draw(st.sampled_from(list(self.held)))
    had = {p for p in self.wanted if worker in self.schedule.holders(p)}
    assert set(self.schedule.leave(worker)) == had
    del self.held[worker]

  @stateful.rule(data=st.data(), span=st.integers(0, 40))
  def want(self, data, span):
    start = data.draw(st.integers(0, 60))
    wanted = [p for p in range(start, start + span, 3)]
    before = {p: self.schedule.holders(p) for p in range(110)}
    vain = self.schedule.want(wanted)
    expected = [(w, p) for p, ws in before.items() for w in ws]
    assert sorted(vain) == sorted(
        (w, p) for w, p in expected if p not in wanted
    )
    gone = set(self.wanted) - set(wanted)
    self.counted = collections.Counter(
        {p: n for p, n in self.counted.items() if p not in gone}
    )
    self.wanted = wanted

  @stateful.rule(late=st.sampled_from([0.1, 1.0, 10.0]))
  def deal(self, late):
    self.now += late
    idle = {w for w in self.held if not self._has(w)}
    for worker, piece in self.schedule.deal(self.now):
      assert self.schedule.holders(piece) == [worker]
      self._send(worker, piece)
    for worker, piece, other in self.schedule.steal(self.now):
      assert worker in idle and other != worker
      assert other not in self.schedule.holders(piece)
      self._send(worker, piece)
    for worker, piece in self.schedule.duplicate(self.now, 2.0):
      assert worker in idle and len(self._has(worker)) == 1
      assert len(self.schedule.holders(piece)) == 2
      self._send(worker, piece)

  def _has(self, worker):
    return [p for p in self.wanted if worker in self.schedule.holders(p)]

  def _send(self, worker, piece):
    assert piece in self.wanted and not self.counted[piece]
    self.held[worker].append(piece)

  @stateful.precondition(lambda self: any(self.held.values()))
  @stateful.rule(data=st.data())
  def finish(self, data):
    worker = self._busy(data)
    piece = self._pick(data, worker)
    self.held[worker].remove(piece)
    counts, vain = self.schedule.finish(worker, piece)
    assert counts == (piece in self.wanted and not self.counted[piece])
    self.counted[piece] += counts
    assert not self.schedule.holders(piece)
    assert all(p == piece and w != worker for w, p in vain)

  @stateful.precondition(lambda self: any(self.held.values()))
  @stateful.rule(data=st.data(), refuses=st.booleans())
  def give_back(self, data, refuses):
    worker = self._busy(data)
    piece = self._pick(data, worker)
    self.held[worker].remove(piece)
    give = self.schedule.refuse if refuses else self.schedule.take_back
    give(worker, piece)
    assert worker not in self.schedule.holders(piece)

  @stateful.invariant()
  def nobody_has_too_much(self):
    for worker in self.held:
      assert len(self._has(worker)) <= _DEPTH
    for piece in self.wanted:
      holders = self.schedule.holders(piece)
      assert len(set(holders)) == len(holders) <= 2
      assert set(holders) <= set(self.held)
      assert not (holders and self.counted[piece])

  def teardown(self):
    """However it came to this, the rest gets done."""
    self.join()
    for _ in range(100):
      self.now += 1.0
      self.deal(1.0)
      for worker in self.held:
        for piece in list(self._has(worker)):
          counts, _ = self.schedule.finish(worker, piece)
          self.counted[piece] += counts
    assert all(self.counted[p] == 1 for p in self.wanted)


TestAnything = _Anything.TestCase


def _run(pieces, workers, seed):
  """A run on a clock of its own; (values in order, seconds, models got)."""
  rng = random.Random(seed)
  schedule = _schedule([f"w{i}" for i in range(workers)])
  now, events, results, got = 0.0, [], {}, collections.Counter()
  queues = {w: [] for w in schedule.workers}
  values, left = [], list(pieces)

  def begin(worker):
    """The first that waits; what was taken away meanwhile is passed over."""
    queue = queues[worker]
    while queue and worker not in schedule.holders(queue[0]):
      queue.pop(0)
    if queue:
      kind = _model(queue[0])
      has = kind is None or last.get(worker) == kind
      got[kind] += not has
      last[worker] = kind
      seconds = rng.uniform(0.5, 1.5) + (0.0 if has else 3.0)
      heapq.heappush(events, (now + seconds, worker, queue[0]))
      busy.add(worker)

  last, busy = {}, set()
  while left:
    schedule.want(left[: 4 * workers])
    while left[0] not in results:
      sent = schedule.deal(now)
      sent += [move[:2] for move in schedule.steal(now)]
      sent += schedule.duplicate(now, 8.0)
      for worker, piece in sent:
        queues[worker].append(piece)
      for worker in queues:
        if worker not in busy:
          begin(worker)
      now, worker, piece = heapq.heappop(events)
      busy.remove(worker)
      queues[worker].remove(piece)
      if rng.random() < 0.05:
        schedule.refuse(worker, piece)
      elif schedule.finish(worker, piece)[0]:
        results[piece] = piece * piece
    values.append(results.pop(left.pop(0)))
  return values, now, got


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_do_not_depend_on_the_number_of_workers(workers):
  pieces = [model * 10 + block for model in range(9) for block in range(10)]
  values, _, got = _run(pieces, workers, seed=workers)
  assert values == [piece * piece for piece in pieces]
  # Merged once, where nothing was refused or late: not ten times.
  assert got.total() <= 9 * 4


def test_more_workers_are_faster():
  one, four = (_run(range(100), n, seed=0)[1] for n in (1, 4))
  assert four < one / 2
