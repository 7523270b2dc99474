"""What the GPU's loops over states [B, D, N] share, in Triton; ../triton_states.py launches them.

A program is a block of channels with all their states, over one chunk of time; states are in fp64,
so that nothing is lost over long memories. Offsets are 64 bits.
"""

import triton
import triton.language as tl


@triton.jit
def place(T, D, chunk, task, BLOCK: tl.constexpr):
    """A task's row of the batch, chunk, number of chunks, first step, steps, channels."""
    blocks = tl.cdiv(D, BLOCK)
    chunks = tl.cdiv(T, chunk)
    channels = task % blocks * BLOCK + tl.arange(0, BLOCK)
    n = task // blocks % chunks
    row = (task // blocks // chunks).to(tl.int64)
    return row, n, chunks, n * chunk, tl.minimum(chunk, T - n * chunk), channels


@triton.jit
def cleared(x, to, reset, at, HAS_RESET: tl.constexpr):
    """x, or `to` where the state is cleared before the step at that place of [B, T]."""
    if HAS_RESET:
        return tl.where(tl.load(reset + at) != 0, to, x)
    else:
        return x


@triton.jit
def row_of(pointer, at, width, index, mask):
    """A row [width] of [..., width] as fp32."""
    return tl.load(pointer + at * width + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softplus(z):
    """log(1 + exp(z)), right to a rounding or two where it is small too."""
    u = tl.exp(-tl.abs(z))
    s = u / (2.0 + u)  # log(1 + u) = 2 atanh(u / (2 + u))
    ss = s * s
    p = ss * (1.0 / 13.0) + 1.0 / 11.0
    p = p * ss + 1.0 / 9.0
    p = p * ss + 1.0 / 7.0
    p = p * ss + 1.0 / 5.0
    p = p * ss + 1.0 / 3.0
    p = p * ss + 1.0
    return tl.where(z > 0.0, z, 0.0) + 2.0 * s * p


@triton.jit
def lost(x):
    """1 - exp(-x) of an x >= 0, right to a rounding or two where it is small too."""
    near = 1.0 / 120.0 - x * (1.0 / 720.0 - x * (1.0 / 5040.0))
    near = 1.0 / 24.0 - x * near
    near = 1.0 / 6.0 - x * near
    near = 0.5 - x * near
    near = x * (1.0 - x * near)
    return tl.where(x < 0.35, near, 1.0 - tl.exp(-x))
