"""The linear recurrence in Triton."""

import triton
import triton.language as tl

from models.scan.kernels.gates import TritonGates


@triton.jit
def _decay(x0, x1, RAW: tl.constexpr):
    return x0


@triton.jit
def _gates(x0, x1, x2, RAW: tl.constexpr):
    return x0, x1


@triton.jit
def _backward(q, previous, x0, x1, x2, RAW: tl.constexpr):
    return x0, q * previous, q, q


GATES = TritonGates(_decay, _gates, _backward, values=2, separate=True, backward_reads=1)
