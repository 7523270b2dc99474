"""The loops of the GPU backend, in Triton; ../triton.py launches them and says how they join.

The gates are functions of a recurrence's own (gates.py): GATES, DECAY and BACKWARD, of VALUES per
channel, each an input of its own (SEPARATE) or side by side in one.

A program is one warp on BLOCK channels of one chunk of time. Where it walks UNROLL rows at a time,
all of them are loaded before the first is computed: loads are not moved ahead of stores. Offsets
are 64 bits from the start of the tensor to the chunk, 32 bits within a group of rows.

RAW takes the processor's own exp2 and reciprocal (two units in the last place), which the
interpreter does not have; the library's forms cost twice the instructions.
"""

import triton
import triton.language as tl


@triton.jit
def exp_minus(x, RAW: tl.constexpr):
    """exp(-x), at most 2^63, so that a product of two such values is finite. NaN stays NaN."""
    x = tl.clamp(x, -43.6, 87.0, propagate_nan=tl.PropagateNan.ALL)
    if RAW:  # the library's form checks for denormals
        y = x * -1.44269504
        # what the product was rounded by, and the constant: 1e-6 of the result at x = -16
        lost = tl.fma(x, -1.44269504, -y) - x * 1.925963033e-8
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(e, lost * 0.693147181, e)
    else:
        return tl.exp2(x.to(tl.float64) * -1.4426950408889634).to(tl.float32)


@triton.jit
def reciprocal(x, RAW: tl.constexpr):
    if RAW:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _place(T, H, chunk, BLOCK: tl.constexpr):
    """This program's row of the batch (int64), chunk, number of chunks, first step and rows."""
    blocks = tl.cdiv(H, BLOCK)
    chunks = tl.cdiv(T, chunk)
    program = tl.program_id(0)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    n = program // blocks % chunks
    row = (program // blocks // chunks).to(tl.int64)
    return row, n, chunks, n * chunk, tl.minimum(chunk, T - n * chunk), columns


@triton.jit
def _wide(pointer, mask, WIDE: tl.constexpr):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float64 if WIDE else tl.float32)


@triton.jit
def _decayed(value, rest, a, c, b, WIDE: tl.constexpr):
    """a * (value + rest) + b, and its rest: Kahan's sum where a is near one, c = 1 - a.

    As in vectors.h, which says why. Maps of chunks, which are fp64, need none of it; of those a
    decay of zero is a reset, and lets nothing through, and one that has grown out of fp32 leaves
    zero what is zero.
    """
    if WIDE:
        return tl.where((a == 0.0) | (value == 0.0), 0.0, a * value) + b, rest
    else:
        change = (b - c * value) + rest
        near = value + change
        near_one = a >= 0.5
        left = tl.where(near_one, change - (near - value), 0.0)
        return tl.where(near_one, near, a * value + b), left


@triton.jit
def _load(x, y, H, mask, READS: tl.constexpr, SEPARATE: tl.constexpr, WIDE: tl.constexpr):
    """The first READS values of one step, the last of them again in place of others."""
    x0 = _wide(x, mask, WIDE)
    x1 = x0
    if READS > 1:
        x1 = _wide(y if SEPARATE else x + H, mask, WIDE)
    x2 = x1
    if READS > 2:
        x2 = _wide(x + 2 * H, mask, WIDE)
    return x0, x1, x2


@triton.jit
def _clear(x, reset, t, HAS_RESET: tl.constexpr):
    """x, or 0 where the state is cleared before step t."""
    if HAS_RESET:
        return tl.where(tl.load(reset + t) != 0, 0.0, x)
    else:
        return x


