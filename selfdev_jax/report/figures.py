"""Figures of the report, as SVG whose colours follow the page.

Each figure takes a width in CSS pixels, so that the page can hold one drawing
for a screen and one for a telephone.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import io
import re
import textwrap

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from selfdev_jax import records
from selfdev_jax.report import reading
from selfdev_jax.report import words

WIDE = 860
NARROW = 360

# Matplotlib has no notion of a CSS variable. Each role is drawn in a colour
# that nothing else uses and renamed in the SVG.
_ROLES = {
    role: f"#0000{i:02x}"
    for i, role in enumerate(
        (
            "ink",
            "muted",
            "line",
            "paper",
            "loop",
            "control",
            "task_arithmetic",
            "ties",
            "random_weights",
        ),
        start=1,
    )
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfdev_jax",
    # One family: the SVG then names the list that `_svg` looks for.
    "font.sans-serif": ["DejaVu Sans"],
    # One unit of the SVG is one CSS pixel.
    "figure.dpi": 72,
    "savefig.transparent": True,
    # A dollar sign in the name of an expert is a dollar sign.
    "text.parse_math": False,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.edgecolor": _ROLES["line"],
    "axes.labelcolor": _ROLES["muted"],
    "axes.titlecolor": _ROLES["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _ROLES["line"],
    "grid.linewidth": 0.8,
    "text.color": _ROLES["ink"],
    "xtick.color": _ROLES["line"],
    "ytick.color": _ROLES["line"],
    "xtick.labelcolor": _ROLES["muted"],
    "ytick.labelcolor": _ROLES["muted"],
    "ytick.left": False,
    "lines.solid_capstyle": "round",
}
_LINE_HEIGHT = 16  # CSS pixels from one label to the next.
# Hash steps that fill an interval evenly: dots of a strip do not line up.
_GOLDEN = 0.6180339887
_MOST_DOTS = 400  # Of a strip, and
_ALL_DOTS = 2000  # of a figure.
# The axis of the best so far begins where curves are after this share of it:
# from there on it is small steps that matter.
_SETTLED = 0.05
_MOST_STEPS = 500  # A round of DPO that had more shows every so many.
_STRIP_LABEL = 44  # CSS pixels that "both arms" takes.


def distribution(
    arms: Mapping[str, Sequence[reading.Round]],
    seed: float | None,
    width: int,
) -> str:
  """Development accuracy of every new program, by iteration and arm.

  A strip of more programs than `most_dots` shows as many of their quantiles,
  both ends included.
  """
  groups = list(_groups(arms))
  most = most_dots(arms)
  with matplotlib.rc_context(_STYLE):
    figure, axes = _canvas(width, 330, left=44, bottom=64, right=44)
    iterations = sorted({t for _, _, _, t, _ in groups})
    is_dense = width - 88 < _STRIP_LABEL * 2 * len(iterations)
    for x, _, role, _, accuracies in groups:
      values = 100 * np.asarray(accuracies)
      _strip(axes, x, values, _ROLES[role], not is_dense, most)
    ticks = [] if is_dense else groups
    axes.set_xticks(
        [x for x, *_ in ticks],
        [f"{name}\nn={len(a):,}" for _, name, _, _, a in ticks],
    )
    for tick, (_, _, role, _, _) in zip(
        axes.get_xticklabels(), ticks, strict=True
    ):
      tick.set_color(_ROLES[role])
    # Names of iterations are left out where they would run into each other.
    every = -(-len(iterations) * 24 // (width - 88))
    for t in iterations[::every]:
      axes.annotate(
          f"{t}" if is_dense else f"iteration {t}",
          (t, 0),
          xytext=(0, -22 if is_dense else -58),
          xycoords=("data", "axes fraction"),
          textcoords="offset points",
          ha="center",
          color=_ROLES["ink"],
          weight="bold",
      )
    axes.tick_params(axis="x", length=0, pad=6)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(min(iterations) - 0.5, max(iterations) + 0.5)
    _percent_axis(axes)
    _end_labels(axes, _seed_line(axes, seed, "seed\n"))
    return _svg(figure, f"distribution{width}")


def most_dots(arms: Mapping[str, Sequence[reading.Round]]) -> int:
  """How many dots a strip of `distribution` may have."""
  strips = len(list(_groups(arms)))
  return min(_MOST_DOTS, _ALL_DOTS // max(strips, 1))


def _groups(arms):
  """(x, name, role, iteration, accuracies) of each strip."""
  for arm, rounds in arms.items():
    for r in rounds:
      shared = r.iteration == 1
      if not len(r.accuracies) or (shared and arm == records.CONTROL):
        continue
      offset = 0 if shared else -0.22 if arm == records.LOOP else 0.22
      name = "both arms" if shared else arm
      role = "ink" if shared else arm
      yield r.iteration + offset, name, role, r.iteration, r.accuracies


def _strip(axes, x, values, color, is_named, most):
  """Values as dots, quartiles as a box, the mean as a labelled bar."""
  dots = values
  if len(values) > most:
    dots = np.quantile(values, np.linspace(0, 1, most))
  jitter = (np.arange(len(dots)) * _GOLDEN) % 1 - 0.5
  axes.scatter(x + 0.26 * jitter, dots, s=14, c=color, alpha=0.32, lw=0)
  low, high = np.quantile(values, [0.25, 0.75])
  axes.fill_between(
      [x - 0.16, x + 0.16], low, high, color=color, alpha=0.14, lw=0
  )
  mean = values.mean()
  axes.plot([x - 0.16, x + 0.16], [mean, mean], color=color, lw=2.5)
  if is_named:
    axes.annotate(
        f"{mean:.1f}",
        (x, mean),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        color=color,
        weight="bold",
    )


def progress(
    curves: Mapping[str, reading.Curve],
    boundaries: Sequence[int],
    seed: float | None,
    width: int,
) -> str:
  """Best development accuracy so far against evaluations.

  Args:
    curves: of each way to spend the budget, by name.
    boundaries: evaluations of the loop at which an iteration ends.
    seed: the seed model's development accuracy.
    width: in CSS pixels.
  """
  counted = {
      name: (curve.evaluations, curve.evaluated, curve.best)
      for name, curve in curves.items()
  }
  return _best_so_far(
      counted, boundaries, seed, width, "models evaluated", "progress"
  )


def hours(
    curves: Mapping[str, reading.Curve],
    seed: float | None,
    width: int,
) -> str:
  """Best development accuracy so far against hours of work.

  Args:
    curves: as in `progress`, of which the hours are known.
    seed: the seed model's development accuracy.
    width: in CSS pixels.
  """
  longest = max(curve.total_hours for curve in curves.values())
  unit, factor = ("hours", 1) if longest >= 1.5 else ("minutes", 60)
  timed = {
      name: (factor * curve.hours, factor * curve.total_hours, curve.best)
      for name, curve in curves.items()
  }
  return _best_so_far(timed, (), seed, width, f"{unit} of work", "hours")


def _best_so_far(curves, boundaries, seed, width, label, name):
  with matplotlib.rc_context(_STYLE):
    figure, axes = _canvas(width, 340, left=44, bottom=44, right=154, top=24)
    ends = {}
    limit = max(end for _, end, _ in curves.values()) or 1
    lows = [] if seed is None else [100 * seed]
    for curve, (x, end, best) in curves.items():
      # The corners, and on to the end.
      x, best = np.append(x, end), 100 * np.append(best, best[-1])
      settled = np.searchsorted(x, _SETTLED * limit, "right") - 1
      lows.append(best[max(settled, 0)])
      axes.plot(
          x,
          best,
          drawstyle="steps-post",
          color=_ROLES[curve],
          lw=2.4 if curve == records.LOOP else 1.6,
          zorder=3 if curve == records.LOOP else 2,
          ls=_DASHES.get(curve, "-"),
          marker="o" if x[0] == end else None,
      )
      ends[f"{words.label(curve)} {best[-1]:.1f}"] = (best[-1], _ROLES[curve])
    _mark_iterations(axes, boundaries, width)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(label)
    axes.set_xlim(0, limit)
    if ends:
      low, high = min(lows), max(y for y, _ in ends.values())
      room = max(0.08 * (high - low), 1.0)
      axes.set_ylim(max(low - room, -room), high + room)
    axes.xaxis.set_major_locator(
        matplotlib.ticker.MaxNLocator(
            4 if width < WIDE else 8, integer=name == "progress"
        )
    )
    axes.xaxis.set_major_formatter(
        matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,g}")
    )
    _percent_axis(axes)
    _end_labels(axes, ends | _seed_line(axes, seed, "seed model "))
    return _svg(figure, f"{name}{width}")


# Lines differ in more than colour.
_DASHES = {
    records.CONTROL: (0, (6, 2)),
    "task_arithmetic": (0, (1, 1.6)),
    "ties": (0, (4, 1.5, 1, 1.5)),
    "random_weights": (0, (2.5, 1.5)),
}


def _mark_iterations(axes, boundaries, width):
  start = 0
  every = -(-len(boundaries) * 40 // (width - 198))
  for t, end in enumerate(boundaries, start=1):
    if (t - 1) % every == 0:
      axes.annotate(
          f"t = {t}",
          ((start + end) / 2, 1),
          xytext=(0, 6),
          xycoords=("data", "axes fraction"),
          textcoords="offset points",
          ha="center",
          color=_ROLES["muted"],
      )
    if t < len(boundaries):
      axes.axvline(end, color=_ROLES["line"], lw=0.8)
    start = end


def bars(
    entries: Mapping[str, Mapping[str, object]],
    width: int,
) -> str:
  """Development and test accuracy of each model with 95 % intervals.

  Args:
    entries: name to "dev", "test", "ci95_dev", "ci95", as in the summary.
    width: in CSS pixels.
  """
  names = list(entries)
  with matplotlib.rc_context(_STYLE):
    left = 120 if width < WIDE else 170
    figure, axes = _canvas(
        width, 46 * len(names) + 60, left=left, bottom=40, top=8, right=48
    )
    limit = 0.0
    for row, name in enumerate(names):
      entry = entries[name]
      role = _BAR_ROLES.get(name, "muted")
      for split, interval, dy, alpha in (
          ("dev", "ci95_dev", -0.2, 0.38),
          ("test", "ci95", 0.2, 0.95),
      ):
        if entry[split] is None:
          continue
        y, value = row + dy, 100 * entry[split]
        low, high = (100 * end for end in entry[interval])
        axes.barh(y, value, height=0.34, color=_ROLES[role], alpha=alpha, lw=0)
        axes.plot([low, high], [y, y], color=_ROLES["ink"], lw=1.2)
        limit = max(limit, high)
        axes.annotate(
            f"{value:.1f} {split}",
            (high, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center_baseline",
            color=_ROLES["ink" if split == "test" else "muted"],
        )
    axes.set_yticks(
        range(len(names)),
        [textwrap.fill(words.label(n), left // 7) for n in names],
    )
    axes.tick_params(axis="y", labelcolor=_ROLES["ink"])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, limit * 1.06)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy, %")
    return _svg(figure, f"bars{width}")


_BAR_ROLES = {
    "best": records.LOOP,
    "control": records.CONTROL,
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "random_weights": "random_weights",
}

DPO_PANELS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
}


def dpo(steps: Sequence[records.Step], width: int) -> str:
  """Loss, reward margin and reward accuracy of each DPO round.

  The faint line is each step, or every so many of a long round, the bold one
  a running mean over a tenth of the round.
  """
  panels = [m for m in DPO_PANELS if any(m in s.metrics for s in steps)]
  stacked = width < WIDE
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(
        figsize=(width / 72, (190 * len(panels) if stacked else 230) / 72)
    )
    shape = (len(panels), 1) if stacked else (1, len(panels))
    grid = figure.subplots(*shape, squeeze=False).ravel()
    figure.subplots_adjust(
        left=46 / width,
        right=1 - 62 / width,
        top=1 - 28 / figure.get_figheight() / 72,
        bottom=44 / figure.get_figheight() / 72,
        hspace=0.6,
        wspace=0.55,
    )
    for axes, metric in zip(grid, panels, strict=True):
      _dpo_panel(axes, steps, metric)
    return _svg(figure, f"dpo{width}")


def _dpo_panel(axes, steps, metric):
  rounds = sorted({s.iteration for s in steps})
  ends = {}
  shades = np.linspace(0.45, 1.0, len(rounds))
  for t, alpha in zip(rounds, shades, strict=True):
    found = [
        (s.step, s.metrics[metric])
        for s in steps
        if s.iteration == t and np.isfinite(s.metrics.get(metric, np.nan))
    ]
    if not found:
      continue
    x, y = np.asarray(found, np.float64)[:: -(-len(found) // _MOST_STEPS)].T
    window = max(1, len(y) // 10)
    smooth = np.convolve(y, np.ones(window) / window, "valid")
    color = _ROLES[records.LOOP]
    axes.plot(x, y, color=color, lw=0.8, alpha=0.3 * alpha)
    axes.plot(x[window - 1 :], smooth, color=color, lw=2, alpha=alpha)
    ends[f"round {t}"] = (smooth[-1], color)
  axes.set_title(DPO_PANELS[metric], pad=10)
  axes.set_xlabel("step")
  axes.grid(axis="x", visible=False)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
  axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
  axes.margins(x=0)
  _end_labels(axes, ends)


def _canvas(width, height, left, bottom, right=12, top=16):
  """A figure with one axes; sizes and margins in CSS pixels."""
  figure = matplotlib.figure.Figure(figsize=(width / 72, height / 72))
  axes = figure.add_axes(
      (
          left / width,
          bottom / height,
          1 - (left + right) / width,
          1 - (bottom + top) / height,
      )
  )
  return figure, axes


def _percent_axis(axes):
  axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
  axes.yaxis.set_major_formatter(
      matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g} %")
  )


def _seed_line(axes, seed, text):
  """A line at the seed model's accuracy; returns its end label, if any."""
  if seed is None:
    return {}
  axes.axhline(100 * seed, color=_ROLES["muted"], lw=1, ls=(0, (1, 2)))
  return {f"{text}{100 * seed:.1f}": (100 * seed, _ROLES["muted"])}


