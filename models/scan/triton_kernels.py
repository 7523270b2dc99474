"""The kernels of the GPU backend, in Triton; gpu.py launches them and says how they work together.

A program is one warp on BLOCK channels of one chunk of time. Where it walks UNROLL rows at a time,
all of them are loaded before the first is computed: loads are not moved ahead of stores. Offsets
are 64 bits from the start of the tensor to the chunk, 32 bits within a group of rows.

RAW takes the processor's own exp2 and reciprocal (two units in the last place), which the
interpreter does not have; the library's forms cost twice the instructions.
"""

import triton
import triton.language as tl


@triton.jit
def _exp_minus(x, RAW: tl.constexpr):
    """exp(-x), at most 2^63, so that a product of two such values is finite. NaN stays NaN."""
    y = tl.minimum(x * -1.4426950408889634, 63.0, propagate_nan=tl.PropagateNan.ALL)
    if RAW:  # the library's form checks for denormals
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(y)


@triton.jit
def _reciprocal(x, RAW: tl.constexpr):
    if RAW:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _lift(f, i):
    """Only f - i matters once both gates are all but closed: keep them in _exp_minus's range."""
    by = tl.maximum(-20.0 - tl.maximum(f, i), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return f + by, i + by


@triton.jit
def _decay(x0, x1, RECURRENCE: tl.constexpr, RAW: tl.constexpr):
    """a of h = a * h + b."""
    if RECURRENCE == "linear":
        return x0
    elif RECURRENCE == "mingru":
        ek = _exp_minus(x0, RAW)
        return ek * _reciprocal(1.0 + ek, RAW)
    elif RECURRENCE == "minlstm":
        f, i = _lift(x0, x1)
        ef = _exp_minus(f, RAW)
        ei = _exp_minus(i, RAW)
        return (1.0 + ei) * _reciprocal(2.0 + ei + ef, RAW)
    else:
        return _reciprocal(1.0 + _exp_minus(x0, RAW), RAW)


@triton.jit
def _gates(x0, x1, x2, RECURRENCE: tl.constexpr, RAW: tl.constexpr):
    """a and b of h = a * h + b; two reciprocals are taken as one, which is what they cost most."""
    if RECURRENCE == "linear":
        return x0, x1
    elif RECURRENCE == "mingru":
        ek = _exp_minus(x0, RAW)
        ev = _exp_minus(x1, RAW)
        r = _reciprocal((1.0 + ek) * (1.0 + ev), RAW)
        z = (1.0 + ev) * r
        return ek * z, z * tl.where(x1 >= 0.0, x1 + 0.5, (1.0 + ek) * r)
    elif RECURRENCE == "minlstm":
        f, i = _lift(x0, x1)
        ef = _exp_minus(f, RAW)
        ei = _exp_minus(i, RAW)
        ev = _exp_minus(x2, RAW)
        r = _reciprocal((2.0 + ei + ef) * (1.0 + ev), RAW)
        total = (1.0 + ev) * r
        g = tl.where(x2 >= 0.0, x2 + 0.5, (2.0 + ei + ef) * r)
        return (1.0 + ei) * total, (1.0 + ef) * total * g
    else:
        a = _reciprocal(1.0 + _exp_minus(x0, RAW), RAW)
        ei = _exp_minus(x1, RAW)
        ev = _exp_minus(x2, RAW)
        r = _reciprocal((1.0 + ei) * (1.0 + ev), RAW)
        return a, (1.0 + ev) * r * tl.where(x2 >= 0.0, x2 + 0.5, (1.0 + ei) * r)


@triton.jit
def _gates_backward(q, previous, x0, x1, x2, RECURRENCE: tl.constexpr, RAW: tl.constexpr):
    """a, and the gradients of the preactivations from the gradient q of h."""
    if RECURRENCE == "linear":
        return x0, q * previous, q, q
    elif RECURRENCE == "mingru":
        ek = _exp_minus(x0, RAW)
        ev = _exp_minus(x1, RAW)
        r = _reciprocal((1.0 + ek) * (1.0 + ev), RAW)
        z = (1.0 + ev) * r
        s = (1.0 + ek) * r
        a = ek * z
        positive = x1 >= 0.0
        g = tl.where(positive, x1 + 0.5, s)
        qz = q * z
        dv = qz * tl.where(positive, 1.0, s * (1.0 - s))
        return a, qz * a * (g - previous), dv, dv
    else:
        f, i = x0, x1
        if RECURRENCE == "minlstm":
            f, i = _lift(x0, x1)
        ef = _exp_minus(f, RAW)
        ei = _exp_minus(i, RAW)
        s = _reciprocal(1.0 + _exp_minus(x2, RAW), RAW)
        r = _reciprocal((1.0 + ef) * (1.0 + ei), RAW)
        keep_f = (1.0 + ei) * r
        keep_i = (1.0 + ef) * r
        positive = x2 >= 0.0
        g = tl.where(positive, x2 + 0.5, s)
        slope = tl.where(positive, 1.0, s * (1.0 - s))
        if RECURRENCE == "minlstm":
            total = _reciprocal(2.0 + ei + ef, RAW)
            a = (1.0 + ei) * total
            w = (1.0 + ef) * total
            d = q * (previous - g) * a * w
            return a, d * ef * keep_f, -d * ei * keep_i, q * w * slope
        else:
            df = q * previous * keep_f * ef * keep_f
            di = q * g * keep_i * ei * keep_i
            return keep_f, df, di, q * keep_i * slope


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
def _wide(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_inputs(x, y, H, mask, RECURRENCE: tl.constexpr):
    """The preactivations of one step; a and b for "linear"."""
    x0 = _wide(x, mask)
    if RECURRENCE == "linear":
        x1 = _wide(y, mask)
        return x0, x1, x1
    elif RECURRENCE == "mingru":
        x1 = _wide(x + H, mask)
        return x0, x1, x1
    else:
        return x0, _wide(x + H, mask), _wide(x + 2 * H, mask)


@triton.jit
def _load_flow(x, o, H, mask, RECURRENCE: tl.constexpr):
    """What the decay of one step needs, and the gradient of its output."""
    x0 = _wide(x, mask)
    if RECURRENCE == "minlstm":
        return x0, _wide(x + H, mask), _wide(o, mask)
    else:
        return x0, x0, _wide(o, mask)


@triton.jit
def _clear(a, reset, t, HAS_RESET: tl.constexpr):
    """a, or 0 where the state is cleared before step t."""
    if HAS_RESET:
        return tl.where(tl.load(reset + t) != 0, 0.0, a)
    else:
        return a


@triton.jit
def summarize_kernel(
    reset_ptr, x_ptr, y_ptr, o_ptr, maps_ptr, T, H, chunk,
    RECURRENCE: tl.constexpr, FLOW: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """maps [2, B, N, H]: every chunk as h -> decay * h + state.

    FLOW: of the gradient flowing along the scan, G -> a * (o + G), instead of the state.
    """
    PARTS: tl.constexpr = 1 if RECURRENCE == "linear" else (2 if RECURRENCE == "mingru" else 3)
    STEP: tl.constexpr = -1 if REVERSE else 1
    row, n, chunks, start, rows, columns = _place(T, H, chunk, BLOCK)
    mask = columns < H
    first = row * T + start + (rows - 1 if REVERSE else 0)
    x = x_ptr + first * H * PARTS + columns
    y = y_ptr + first * H + columns
    o = o_ptr + first * H + columns
    reset = reset_ptr + first
    decay = tl.full((BLOCK,), 1.0, tl.float32)
    state = tl.zeros((BLOCK,), tl.float32)
    whole = rows // UNROLL * UNROLL
    for i in range(0, whole, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            at = u * STEP * H
            if FLOW:
                step = _load_flow(x + at * PARTS, o + at, H, mask, RECURRENCE)
            else:
                step = _load_inputs(x + at * PARTS, y + at, H, mask, RECURRENCE)
            loaded = loaded + (step,)
        for u in tl.static_range(UNROLL):
            x0, x1, x2 = loaded[u]
            if FLOW:
                a = _clear(_decay(x0, x1, RECURRENCE, RAW), reset, (i + u) * STEP, HAS_RESET)
                state = a * (x2 + state)
            else:
                a, b = _gates(x0, x1, x2, RECURRENCE, RAW)
                a = _clear(a, reset, (i + u) * STEP, HAS_RESET)
                state = a * state + b
            decay *= a
        x += UNROLL * STEP * H * PARTS
        y += UNROLL * STEP * H
        o += UNROLL * STEP * H
    for i in range(whole, rows):
        if FLOW:
            x0, x1, x2 = _load_flow(x, o, H, mask, RECURRENCE)
            a = _clear(_decay(x0, x1, RECURRENCE, RAW), reset, i * STEP, HAS_RESET)
            state = a * (x2 + state)
        else:
            x0, x1, x2 = _load_inputs(x, y, H, mask, RECURRENCE)
            a, b = _gates(x0, x1, x2, RECURRENCE, RAW)
            a = _clear(a, reset, i * STEP, HAS_RESET)
            state = a * state + b
        decay *= a
        x += STEP * H * PARTS
        y += STEP * H
        o += STEP * H
    batch = tl.num_programs(0) // tl.cdiv(H, BLOCK) // chunks
    out = maps_ptr + (row * chunks + n) * H + columns
    tl.store(out, decay, mask=mask)
    tl.store(out + batch.to(tl.int64) * chunks * H, state, mask=mask)


@triton.jit
def _entering(in_ptr, ends_ptr, row, n, chunks, H, columns, mask, REVERSE: tl.constexpr):
    """The state that enters chunk n: what its neighbour leaves, or what enters them all."""
    before = n + 1 if REVERSE else n - 1
    outermost = before == (chunks if REVERSE else -1)
    if outermost:
        state = tl.load(in_ptr + row * H + columns, mask=mask, other=0.0)
    else:
        state = tl.load(ends_ptr + (row * chunks + before) * H + columns, mask=mask, other=0.0)
    return state


@triton.jit
def forward_kernel(
    reset_ptr, x_ptr, y_ptr, in_ptr, ends_ptr, h_ptr, last_ptr, T, H, chunk,
    RECURRENCE: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h [B, T, H] of every step, and h_last [B, H]."""
    PARTS: tl.constexpr = 1 if RECURRENCE == "linear" else (2 if RECURRENCE == "mingru" else 3)
    STEP: tl.constexpr = -1 if REVERSE else 1
    row, n, chunks, start, rows, columns = _place(T, H, chunk, BLOCK)
    mask = columns < H
    first = row * T + start + (rows - 1 if REVERSE else 0)
    x = x_ptr + first * H * PARTS + columns
    y = y_ptr + first * H + columns
    h = h_ptr + first * H + columns
    reset = reset_ptr + first
    state = _entering(in_ptr, ends_ptr, row, n, chunks, H, columns, mask, REVERSE)
    whole = rows // UNROLL * UNROLL
    for i in range(0, whole, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            at = u * STEP * H
            loaded = loaded + (_load_inputs(x + at * PARTS, y + at, H, mask, RECURRENCE),)
        for u in tl.static_range(UNROLL):
            x0, x1, x2 = loaded[u]
            a, b = _gates(x0, x1, x2, RECURRENCE, RAW)
            state = _clear(a, reset, (i + u) * STEP, HAS_RESET) * state + b
            tl.store(h + u * STEP * H, state.to(h_ptr.dtype.element_ty), mask=mask)
        x += UNROLL * STEP * H * PARTS
        y += UNROLL * STEP * H
        h += UNROLL * STEP * H
    for i in range(whole, rows):
        x0, x1, x2 = _load_inputs(x, y, H, mask, RECURRENCE)
        a, b = _gates(x0, x1, x2, RECURRENCE, RAW)
        state = _clear(a, reset, i * STEP, HAS_RESET) * state + b
        tl.store(h, state.to(h_ptr.dtype.element_ty), mask=mask)
        x += STEP * H * PARTS
        y += STEP * H
        h += STEP * H
    if n == (0 if REVERSE else chunks - 1):
        tl.store(last_ptr + row * H + columns, state, mask=mask)


@triton.jit
def _load_all(x, o, h, H, mask, has_previous, RECURRENCE: tl.constexpr):
    """The preactivations of one step, the gradient of its output, and the output before it."""
    x0 = _wide(x, mask)
    if RECURRENCE == "linear":
        return x0, x0, x0, _wide(o, mask), _wide(h - H, has_previous)
    elif RECURRENCE == "mingru":
        x1 = _wide(x + H, mask)
        return x0, x1, x1, _wide(o, mask), _wide(h - H, has_previous)
    else:
        return (
            x0,
            _wide(x + H, mask),
            _wide(x + 2 * H, mask),
            _wide(o, mask),
            _wide(h - H, has_previous),
        )


@triton.jit
def _store_all(dx, dy, d0, d1, d2, H, mask, RECURRENCE: tl.constexpr):
    dtype = dx.dtype.element_ty
    tl.store(dx, d0.to(dtype), mask=mask)
    if RECURRENCE == "linear":
        tl.store(dy, d1.to(dtype), mask=mask)
    else:
        tl.store(dx + H, d1.to(dtype), mask=mask)
        if RECURRENCE != "mingru":
            tl.store(dx + 2 * H, d2.to(dtype), mask=mask)


@triton.jit
def backward_kernel(
    reset_ptr, x_ptr, h_ptr, o_ptr, in_ptr, ends_ptr, out_ptr, dx_ptr, dy_ptr, din_ptr, T, H, chunk,
    RECURRENCE: tl.constexpr, HAS_RESET: tl.constexpr,
    RAW: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs, and of the state that enters the first step. Runs right to left."""
    PARTS: tl.constexpr = 1 if RECURRENCE == "linear" else (2 if RECURRENCE == "mingru" else 3)
    row, n, chunks, start, rows, columns = _place(T, H, chunk, BLOCK)
    mask = columns < H
    last = row * T + start + rows - 1
    x = x_ptr + last * H * PARTS + columns
    dx = dx_ptr + last * H * PARTS + columns
    dy = dy_ptr + last * H + columns
    o = o_ptr + last * H + columns
    h = h_ptr + last * H + columns
    reset = reset_ptr + last
    flow = _entering(out_ptr, ends_ptr, row, n, chunks, H, columns, mask, True)
    before = tl.load(in_ptr + row * H + columns, mask=mask, other=0.0)
    # The sequence's first step has no output before it to load: it is always in the second loop.
    whole = (rows - (1 if n == 0 else 0)) // UNROLL * UNROLL
    for i in range(0, whole, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            at = u * H
            step = _load_all(x - at * PARTS, o - at, h - at, H, mask, mask, RECURRENCE)
            loaded = loaded + (step,)
        for u in tl.static_range(UNROLL):
            x0, x1, x2, gradient, previous = loaded[u]
            q = gradient + flow
            previous = _clear(previous, reset, -(i + u), HAS_RESET)
            a, d0, d1, d2 = _gates_backward(q, previous, x0, x1, x2, RECURRENCE, RAW)
            flow = _clear(a, reset, -(i + u), HAS_RESET) * q
            _store_all(dx - u * H * PARTS, dy - u * H, d0, d1, d2, H, mask, RECURRENCE)
        x -= UNROLL * H * PARTS
        dx -= UNROLL * H * PARTS
        dy -= UNROLL * H
        o -= UNROLL * H
        h -= UNROLL * H
    for i in range(whole, rows):
        opening = start + rows - 1 - i + columns * 0 == 0
        has_previous = mask & (start + rows - 1 - i + columns * 0 > 0)
        x0, x1, x2, gradient, previous = _load_all(x, o, h, H, mask, has_previous, RECURRENCE)
        q = gradient + flow
        previous = _clear(tl.where(opening, before, previous), reset, -i, HAS_RESET)
        a, d0, d1, d2 = _gates_backward(q, previous, x0, x1, x2, RECURRENCE, RAW)
        flow = _clear(a, reset, -i, HAS_RESET) * q
        _store_all(dx, dy, d0, d1, d2, H, mask, RECURRENCE)
        x -= H * PARTS
        dx -= H * PARTS
        dy -= H
        o -= H
        h -= H
    if n == 0:
        tl.store(din_ptr + row * H + columns, flow, mask=mask)
