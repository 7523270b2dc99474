"""The linear recurrence in Triton."""

import triton
import triton.language as tl

from models.scan.kernels.gates import TritonGates


@triton.jit
def _decay(x0, x1, RAW: tl.constexpr):
    return x0, 1.0 - x0


@triton.jit
def _gates(x0, x1, x2, RAW: tl.constexpr):
    return x0, 1.0 - x0, x1


@triton.jit
def _backward(q, previous, x0, x1, x2, RAW: tl.constexpr):
    return x0, 1.0 - x0, q * previous, q, q


@triton.jit
def _decay_of_complement(x0, x1, RAW: tl.constexpr):
    return 1.0 - x0, x0


@triton.jit
def _gates_of_complement(x0, x1, x2, RAW: tl.constexpr):
    return 1.0 - x0, x0, x1


@triton.jit
def _backward_of_complement(q, previous, x0, x1, x2, RAW: tl.constexpr):
    return 1.0 - x0, x0, -q * previous, q, q


GATES = TritonGates(_decay, _gates, _backward, values=2, separate=True, backward_reads=1)
COMPLEMENT = TritonGates(
    _decay_of_complement,
    _gates_of_complement,
    _backward_of_complement,
    values=2,
    separate=True,
    backward_reads=1,
)
