"""S4D in Triton: ../../kernels/states.py says how a program is cut. Complex numbers are two."""

import triton
import triton.language as tl

from models.scan.kernels.states import cleared, place, row_of


@triton.jit
def _weights(rate_ptr, weight_ptr, D, N, channels, n):
    """a = exp(rate) and weight [BLOCK, NP], real and imaginary; which are there, and where."""
    of_d = channels < D
    both = of_d[:, None] & (n < N)[None, :]
    at = (channels[:, None].to(tl.int64) * N + n[None, :]) * 2
    size = tl.exp(tl.load(rate_ptr + at, mask=both, other=0.0))
    angle = tl.load(rate_ptr + at + 1, mask=both, other=0.0)
    w_re = tl.load(weight_ptr + at, mask=both, other=0.0)
    w_im = tl.load(weight_ptr + at + 1, mask=both, other=0.0)
    return size * tl.cos(angle), size * tl.sin(angle), w_re, w_im, of_d, both, at


@triton.jit
def summarize_kernel(
    reset_ptr, x_ptr, k_ptr, b_ptr, c_ptr, rate_ptr, weight_ptr, grad_ptr, state_ptr, log_ptr,
    T, D, N, chunk, FLOW: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """Of every chunk: the state from zero, or (FLOW) the gradient's flow from right to left; and
    the number of steps, which is infinite where a reset lets nothing through."""
    row, chunk_n, chunks, first, steps, channels = place(T, D, chunk, tl.program_id(0), BLOCK)
    n = tl.arange(0, NP)
    a_re, a_im, w_re, w_im, of_d, both, at = _weights(rate_ptr, weight_ptr, D, N, channels, n)
    re = tl.zeros([BLOCK, NP], dtype=tl.float64)
    im = tl.zeros([BLOCK, NP], dtype=tl.float64)
    log = tl.zeros([BLOCK], dtype=tl.float64)
    for i in range(0, steps):
        step = row * T + first + (steps - 1 - i if FLOW else i)
        if FLOW:
            twice = 2.0 * row_of(grad_ptr, step, D, channels, of_d).to(tl.float64)[:, None]
            q_re = re + twice * w_re
            q_im = im - twice * w_im
            re = cleared(q_re * a_re + q_im * a_im, 0.0, reset_ptr, step, HAS_RESET)
            im = cleared(q_im * a_re - q_re * a_im, 0.0, reset_ptr, step, HAS_RESET)
        else:
            x = row_of(x_ptr, step, D, channels, of_d).to(tl.float64)[:, None]
            re = cleared(re, 0.0, reset_ptr, step, HAS_RESET)
            im = cleared(im, 0.0, reset_ptr, step, HAS_RESET)
            new = a_re * re - a_im * im + x
            im = a_re * im + a_im * re
            re = new
        log = cleared(log + 1.0, float("inf"), reset_ptr, step, HAS_RESET)
    of_chunk = row * chunks + chunk_n
    tl.store(state_ptr + of_chunk * D * N * 2 + at, re, mask=both)
    tl.store(state_ptr + of_chunk * D * N * 2 + at + 1, im, mask=both)
    tl.store(log_ptr + of_chunk * D + channels, log, mask=of_d)


@triton.jit
def _power(rate_ptr, at, both, count, SIGN: tl.constexpr):
    """exp(rate * count [BLOCK]), or its conjugate; zero where that is infinite."""
    through = (count < float("inf"))[:, None]
    finite = tl.where(through, count[:, None], 0.0)
    size = tl.exp(tl.load(rate_ptr + at, mask=both, other=-1.0) * finite)
    size = tl.where(through, size, 0.0)
    angle = tl.load(rate_ptr + at + 1, mask=both, other=0.0) * finite
    return size * tl.cos(angle), SIGN * size * tl.sin(angle)


@triton.jit
def carry_kernel(
    state_ptr, log_ptr, rate_ptr, enter_ptr, ends_ptr, last_ptr, decay_ptr,
    T, D, N, chunk, REVERSE: tl.constexpr, BLOCK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """What enters every chunk, what leaves the last, and the decay of all."""
    row, _, chunks, _, _, channels = place(chunk, D, chunk, tl.program_id(0), BLOCK)
    chunks = tl.cdiv(T, chunk)
    n = tl.arange(0, NP)
    of_d = channels < D
    both = of_d[:, None] & (n < N)[None, :]
    at = (channels[:, None].to(tl.int64) * N + n[None, :]) * 2
    re = tl.load(enter_ptr + row * D * N * 2 + at, mask=both, other=0.0)
    im = tl.load(enter_ptr + row * D * N * 2 + at + 1, mask=both, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for i in range(0, chunks):
        of_chunk = row * chunks + (chunks - 1 - i if REVERSE else i)
        ends = ends_ptr + of_chunk * D * N * 2 + at
        tl.store(ends, re, mask=both)
        tl.store(ends + 1, im, mask=both)
        log = tl.load(log_ptr + of_chunk * D + channels, mask=of_d, other=0.0)
        a_re, a_im = _power(rate_ptr, at, both, log, -1.0 if REVERSE else 1.0)
        through = (log < float("inf"))[:, None]
        re = tl.where(through, re, 0.0)
        im = tl.where(through, im, 0.0)
        state = state_ptr + of_chunk * D * N * 2 + at
        new = a_re * re - a_im * im + tl.load(state, mask=both, other=0.0)
        im = a_re * im + a_im * re + tl.load(state + 1, mask=both, other=0.0)
        re = new
        total += log
    last = row * D * N * 2 + at
    tl.store(last_ptr + last, re, mask=both)
    tl.store(last_ptr + last + 1, im, mask=both)
    a_re, a_im = _power(rate_ptr, at, both, total, -1.0 if REVERSE else 1.0)
    tl.store(decay_ptr + last, a_re, mask=both)
    tl.store(decay_ptr + last + 1, a_im, mask=both)


@triton.jit
def forward_kernel(
    reset_ptr, x_ptr, k_ptr, b_ptr, c_ptr, rate_ptr, weight_ptr, ends_ptr, kept_ptr, y_ptr,
    T, D, N, chunk, TILE: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """y of every chunk from the state that enters it; the states that enter tiles are kept."""
    row, chunk_n, chunks, first, steps, channels = place(T, D, chunk, tl.program_id(0), BLOCK)
    n = tl.arange(0, NP)
    a_re, a_im, w_re, w_im, of_d, both, at = _weights(rate_ptr, weight_ptr, D, N, channels, n)
    ends = ends_ptr + (row * chunks + chunk_n) * D * N * 2 + at
    re = tl.load(ends, mask=both, other=0.0)
    im = tl.load(ends + 1, mask=both, other=0.0)
    for i in range(0, steps):
        step = row * T + first + i
        if (first + i) % TILE == 0:
            tile = row * tl.cdiv(T, TILE) + (first + i) // TILE
            kept = kept_ptr + tile * D * N * 2 + at
            tl.store(kept, re.to(tl.float32), mask=both)
            tl.store(kept + 1, im.to(tl.float32), mask=both)
        x = row_of(x_ptr, step, D, channels, of_d).to(tl.float64)[:, None]
        re = cleared(re, 0.0, reset_ptr, step, HAS_RESET)
        im = cleared(im, 0.0, reset_ptr, step, HAS_RESET)
        new = a_re * re - a_im * im + x
        im = a_re * im + a_im * re
        re = new
        y = 2.0 * tl.sum(w_re * re - w_im * im, axis=1)
        tl.store(y_ptr + step * D + channels, y.to(y_ptr.dtype.element_ty), mask=of_d)


@triton.jit
def backward_kernel(
    reset_ptr, x_ptr, k_ptr, b_ptr, c_ptr, rate_ptr, weight_ptr, kept_ptr, grad_ptr, ends_ptr,
    scratch_ptr, dx_ptr, dk_ptr, db_ptr, dc_ptr, drate_ptr, dweight_ptr,
    T, D, N, chunk, tasks, TILE: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """Gradients of every chunk, tile by tile from the right; a tile's states are made again.

    A program has a scratch of its own for them, [TILE + 1, BLOCK, NP] complex, and goes from task
    to task. Gradients of weights are parts of a chunk.
    """
    n = tl.arange(0, NP)
    own = (tl.arange(0, BLOCK)[:, None] * NP + n[None, :]) * 2
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (TILE + 1) * BLOCK * NP * 2
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        row, chunk_n, chunks, first, steps, channels = place(T, D, chunk, task, BLOCK)
        a_re, a_im, w_re, w_im, of_d, both, at = _weights(rate_ptr, weight_ptr, D, N, channels, n)
        of_chunk = (row * chunks + chunk_n) * D * N * 2
        flow_re = tl.load(ends_ptr + of_chunk + at, mask=both, other=0.0)
        flow_im = tl.load(ends_ptr + of_chunk + at + 1, mask=both, other=0.0)
        of_a_re = tl.zeros([BLOCK, NP], dtype=tl.float64)
        of_a_im = tl.zeros([BLOCK, NP], dtype=tl.float64)
        of_w_re = tl.zeros([BLOCK, NP], dtype=tl.float64)
        of_w_im = tl.zeros([BLOCK, NP], dtype=tl.float64)
        tiles = tl.cdiv(steps, TILE)
        for j in range(0, tiles):
            begin = first + (tiles - 1 - j) * TILE
            length = tl.minimum(TILE, first + steps - begin)
            tile = row * tl.cdiv(T, TILE) + begin // TILE
            kept = kept_ptr + tile * D * N * 2 + at
            re = tl.load(kept, mask=both, other=0.0).to(tl.float64)
            im = tl.load(kept + 1, mask=both, other=0.0).to(tl.float64)
            tl.store(scratch + own, re.to(tl.float32))
            tl.store(scratch + own + 1, im.to(tl.float32))
            for i in range(0, length):
                step = row * T + begin + i
                x = row_of(x_ptr, step, D, channels, of_d).to(tl.float64)[:, None]
                re = cleared(re, 0.0, reset_ptr, step, HAS_RESET)
                im = cleared(im, 0.0, reset_ptr, step, HAS_RESET)
                new = a_re * re - a_im * im + x
                im = a_re * im + a_im * re
                re = new
                tl.store(scratch + (i + 1) * BLOCK * NP * 2 + own, re.to(tl.float32))
                tl.store(scratch + (i + 1) * BLOCK * NP * 2 + own + 1, im.to(tl.float32))
            tl.debug_barrier()
            for i in range(0, length):
                local = length - 1 - i
                step = row * T + begin + local
                twice = 2.0 * row_of(grad_ptr, step, D, channels, of_d).to(tl.float64)[:, None]
                q_re = flow_re + twice * w_re
                q_im = flow_im - twice * w_im
                after = scratch + (local + 1) * BLOCK * NP * 2 + own
                of_w_re += twice * tl.load(after)
                of_w_im -= twice * tl.load(after + 1)
                before = scratch + local * BLOCK * NP * 2 + own
                h_re = cleared(tl.load(before), 0.0, reset_ptr, step, HAS_RESET)
                h_im = cleared(tl.load(before + 1), 0.0, reset_ptr, step, HAS_RESET)
                of_a_re += q_re * h_re + q_im * h_im
                of_a_im += q_im * h_re - q_re * h_im
                of_x = tl.sum(tl.where(both, q_re, 0.0), axis=1)
                where = step * D + channels
                tl.store(dx_ptr + where, of_x.to(dx_ptr.dtype.element_ty), mask=of_d)
                new = q_re * a_re + q_im * a_im
                flow_im = q_im * a_re - q_re * a_im
                flow_re = cleared(new, 0.0, reset_ptr, step, HAS_RESET)
                flow_im = cleared(flow_im, 0.0, reset_ptr, step, HAS_RESET)
            tl.debug_barrier()
        # of rate = log a: times the conjugate of a
        drate = drate_ptr + of_chunk + at
        tl.store(drate, of_a_re * a_re + of_a_im * a_im, mask=both)
        tl.store(drate + 1, of_a_im * a_re - of_a_re * a_im, mask=both)
        tl.store(dweight_ptr + of_chunk + at, of_w_re, mask=both)
        tl.store(dweight_ptr + of_chunk + at + 1, of_w_im, mask=both)
