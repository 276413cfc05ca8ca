"""Programs of the starting grammar: what the tiny seed model has read.

A program is a pipeline: prepare the task vectors, combine them, adjust the
sum, add it to the base. The grammar is poor on purpose. It has no median and
no weights of inverse norm, the two things that pay off in the structured
world, but it has their ingredients (norms, division, sorting, `where`) in
other roles, so that there is something left to discover.
"""

import random

# A statement of the body; `{c}` is a coefficient, drawn anew each time.
_PREPARE = (
    "tvs = [jnp.where(jnp.abs(t) > {c} * jnp.std(t), t, 0.0) for t in tvs]",
    "tvs = [jnp.clip(t, -{k} * jnp.std(t), {k} * jnp.std(t)) for t in tvs]",
    "tvs = [t - {c} * jnp.mean(t) for t in tvs]",
    "tvs = [{c} * t for t in tvs]",
    "m = sum(tvs) / len(tvs)\n  tvs = [t + {c} * (m - t) for t in tvs]",
    "s = jnp.sign(sum(tvs))\n  tvs = [jnp.where(jnp.sign(t) == s, t, 0.0) for t in tvs]",
    "n = sum(jnp.linalg.norm(t) for t in tvs)\n  tvs = [t * n / (n + jnp.linalg.norm(t)) for t in tvs]",
)
_COMBINE = (
    "d = {c} * sum(tvs)",
    "d = sum(tvs) / len(tvs)",
    "d = {c} * tvs[0] + {c} * tvs[1] + {c} * tvs[2]",
    "d = {c} * tvs[0] + {c} * tvs[1] - {c} * tvs[2]",
    "d = {c} * tvs[{i}] + {c} * tvs[{j}]",
    "d = jnp.where(jnp.abs(tvs[{i}]) > jnp.abs(tvs[{j}]), tvs[{i}], tvs[{j}])",
    "w = [jnp.linalg.norm(t) for t in tvs]\n  d = sum(x * t for x, t in zip(w, tvs)) / sum(w)",
    "w = [jnp.mean(jnp.abs(t)) for t in tvs]\n  d = sum(x * t for x, t in zip(w, tvs)) / sum(w)",
    "m = sum(tvs) / len(tvs)\n  w = [jnp.sum(t * m) / jnp.sum(t * t + m * m) for t in tvs]\n  d = sum(x * t for x, t in zip(w, tvs))",
    "z = jnp.sort(jnp.stack(tvs), axis=0)\n  d = z[0] + z[2]",
    "z = jnp.sort(jnp.stack(tvs), axis=0)\n  d = {c} * z[0] + {c} * z[2]",
    "z = jnp.stack(tvs)\n  d = {c} * jnp.max(z, axis=0) + {c} * jnp.min(z, axis=0)",
)
_ADJUST = (
    "d = {c} * d",
    "d = jnp.where(jnp.abs(d) > {c} * jnp.std(d), d, 0.0)",
    "d = d / (1.0 + {c} * jnp.linalg.norm(d))",
    "d = jnp.clip(d, -{k} * jnp.std(d), {k} * jnp.std(d))",
)
_COEFFICIENTS = tuple(f"{i / 10:.1f}" for i in range(1, 11))
_WIDE = ("1.0", "1.5", "2.0", "2.5", "3.0")


def _fill(rng: random.Random, template: str) -> str:
  i, j = rng.sample(range(3), 2)
  text = template.replace("{i}", str(i)).replace("{j}", str(j))
  text = text.replace("{k}", rng.choice(_WIDE))
  while "{c}" in text:
    text = text.replace("{c}", rng.choice(_COEFFICIENTS), 1)
  return text


def body(rng: random.Random) -> str:
  """The indented body of one program, ending in a newline."""
  lines = ["tvs = task_vectors"]
  lines += rng.sample(_PREPARE, rng.choices((0, 1, 2), (3, 5, 2))[0])
  lines.append(rng.choice(_COMBINE))
  lines += rng.sample(_ADJUST, rng.choices((0, 1), (5, 3))[0])
  lines.append(rng.choice(("return base + d", "return base + {c} * d")))
  return "".join(f"  {_fill(rng, line)}\n" for line in lines)