def _end_labels(axes, ends):
  """Names lines in the right margin, moved apart where they would overlap.

  Args:
    axes: whose limits are final.
    ends: text to (y, colour), y in data units.
  """

  def pixel(y):
    return axes.transData.transform((0, y))[1]

  order = sorted(ends, key=lambda text: ends[text][0])
  placed = spread([pixel(ends[text][0]) for text in order], _LINE_HEIGHT)
  for text, place in zip(order, placed, strict=True):
    y, color = ends[text]
    axes.annotate(
        text,
        (1, y),
        xytext=(7, place - pixel(y)),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center_baseline",
        color=color,
        annotation_clip=False,
    )


def spread(positions: Sequence[float], gap: float) -> list[float]:
  """Ascending positions moved as little as needed to be `gap` apart.

  Args:
    positions: ascending.
    gap: the least distance.

  Returns:
    As many positions, each cluster centred on where it came from.
  """
  clusters = []  # [sum of wanted positions, members]
  for position in positions:
    clusters.append([position, 1])
    while len(clusters) > 1 and _bottom(clusters[-1], gap) < gap + _top(
        clusters[-2], gap
    ):
      total, members = clusters.pop()
      clusters[-1][0] += total
      clusters[-1][1] += members
  return [
      _bottom(cluster, gap) + i * gap
      for cluster in clusters
      for i in range(cluster[1])
  ]


