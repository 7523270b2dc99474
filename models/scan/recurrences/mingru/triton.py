"""minGRU's gates in Triton; the values are k and v."""

import triton
import triton.language as tl

from models.scan.kernels.gates import TritonGates
from models.scan.kernels.loops import exp_minus, reciprocal


@triton.jit
def _decay(x0, x1, RAW: tl.constexpr):
    ek = exp_minus(x0, RAW)
    z = reciprocal(1.0 + ek, RAW)
    return ek * z, z


@triton.jit
def _gates(x0, x1, x2, RAW: tl.constexpr):
    """Two reciprocals are taken as one, which is what they cost most."""
    ek = exp_minus(x0, RAW)
    ev = exp_minus(x1, RAW)
    r = reciprocal((1.0 + ek) * (1.0 + ev), RAW)
    z = (1.0 + ev) * r
    return ek * z, z, z * tl.where(x1 >= 0.0, x1 + 0.5, (1.0 + ek) * r)


@triton.jit
def _backward(q, previous, x0, x1, x2, RAW: tl.constexpr):
    ek = exp_minus(x0, RAW)
    ev = exp_minus(x1, RAW)
    r = reciprocal((1.0 + ek) * (1.0 + ev), RAW)
    z = (1.0 + ev) * r
    s = (1.0 + ek) * r
    a = ek * z
    positive = x1 >= 0.0
    g = tl.where(positive, x1 + 0.5, s)
    qz = q * z
    dv = qz * tl.where(positive, 1.0, s * (1.0 - s))
    return a, z, qz * a * (g - previous), dv, dv


GATES = TritonGates(_decay, _gates, _backward, values=2, backward_reads=2)
