"""`--plan`: the whole of it, as text and as data."""

import collections
import dataclasses
import json
import os

from selfdev_jax import config as config_lib
from selfdev_jax import errors
from selfdev_jax import loop
from selfdev_jax import sampling
from selfdev_jax.plan import checks as checks_lib
from selfdev_jax.plan import cost
from selfdev_jax.plan import devices
from selfdev_jax.plan import estimate as estimate_lib
from selfdev_jax.plan import reading
from selfdev_jax.plan import words


def show(
    config: config_lib.Config,
    workdir: str | os.PathLike,
    host: loop.Host,
    device: str | None = None,
):
  """Prints what a run would do and take, and whether all is there for it.

  Nothing is fetched, loaded, compiled or written. The last line is JSON.

  Args:
    config: the run's.
    workdir: the run's.
    host: the run's.
    device: a name in `DEVICES` to estimate for; None: what is here.

  Raises:
    UserError: if something is missing, with how many things are.
  """
  places = reading.places(config)
  items = reading.items(config)
  chosen = _device(device)
  kind = _sampler(config, host)
  known = reading.shape(places[config.seed_model], config)
  estimate = model = lengths = None
  if known is not None:
    decoder, itemsize, _ = known
    model = cost.Model(decoder, itemsize, config.merge.scope)
    spoken = reading.tokenizer(places[config.seed_model])
    lengths = reading.lengths(config, items, spoken)
    estimate = estimate_lib.estimate(config, model, lengths, kind, chosen)
  found = checks_lib.run(
      config,
      workdir,
      host,
      places=places,
      items=items,
      sampler=kind,
      device=chosen,
      estimate=estimate,
  )
  where = chosen.name if chosen else "no known accelerator: no times"
  print(f"Plan of {config.name}, {config_lib.digest(config)}, on {where}\n")
  if estimate is None:
    print("Nothing is known of the seed model's shape: no estimate.\n")
  else:
    print(_text(config, model, lengths, kind, estimate, known[2]))
  print(_checks_text(found))
  counts = collections.Counter(check.status for check in found)
  print(
      json.dumps(
          {
              "plan": config.name,
              "config": config_lib.digest(config),
              "device": chosen and dataclasses.asdict(chosen),
              "sampler": kind,
              "model": model
              and {
                  "parameters": model.parameters,
                  "bytes": model.nbytes,
                  "merged_bytes": model.merged_bytes,
                  "known_by": known[2],
              },
              "lengths": lengths and dataclasses.asdict(lengths),
              "stages": estimate
              and [dataclasses.asdict(stage) for stage in estimate.stages],
              **_totals(config, estimate),
              "checks": [dataclasses.asdict(check) for check in found],
              "ok": counts[checks_lib.OK],
              "missing": counts[checks_lib.MISSING],
              "unknown": counts[checks_lib.UNKNOWN],
          }
      )
  )
  if counts[checks_lib.MISSING]:
    missing = counts[checks_lib.MISSING]
    raise errors.UserError(
        f"{missing} of {len(found)} things that the run needs are missing; the"
        " list above has each with a way out"
    )


def _device(name: str | None) -> devices.Device | None:
  """The one asked for, or the one that is here."""
  if name is not None:
    return devices.DEVICES[name]
  here = devices.accelerators()
  return devices.of_kind(here[0].device_kind) if here else None


def _sampler(config: config_lib.Config, host: loop.Host) -> str:
  if config.sampler in ("jax", "vllm"):
    return config.sampler
  has_vllm = host.vllm_address is not None or sampling.is_installed()
  return "vllm" if has_vllm and config.sampler == "auto" else "jax"


def _gpus(config: config_lib.Config) -> int:
  """Devices that the run holds from its beginning to its end."""
  if config.executor == "ray":  # Times are one worker's.
    return config.vllm.tensor_parallel
  meshes = config.dpo.fsdp * config.dpo.tensor
  return max(meshes, config.vllm.tensor_parallel)


def _totals(config, estimate: estimate_lib.Estimate | None):
  if estimate is None:
    return {}
  seconds = estimate.seconds
  return {
      "seconds": seconds,
      "gpu_hours": None if seconds is None else _gpus(config) * seconds / 3600,
      "programs_compiled": estimate.compiled,
      "device_bytes": estimate.device_bytes,
      "host_bytes": estimate.host_bytes,
      "disk_bytes": estimate.disk_bytes,
      "download_bytes": estimate.download_bytes,
  }


