from selfdev_jax import progress


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
  with progress.bar("Weighing", 3, "stone") as bar:
    bar.update(2)
    bar.update()
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2
  assert lines[0].startswith("Weighing: 2/3, ") and "s left" in lines[0]
  assert "stone/s" in lines[0]
  assert lines[1].startswith("Weighing: 3/3, ") and "left" not in lines[1]


def test_the_last_line_comes_also_when_the_step_fails(capsys):
  try:
    with progress.bar("Weighing", 3) as bar:
      bar.update()
      raise KeyError
  except KeyError:
    pass
  assert "Weighing: 1/3" in capsys.readouterr().err
