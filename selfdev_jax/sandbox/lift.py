"""Programs that differ in their numbers alone share one compiled kernel.

A program is split into a skeleton and its float literals. The literals become
a traced argument, so that `0.3 * t` and `0.4 * t` are compiled once: a factory
writes many programs of few structures, and compiling costs more than merging.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import json

import jax
import numpy as np

from selfdev_jax.sandbox import ir
from selfdev_jax.sandbox import rebuild

# (base, task_vectors, literals) -> array like base.
Kernel = Callable[[jax.Array, Sequence[jax.Array], jax.Array], jax.Array]


def kernels(
    program: str,
) -> Callable[[tuple[int, ...]], tuple[Kernel, np.ndarray]]:
  """An admitted program as a kernel for each shape and the literals it takes.

  Args:
    program: `Admitted.program`, JSON text that the verifier has passed.

  Returns:
    shape -> (kernel, literals [n] float32). Programs of equal skeleton give
    the identical kernel, which is what `jax.jit` caches by.

  Raises:
    ir.IRError: `program` is not program IR.
  """
  leaves = ir.loads(program).leaves

  def of_shape(shape):
    skeleton, literals = _lift(leaves[shape])
    return _kernel(skeleton), np.asarray(literals, np.float32)

  return of_shape


def _is_lifted(operand) -> bool:
  return isinstance(operand, ir.Literal) and operand.value.dtype == np.float32


def _lift(block: ir.Block) -> tuple[str, list[np.float32]]:
  """The block as JSON with its float32 literals zeroed, and the literals.

  Those inside loops stay: they are few, and `scan` carries them as they are.
  """
  literals = []

  def lift(operand):
    if not _is_lifted(operand):
      return operand
    literals.append(operand.value)
    return ir.Literal(np.float32(0))

  equations = tuple(
      equation._replace(operands=tuple(map(lift, equation.operands)))
      for equation in block.equations
  )
  outputs = tuple(map(lift, block.outputs))
  skeleton = dataclasses.replace(block, equations=equations, outputs=outputs)
  return json.dumps(ir.encode_block(skeleton)), literals


@functools.lru_cache(maxsize=1024)
def _kernel(skeleton: str) -> Kernel:
  block = ir.decode_block(json.loads(skeleton))

  def kernel(base, task_vectors, literals):
    remaining = iter(literals)
    (merged,) = rebuild.evaluate(
        block,
        [base, *task_vectors],
        lambda literal: next(remaining)
        if _is_lifted(literal)
        else literal.value,
    )
    return merged

  return kernel