def _text(config, model, lengths, kind, estimate, known_by) -> str:
  size, merged = map(words.gigabytes, (model.nbytes, model.merged_bytes))
  lines = [
      f"Seed model: {words.count(model.parameters)} parameters, {size}; merged"
      f" are {merged} of it ({config.merge.scope}). Known by {known_by}.",
      f"Texts: the factory's prompt {lengths.prompt} tokens, an evaluation's"
      f" {lengths.question:,.0f}, an answer {lengths.answer:,.0f}."
      f" {lengths.where[0].upper()}{lengths.where[1:]}.",
      f"Sampler: {kind}.",
      "",
  ]
  rows = [("stage", "tokens", "device", "time")]
  for stage in estimate.stages:
    held = stage.device_bytes
    rows.append(
        (
            stage.name,
            words.count(stage.tokens) if stage.tokens else "",
            "" if held is None else words.gigabytes(held),
            words.duration(stage.seconds),
        )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  does = ["what", *(stage.does for stage in estimate.stages)]
  for (name, *numbers), what in zip(rows, does, strict=True):
    cells = [
        cell.rjust(width)
        for cell, width in zip(numbers, widths[1:], strict=True)
    ]
    lines.append(f" {name.ljust(widths[0])}  {'  '.join(cells)}  {what}")
  return "\n".join([*lines, "", *_sums(config, model, estimate), ""])


def _sums(config, model, estimate) -> list[str]:
  device, host, disk, models_, wide = map(
      words.gigabytes,
      (
          estimate.device_bytes,
          estimate.host_bytes,
          estimate.disk_bytes,
          estimate.download_bytes,
          (1 + len(config.experts)) * model.largest_wide_leaf_bytes,
      ),
  )
  sums = [
      f"Compiled: {estimate.compiled:,} programs, each for"
      f" {model.leaf_kinds} leaf kinds.",
      f"At once: {device} of the device; {host} of the host; {disk} in the"
      f" workdir; {models_} of models. A program that XLA cannot fuse takes up"
      f" to {wide} of the device more while the largest leaf is merged in"
      " float32; where that is not free, it fails with the code memory. Times"
      " are as if all of it was there.",
  ]
  if estimate.seconds is None:
    return sums
  hours = _gpus(config) * estimate.seconds / 3600
  total = f"In all: {words.duration(estimate.seconds)}, {hours:,.1f} GPU hours"
  if config.evaluate.racing:
    total += (
        ", without what racing spares: it asks about half of the answers"
        " (BUILD_NOTES.md), and merges again what it comes back to"
    )
  if config.executor == "ray":
    total += (
        "; by one worker. What many would take, `python -m launch.project"
        " --config=FILE --gpus=8,64` says"
    )
  share = estimate_lib.new_programs(config) / config.propose.samples
  assumed = (
      f"Assumed, not measured: {100 * share:.0f} % of the sampled programs are"
      " admitted and new, each as long as"
      f" {100 * estimate_lib.COMPLETION_SHARE:.0f} % of what it may be;"
      f" {100 * cost.PREFILL_MFU:.0f} % of the peak FLOP/s while reading,"
      f" {100 * cost.DPO_MFU:.0f} % in DPO;"
      f" {100 * cost.DECODE_BANDWIDTH:.0f} % of the peak bandwidth while"
      f" writing, {100 * cost.MERGE_BANDWIDTH:.0f} % while merging;"
      f" {cost.COMPILE_KIND_S:g} s to compile a program for a leaf kind;"
      f" {cost.HOST_COPY_BYTES_PER_S / 1e9:g} GB/s between buffers of the host,"
      f" {cost.DISK_BYTES_PER_S / 1e9:g} GB/s from disk. Marking answers and"
      " what the control samples more are not counted."
  )
  return [f"{total}.", *sums, assumed]


def _checks_text(found) -> str:
  lines = []
  for check in found:
    way_out = f" -> {check.way_out}" if check.way_out else ""
    lines.append(f" {check.status:<8} {check.what}: {check.found}{way_out}")
  return "\n".join(["Checks", *lines, ""])