@triton.jit
def _mapped(
    decay, decay_rest, state, rest, x0, x1, x2, reset, t,
    GATES: tl.constexpr, DECAY: tl.constexpr, FLOW: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The map of the steps so far and of one more; with FLOW x2 is the gradient from outside."""
    if FLOW:
        a, c = DECAY(x0, x1, RAW)
        b = a * x2
    else:
        a, c, b = GATES(x0, x1, x2, RAW)
        state = _clear(state, reset, t, HAS_RESET)
        rest = _clear(rest, reset, t, HAS_RESET)
    state, rest = _decayed(state, rest, a, c, b, WIDE)
    decay, decay_rest = _decayed(decay, decay_rest, a, c, tl.zeros_like(b), WIDE)
    if FLOW:
        state = _clear(state, reset, t, HAS_RESET)
        rest = _clear(rest, reset, t, HAS_RESET)
    decay = _clear(decay, reset, t, HAS_RESET)
    decay_rest = _clear(decay_rest, reset, t, HAS_RESET)
    return decay, decay_rest, state, rest


@triton.jit
def summarize_kernel(
    reset_ptr, x_ptr, y_ptr, o_ptr, maps_ptr, T, H, chunk,
    GATES: tl.constexpr, DECAY: tl.constexpr, VALUES: tl.constexpr, DECAY_READS: tl.constexpr,
    SEPARATE: tl.constexpr, FLOW: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """maps [2, B, N, H] fp64: every chunk as h -> decay * h + state.

    FLOW: of the gradient flowing along the scan, G -> a * (o + G), instead of the state.
    """
    PARTS: tl.constexpr = 1 if SEPARATE else VALUES
    STEP: tl.constexpr = -1 if REVERSE else 1
    READS: tl.constexpr = DECAY_READS if FLOW else VALUES
    row, n, chunks, start, rows, columns = _place(T, H, chunk, BLOCK)
    mask = columns < H
    first = row * T + start + (rows - 1 if REVERSE else 0)
    x = x_ptr + first * H * PARTS + columns
    y = y_ptr + first * H + columns
    o = o_ptr + first * H + columns
    reset = reset_ptr + first
    state = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32)
    decay, rest, decay_rest = state + 1.0, state, state
    whole = rows // UNROLL * UNROLL
    for i in range(0, whole, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            at = u * STEP * H
            x0, x1, x2 = _load(x + at * PARTS, y + at, H, mask, READS, SEPARATE, WIDE)
            if FLOW:
                x2 = _wide(o + at, mask, WIDE)
            loaded = loaded + ((x0, x1, x2),)
        for u in tl.static_range(UNROLL):
            x0, x1, x2 = loaded[u]
            decay, decay_rest, state, rest = _mapped(
                decay, decay_rest, state, rest, x0, x1, x2, reset, (i + u) * STEP,
                GATES, DECAY, FLOW, HAS_RESET, RAW, WIDE,
            )  # fmt: skip
        x += UNROLL * STEP * H * PARTS
        y += UNROLL * STEP * H
        o += UNROLL * STEP * H
    for i in range(whole, rows):
        x0, x1, x2 = _load(x, y, H, mask, READS, SEPARATE, WIDE)
        if FLOW:
            x2 = _wide(o, mask, WIDE)
        decay, decay_rest, state, rest = _mapped(
            decay, decay_rest, state, rest, x0, x1, x2, reset, i * STEP,
            GATES, DECAY, FLOW, HAS_RESET, RAW, WIDE,
        )  # fmt: skip
        x += STEP * H * PARTS
        y += STEP * H
        o += STEP * H
    batch = tl.num_programs(0) // tl.cdiv(H, BLOCK) // chunks
    out = maps_ptr + (row * chunks + n) * H + columns
    tl.store(out, decay.to(tl.float64) + decay_rest, mask=mask)
    tl.store(out + batch.to(tl.int64) * chunks * H, state.to(tl.float64) + rest, mask=mask)


@triton.jit
def _entering(in_ptr, ends_ptr, row, n, chunks, H, columns, mask, REVERSE: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """The state that enters chunk n, and its rest: its neighbour's, or what enters them all."""
    before = n + 1 if REVERSE else n - 1
    outermost = before == (chunks if REVERSE else -1)
    if outermost:
        state = tl.load(in_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float64)
    else:
        at = (row * chunks + before) * H + columns
        state = tl.load(ends_ptr + at, mask=mask, other=0.0).to(tl.float64)
    if WIDE:
        return state, tl.zeros_like(state)
    else:
        value = state.to(tl.float32)
        # of what is not finite nothing is left
        left = tl.where(value - value == 0.0, state - value, 0.0)
        return value, left.to(tl.float32)


@triton.jit
def forward_kernel(
    reset_ptr, x_ptr, y_ptr, in_ptr, ends_ptr, h_ptr, last_ptr, T, H, chunk,
    GATES: tl.constexpr, VALUES: tl.constexpr, SEPARATE: tl.constexpr,
    REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h [B, T, H] of every step, and h_last [B, H]."""
    PARTS: tl.constexpr = 1 if SEPARATE else VALUES
    STEP: tl.constexpr = -1 if REVERSE else 1
    row, n, chunks, start, rows, columns = _place(T, H, chunk, BLOCK)
    mask = columns < H
    first = row * T + start + (rows - 1 if REVERSE else 0)
    x = x_ptr + first * H * PARTS + columns
    y = y_ptr + first * H + columns
    h = h_ptr + first * H + columns
    reset = reset_ptr + first
    state, rest = _entering(in_ptr, ends_ptr, row, n, chunks, H, columns, mask, REVERSE, WIDE)
    whole = rows // UNROLL * UNROLL
    for i in range(0, whole, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            at = u * STEP * H
            loaded = loaded + (_load(x + at * PARTS, y + at, H, mask, VALUES, SEPARATE, WIDE),)
        for u in tl.static_range(UNROLL):
            x0, x1, x2 = loaded[u]
            a, c, b = GATES(x0, x1, x2, RAW)
            state = _clear(state, reset, (i + u) * STEP, HAS_RESET)
            rest = _clear(rest, reset, (i + u) * STEP, HAS_RESET)
            state, rest = _decayed(state, rest, a, c, b, WIDE)
            tl.store(h + u * STEP * H, state.to(h_ptr.dtype.element_ty), mask=mask)
        x += UNROLL * STEP * H * PARTS
        y += UNROLL * STEP * H
        h += UNROLL * STEP * H
    for i in range(whole, rows):
        x0, x1, x2 = _load(x, y, H, mask, VALUES, SEPARATE, WIDE)
        a, c, b = GATES(x0, x1, x2, RAW)
        state = _clear(state, reset, i * STEP, HAS_RESET)
        rest = _clear(rest, reset, i * STEP, HAS_RESET)
        state, rest = _decayed(state, rest, a, c, b, WIDE)
        tl.store(h, state.to(h_ptr.dtype.element_ty), mask=mask)
        x += STEP * H * PARTS
        y += STEP * H
        h += STEP * H
    if n == (0 if REVERSE else chunks - 1):
        tl.store(last_ptr + row * H + columns, state, mask=mask)


@triton.jit
def _store_all(dx, dy, d0, d1, d2, H, mask, VALUES: tl.constexpr, SEPARATE: tl.constexpr):
    dtype = dx.dtype.element_ty
    tl.store(dx, d0.to(dtype), mask=mask)
    if VALUES > 1:
        tl.store(dy if SEPARATE else dx + H, d1.to(dtype), mask=mask)
    if VALUES > 2:
        tl.store(dx + 2 * H, d2.to(dtype), mask=mask)


@triton.jit
def backward_kernel(
    reset_ptr, x_ptr, y_ptr, h_ptr, o_ptr, in_ptr, ends_ptr, out_ptr, dx_ptr, dy_ptr, din_ptr,
    T, H, chunk,
    BACKWARD: tl.constexpr, VALUES: tl.constexpr, BACKWARD_READS: tl.constexpr,
    SEPARATE: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs, and of the state that enters the first step. Runs right to left."""
    PARTS: tl.constexpr = 1 if SEPARATE else VALUES
    row, n, chunks, start, rows, columns = _place(T, H, chunk, BLOCK)
    mask = columns < H
    last = row * T + start + rows - 1
    x = x_ptr + last * H * PARTS + columns
    y = y_ptr + last * H + columns
    dx = dx_ptr + last * H * PARTS + columns
    dy = dy_ptr + last * H + columns
    o = o_ptr + last * H + columns
    h = h_ptr + last * H + columns
    reset = reset_ptr + last
    flow, rest = _entering(out_ptr, ends_ptr, row, n, chunks, H, columns, mask, True, False)
    before = tl.load(in_ptr + row * H + columns, mask=mask, other=0.0)
    # The sequence's first step has no output before it to load: it is always in the second loop.
    whole = (rows - (1 if n == 0 else 0)) // UNROLL * UNROLL
    for i in range(0, whole, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            at = u * H
            x0, x1, x2 = _load(x - at * PARTS, y - at, H, mask, BACKWARD_READS, SEPARATE, False)
            given, previous = _wide(o - at, mask, False), _wide(h - at - H, mask, False)
            loaded = loaded + ((x0, x1, x2, given, previous),)
        for u in tl.static_range(UNROLL):
            x0, x1, x2, given, previous = loaded[u]
            previous = _clear(previous, reset, -(i + u), HAS_RESET)
            a, c, d0, d1, d2 = BACKWARD(given + flow, previous, x0, x1, x2, RAW)
            flow, rest = _decayed(flow, rest, a, c, a * given, False)
            flow = _clear(flow, reset, -(i + u), HAS_RESET)
            rest = _clear(rest, reset, -(i + u), HAS_RESET)
            _store_all(dx - u * H * PARTS, dy - u * H, d0, d1, d2, H, mask, VALUES, SEPARATE)
        x -= UNROLL * H * PARTS
        y -= UNROLL * H
        dx -= UNROLL * H * PARTS
        dy -= UNROLL * H
        o -= UNROLL * H
        h -= UNROLL * H
    for i in range(whole, rows):
        opening = start + rows - 1 - i + columns * 0 == 0
        has_previous = mask & (start + rows - 1 - i + columns * 0 > 0)
        x0, x1, x2 = _load(x, y, H, mask, BACKWARD_READS, SEPARATE, False)
        given = _wide(o, mask, False)
        previous = _wide(h - H, has_previous, False)
        previous = _clear(tl.where(opening, before, previous), reset, -i, HAS_RESET)
        a, c, d0, d1, d2 = BACKWARD(given + flow, previous, x0, x1, x2, RAW)
        flow, rest = _decayed(flow, rest, a, c, a * given, False)
        flow = _clear(flow, reset, -i, HAS_RESET)
        rest = _clear(rest, reset, -i, HAS_RESET)
        _store_all(dx, dy, d0, d1, d2, H, mask, VALUES, SEPARATE)
        x -= H * PARTS
        y -= H
        dx -= H * PARTS
        dy -= H
        o -= H
        h -= H
    if n == 0:
        tl.store(din_ptr + row * H + columns, flow, mask=mask)
