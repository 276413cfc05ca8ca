"""What accelerators can do at most, by their makers' data sheets."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
  """An accelerator.

  Attributes:
    name: as flags have it.
    tflops: dense bfloat16 with float32 sums, TFLOP/s.
    bytes_per_s: of its own memory.
    memory_bytes: all of it.
    host_bytes_per_s: to or from the host, one way.
  """

  name: str
  tflops: float
  bytes_per_s: float
  memory_bytes: float
  host_bytes_per_s: float


# NVIDIA's data sheets of A100 (80 GB SXM), H100 (SXM), H200 (SXM) and L4, where
# rates "with sparsity" are halved; the Ada GPU architecture white paper, of the
# RTX 4090. PCIe 4.0 and 5.0 with 16 lanes.
DEVICES = {
    device.name: device
    for device in (
        Device("A100-80GB", 312, 2.039e12, 80e9, 32e9),
        Device("H100-80GB", 989, 3.35e12, 80e9, 64e9),
        Device("H200", 989, 4.8e12, 141e9, 64e9),
        Device("L4-24GB", 121, 0.3e12, 24e9, 32e9),
        Device("RTX4090-24GB", 165, 1.008e12, 24e9, 32e9),
    )
}
# How such a device calls itself, from the beginning.
_KINDS = {
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA A100 80GB": "A100-80GB",
    "NVIDIA H100 80GB": "H100-80GB",
    "NVIDIA H200": "H200",
    "NVIDIA L4": "L4-24GB",
    "NVIDIA GeForce RTX 4090": "RTX4090-24GB",
}


def of_kind(kind: str) -> Device | None:
  """The device that JAX calls `kind`; None where it is not known."""
  found = [name for start, name in _KINDS.items() if _begins(kind, start)]
  return DEVICES[found[0]] if found else None


def _begins(kind: str, start: str) -> bool:
  # The L40 is no L4.
  return kind == start or kind.startswith(start + " ") or kind == start + "GB"


def accelerators() -> list[jax.Device]:
  """Those of this process; none on a CPU."""
  return [device for device in jax.devices() if device.platform != "cpu"]