def _bottom(cluster, gap):
  total, members = cluster
  return total / members - (members - 1) * gap / 2


def _top(cluster, gap):
  return _bottom(cluster, gap) + (cluster[1] - 1) * gap


def _svg(figure, name):
  """The figure as an SVG element for an HTML page.

  Args:
    figure: drawn with `_STYLE`.
    name: makes the ids inside unique on the page.
  """
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", metadata={"Date": None})
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  # Who drew it, and rules that would apply to the whole page.
  text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.S)
  # Namespaces go without saying in HTML, sizes come from the style sheet.
  head, rest = text.split(">", 1)
  head = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
  text = f'{head} aria-hidden="true">{rest}'.replace("xlink:href", "href")
  text = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--sans)", text)
  # A hundredth of a pixel is as good as a millionth; labels stay as they are.
  text = re.sub(
      "<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text
  )
  text = re.sub(r"<g([^>]*)>\s*((?:<use [^>]*/>\s*)+)</g>", _shared_style, text)
  for role, color in _ROLES.items():
    text = text.replace(color, f"var(--{role.replace('_', '-')})")
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
  return text.strip()


def _shared_style(group):
  """A group of marks with the style that all have in common said once."""
  attributes, marks = group.groups()
  styles = set(re.findall(r' style="[^"]*"', marks))
  if len(styles) != 1 or "style=" in attributes:
    return group[0]
  (style,) = styles
  return f"<g{attributes}{style}>{marks.replace(style, '')}</g>"
