"""minLSTM's gates in Triton, normalised or not; the values are f, i and v."""

import triton
import triton.language as tl

from models.scan.kernels.gates import TritonGates
from models.scan.kernels.loops import exp_minus, reciprocal


@triton.jit
def _lift(f, i):
    """Only f - i matters once both gates are all but closed: keep them in exp_minus's range.

    A share is then at least 5e-11, where both are closed and it should be less.
    """
    by = tl.maximum(-20.0 - tl.maximum(f, i), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return f + by, i + by


@triton.jit
def _decay(x0, x1, RAW: tl.constexpr):
    f, i = _lift(x0, x1)
    ef = exp_minus(f, RAW)
    ei = exp_minus(i, RAW)
    r = reciprocal(2.0 + ei + ef, RAW)
    return (1.0 + ei) * r, (1.0 + ef) * r


@triton.jit
def _gates(x0, x1, x2, RAW: tl.constexpr):
    f, i = _lift(x0, x1)
    ef = exp_minus(f, RAW)
    ei = exp_minus(i, RAW)
    ev = exp_minus(x2, RAW)
    r = reciprocal((2.0 + ei + ef) * (1.0 + ev), RAW)
    total = (1.0 + ev) * r
    g = tl.where(x2 >= 0.0, x2 + 0.5, (2.0 + ei + ef) * r)
    w = (1.0 + ef) * total
    return (1.0 + ei) * total, w, w * g


@triton.jit
def _backward(q, previous, x0, x1, x2, RAW: tl.constexpr):
    f, i = _lift(x0, x1)
    ef = exp_minus(f, RAW)
    ei = exp_minus(i, RAW)
    s = reciprocal(1.0 + exp_minus(x2, RAW), RAW)
    r = reciprocal((1.0 + ef) * (1.0 + ei), RAW)
    positive = x2 >= 0.0
    g = tl.where(positive, x2 + 0.5, s)
    slope = tl.where(positive, 1.0, s * (1.0 - s))
    total = reciprocal(2.0 + ei + ef, RAW)
    a = (1.0 + ei) * total
    w = (1.0 + ef) * total
    d = q * (previous - g) * a * w
    return a, w, d * ef * ((1.0 + ei) * r), -d * ei * ((1.0 + ef) * r), q * w * slope


@triton.jit
def _decay_unnormalized(x0, x1, RAW: tl.constexpr):
    ef = exp_minus(x0, RAW)
    a = reciprocal(1.0 + ef, RAW)
    return a, ef * a


@triton.jit
def _gates_unnormalized(x0, x1, x2, RAW: tl.constexpr):
    a, c = _decay_unnormalized(x0, x1, RAW)
    ei = exp_minus(x1, RAW)
    ev = exp_minus(x2, RAW)
    r = reciprocal((1.0 + ei) * (1.0 + ev), RAW)
    return a, c, (1.0 + ev) * r * tl.where(x2 >= 0.0, x2 + 0.5, (1.0 + ei) * r)


@triton.jit
def _backward_unnormalized(q, previous, x0, x1, x2, RAW: tl.constexpr):
    ef = exp_minus(x0, RAW)
    ei = exp_minus(x1, RAW)
    s = reciprocal(1.0 + exp_minus(x2, RAW), RAW)
    r = reciprocal((1.0 + ef) * (1.0 + ei), RAW)
    keep_f = (1.0 + ei) * r
    keep_i = (1.0 + ef) * r
    positive = x2 >= 0.0
    g = tl.where(positive, x2 + 0.5, s)
    slope = tl.where(positive, 1.0, s * (1.0 - s))
    df = q * previous * keep_f * ef * keep_f
    return keep_f, ef * keep_f, df, q * g * keep_i * ei * keep_i, q * keep_i * slope


NORMALIZED = TritonGates(_decay, _gates, _backward, values=3, decay_reads=2)
UNNORMALIZED = TritonGates(
    _decay_unnormalized, _gates_unnormalized, _backward_unnormalized, values=3
)
