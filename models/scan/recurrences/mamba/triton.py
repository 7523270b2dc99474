"""Mamba's selective scan in Triton: ../../kernels/states.py says how a program is cut."""

import triton
import triton.language as tl

from models.scan.kernels.states import cleared, lost, place, row_of, softplus


@triton.jit
def _weights(rate_ptr, bias_ptr, D, N, channels, n):
    """Minus A [BLOCK, NP], the bias [BLOCK], and which of the numbers are there."""
    of_d, of_n = channels < D, n < N
    both = of_d[:, None] & of_n[None, :]
    at = channels[:, None].to(tl.int64) * N + n[None, :]
    rate = -tl.load(rate_ptr + at, mask=both, other=0.0)
    return rate, tl.load(bias_ptr + channels, mask=of_d, other=0.0), of_d, of_n, both, at


@triton.jit
def summarize_kernel(
    reset_ptr, x_ptr, k_ptr, b_ptr, c_ptr, rate_ptr, bias_ptr, grad_ptr, state_ptr, log_ptr,
    T, D, N, chunk, FLOW: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """Of every chunk: the state from zero, or (FLOW) the gradient's flow from right to left; and
    the sum of dt, which is infinite where a reset lets nothing through."""
    row, chunk_n, chunks, first, steps, channels = place(T, D, chunk, tl.program_id(0), BLOCK)
    n = tl.arange(0, NP)
    rate, bias, of_d, of_n, both, at = _weights(rate_ptr, bias_ptr, D, N, channels, n)
    state = tl.zeros([BLOCK, NP], dtype=tl.float64)
    log = tl.zeros([BLOCK], dtype=tl.float64)
    for i in range(0, steps):
        step = row * T + first + (steps - 1 - i if FLOW else i)
        dt = softplus(row_of(k_ptr, step, D, channels, of_d) + bias)
        c = lost(dt[:, None] * rate).to(tl.float64)
        if FLOW:
            out = row_of(grad_ptr, step, D, channels, of_d)
            q = state + (out[:, None] * row_of(c_ptr, step, N, n, of_n)[None, :]).to(tl.float64)
            state = cleared(q - c * q, 0.0, reset_ptr, step, HAS_RESET)
        else:
            held = dt * row_of(x_ptr, step, D, channels, of_d)
            new = (held[:, None] * row_of(b_ptr, step, N, n, of_n)[None, :]).to(tl.float64)
            state = cleared(state, 0.0, reset_ptr, step, HAS_RESET)
            state = state + (new - c * state)
        log = cleared(log + dt.to(tl.float64), float("inf"), reset_ptr, step, HAS_RESET)
    of_chunk = row * chunks + chunk_n
    tl.store(state_ptr + of_chunk * D * N + at, state, mask=both)
    tl.store(log_ptr + of_chunk * D + channels, log, mask=of_d)


@triton.jit
def _decay(log, rate):
    """exp(-rate * log [BLOCK]); zero where that is infinite, of a rate of zero too."""
    log = log[:, None]
    return tl.where(log == float("inf"), 0.0, tl.exp(-log * rate))


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
    at = channels[:, None].to(tl.int64) * N + n[None, :]
    rate = -tl.load(rate_ptr + at, mask=both, other=0.0).to(tl.float64)
    h = tl.load(enter_ptr + row * D * N + at, mask=both, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for i in range(0, chunks):
        of_chunk = row * chunks + (chunks - 1 - i if REVERSE else i)
        tl.store(ends_ptr + of_chunk * D * N + at, h, mask=both)
        log = tl.load(log_ptr + of_chunk * D + channels, mask=of_d, other=0.0)
        decay = _decay(log, rate)
        state = tl.load(state_ptr + of_chunk * D * N + at, mask=both, other=0.0)
        h = tl.where(decay == 0.0, 0.0, h) * decay + state
        total += log
    tl.store(last_ptr + row * D * N + at, h, mask=both)
    tl.store(decay_ptr + row * D * N + at, _decay(total, rate), mask=both)


@triton.jit
def forward_kernel(
    reset_ptr, x_ptr, k_ptr, b_ptr, c_ptr, rate_ptr, bias_ptr, ends_ptr, kept_ptr, y_ptr,
    T, D, N, chunk, TILE: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """y of every chunk from the state that enters it; the states that enter tiles are kept."""
    row, chunk_n, chunks, first, steps, channels = place(T, D, chunk, tl.program_id(0), BLOCK)
    n = tl.arange(0, NP)
    rate, bias, of_d, of_n, both, at = _weights(rate_ptr, bias_ptr, D, N, channels, n)
    h = tl.load(ends_ptr + (row * chunks + chunk_n) * D * N + at, mask=both, other=0.0)
    for i in range(0, steps):
        step = row * T + first + i
        if (first + i) % TILE == 0:
            tile = row * tl.cdiv(T, TILE) + (first + i) // TILE
            tl.store(kept_ptr + tile * D * N + at, h.to(tl.float32), mask=both)
        dt = softplus(row_of(k_ptr, step, D, channels, of_d) + bias)
        c = lost(dt[:, None] * rate).to(tl.float64)
        held = dt * row_of(x_ptr, step, D, channels, of_d)
        new = (held[:, None] * row_of(b_ptr, step, N, n, of_n)[None, :]).to(tl.float64)
        h = cleared(h, 0.0, reset_ptr, step, HAS_RESET)
        h = h + (new - c * h)
        y = tl.sum(h.to(tl.float32) * row_of(c_ptr, step, N, n, of_n)[None, :], axis=1)
        tl.store(y_ptr + step * D + channels, y.to(y_ptr.dtype.element_ty), mask=of_d)


@triton.jit
def backward_kernel(
    reset_ptr, x_ptr, k_ptr, b_ptr, c_ptr, rate_ptr, bias_ptr, kept_ptr, grad_ptr, ends_ptr,
    scratch_ptr, dx_ptr, dk_ptr, db_ptr, dc_ptr, drate_ptr, dbias_ptr,
    T, D, N, chunk, tasks, TILE: tl.constexpr, HAS_RESET: tl.constexpr, BLOCK: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """Gradients of every chunk, tile by tile from the right; a tile's states are made again.

    A program has a scratch of its own for them, [TILE + 1, BLOCK, NP], and goes from task to task.
    dB and dC are parts of a block of channels, those of weights parts of a chunk.
    """
    n = tl.arange(0, NP)
    own = tl.arange(0, BLOCK)[:, None] * NP + n[None, :]
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (TILE + 1) * BLOCK * NP
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        row, chunk_n, chunks, first, steps, channels = place(T, D, chunk, task, BLOCK)
        rate, bias, of_d, of_n, both, at = _weights(rate_ptr, bias_ptr, D, N, channels, n)
        of_chunk = row * chunks + chunk_n
        flow = tl.load(ends_ptr + of_chunk * D * N + at, mask=both, other=0.0)
        of_rate = tl.zeros([BLOCK, NP], dtype=tl.float64)  # a chunk may be a million steps
        of_bias = tl.zeros([BLOCK], dtype=tl.float64)
        batch = tasks // (chunks * tl.cdiv(D, BLOCK))
        part = (task % tl.cdiv(D, BLOCK)).to(tl.int64) * batch * T
        tiles = tl.cdiv(steps, TILE)
        for j in range(0, tiles):
            begin = first + (tiles - 1 - j) * TILE
            length = tl.minimum(TILE, first + steps - begin)
            tile = row * tl.cdiv(T, TILE) + begin // TILE
            h = tl.load(kept_ptr + tile * D * N + at, mask=both, other=0.0).to(tl.float64)
            tl.store(scratch + own, h.to(tl.float32))
            for i in range(0, length):
                step = row * T + begin + i
                dt = softplus(row_of(k_ptr, step, D, channels, of_d) + bias)
                c = lost(dt[:, None] * rate).to(tl.float64)
                held = dt * row_of(x_ptr, step, D, channels, of_d)
                new = (held[:, None] * row_of(b_ptr, step, N, n, of_n)[None, :]).to(tl.float64)
                h = cleared(h, 0.0, reset_ptr, step, HAS_RESET)
                h = h + (new - c * h)
                tl.store(scratch + (i + 1) * BLOCK * NP + own, h.to(tl.float32))
            tl.debug_barrier()
            tile_rate = tl.zeros([BLOCK, NP], dtype=tl.float32)
            tile_bias = tl.zeros([BLOCK], dtype=tl.float32)
            for i in range(0, length):
                local = length - 1 - i
                step = row * T + begin + local
                z = row_of(k_ptr, step, D, channels, of_d) + bias
                dt = softplus(z)
                x = row_of(x_ptr, step, D, channels, of_d)
                out = row_of(grad_ptr, step, D, channels, of_d)
                b = row_of(b_ptr, step, N, n, of_n)
                c = row_of(c_ptr, step, N, n, of_n)
                gone = lost(dt[:, None] * rate)
                q = flow + (out[:, None] * c[None, :]).to(tl.float64)
                narrow = q.to(tl.float32)
                after = tl.load(scratch + (local + 1) * BLOCK * NP + own)
                before = tl.load(scratch + local * BLOCK * NP + own)
                before = cleared(before, 0.0, reset_ptr, step, HAS_RESET)
                masked = tl.where(of_d, out, 0.0)
                row_n = (part + step) * N + n
                tl.store(dc_ptr + row_n, tl.sum(masked[:, None] * after, axis=0), mask=of_n)
                held = dt * x
                tl.store(db_ptr + row_n, tl.sum(narrow * held[:, None], axis=0), mask=of_n)
                of_held = tl.sum(narrow * b[None, :], axis=1)
                of_log = narrow * (1.0 - gone) * before
                of_dt = of_held * x - tl.sum(of_log * rate, axis=1)
                tile_rate += of_log * dt[:, None]
                of_k = of_dt / (1.0 + tl.exp(-z))
                tile_bias += of_k
                where = step * D + channels
                tl.store(dx_ptr + where, (of_held * dt).to(dx_ptr.dtype.element_ty), mask=of_d)
                tl.store(dk_ptr + where, of_k.to(dk_ptr.dtype.element_ty), mask=of_d)
                flow = cleared(q - gone.to(tl.float64) * q, 0.0, reset_ptr, step, HAS_RESET)
            tl.debug_barrier()
            of_rate += tile_rate.to(tl.float64)
            of_bias += tile_bias.to(tl.float64)
        tl.store(drate_ptr + of_chunk * D * N + at, of_rate, mask=both)
        tl.store(dbias_ptr + of_chunk * D + channels, of_bias, mask=of_d)
