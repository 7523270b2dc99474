"""Level one: the scan inside a device. See README.md beside this file for the mathematics.

Each scan returns (h [B, T, H] in the inputs' dtype, h_last [B, H] in fp32, fp64 for fp64 inputs)
and is differentiable in every input and in h0, from h and from h_last.
"""

from typing import Any

import torch
from torch import Tensor

from models.scan import operators, reference
from models.scan.operators import choose_backend
from models.scan.recurrence import (
    RECURRENCES,
    Inputs,
    Linear,
    MinGRU,
    MinLSTM,
    Recurrence,
    Span,
    state_dtype,
)

__all__ = [
    "RECURRENCES",
    "Inputs",
    "Linear",
    "MinGRU",
    "MinLSTM",
    "Recurrence",
    "Span",
    "check_scan",
    "choose_backend",
    "linear_scan",
    "mingru_scan",
    "minlstm_scan",
    "operators",
    "reference",
    "scan",
    "state_dtype",
]


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t.

    a, b [B, T, H] float of one dtype, any sign; h0 [B, H] or None for zeros; reset [B, T], 1 where
    the state is cleared before the step. Raises ValueError for shapes that do not fit.
    """
    return scan(Linear(), (a, b), h0, reset=reset, backend=backend)


def mingru_scan(
    kv: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) h_{t-1} + z_t g(v_t), z = sigmoid(k).

    kv [B, T, 2H]: the preactivations of the update gate, then of the candidate. Others as in
    `linear_scan`; h0 is a state, not passed through g. Source: Feng et al. 2024, section 3.1.
    """
    return scan(MinGRU(), (kv,), h0, reset=reset, backend=backend)


def minlstm_scan(
    fiv: Tensor,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = f_t h_{t-1} + i_t g(v_t), with f + i = 1 if `normalize`.

    fiv [B, T, 3H]: the preactivations of the forget gate, the input gate and the candidate. Others
    as in `linear_scan`. Source: Feng et al. 2024, section 3.2.
    """
    return scan(MinLSTM(normalize), (fiv,), h0, reset=reset, backend=backend)


def scan(
    recurrence: Recurrence,
    inputs: Inputs,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run any recurrence on one device. See `linear_scan` for shapes and errors."""
    h0 = check_scan(recurrence, inputs, h0, reset)
    if backend == "reference":
        return reference_scan(recurrence, inputs, h0, reset)
    return _Scan.apply(recurrence.name, choose_backend(backend, inputs), reset, h0, *inputs)


def reference_scan(
    recurrence: Recurrence, inputs: Inputs, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sequential loop under the public contract on dtypes."""
    wide = tuple(x.to(state_dtype(inputs)) for x in inputs)
    if isinstance(recurrence, MinGRU):
        a, b = reference.mingru_gates(*wide)
    elif isinstance(recurrence, MinLSTM):
        a, b = reference.minlstm_gates(wide[0], recurrence.normalize)
    else:
        a, b = wide
    h, h_last = reference.linear_scan(a, b, h0, reset)
    return h.to(inputs[0].dtype), h_last


def check_scan(
    recurrence: Recurrence, inputs: Inputs, h0: Tensor | None, reset: Tensor | None
) -> Tensor:
    """Check shapes and dtypes, and return the entering state [B, H], zeros where h0 is None."""
    for x in inputs:
        if x.dim() != 3 or x.shape != inputs[0].shape or x.dtype != inputs[0].dtype:
            shown = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
            raise ValueError(
                f"{recurrence.name} scan inputs must be [B, T, ...] alike, got {shown}"
            )
    if not inputs[0].is_floating_point():
        raise ValueError(f"{recurrence.name} scan inputs must be float, got {inputs[0].dtype}")
    parts = recurrence.parts
    if inputs[0].shape[-1] % parts:
        raise ValueError(
            f"{recurrence.name} scan needs a last dimension of {parts} * H, "
            f"got {inputs[0].shape[-1]}, which {parts} does not divide"
        )
    batch, steps, width = recurrence.state_shape(inputs)
    if steps == 0 or width == 0:
        raise ValueError(
            f"{recurrence.name} scan needs at least one step and one channel, "
            f"got T = {steps}, H = {width}"
        )
    devices = {x.device for x in (*inputs, h0, reset) if x is not None}
    if len(devices) > 1:
        shown = " and ".join(sorted(str(device) for device in devices))
        raise ValueError(f"{recurrence.name} scan needs all tensors on one device, got {shown}")
    if reset is not None and reset.shape != (batch, steps):
        raise ValueError(f"reset must be [B, T] = [{batch}, {steps}], got {tuple(reset.shape)}")
    dtype = state_dtype(inputs)
    if h0 is None:
        return inputs[0].new_zeros(batch, width, dtype=dtype)
    if h0.shape != (batch, width):
        raise ValueError(f"h0 must be [B, H] = [{batch}, {width}], got {tuple(h0.shape)}")
    return h0.to(dtype)


class _Scan(torch.autograd.Function):
    """The scan of one device as an autograd function, for any recurrence and backend."""

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: str,
        backend: str,
        reset: Tensor | None,
        h0: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h, h_last = operators.forward(backend, RECURRENCES[recurrence], inputs, h0, reset)
        ctx.save_for_backward(h, h0, reset, *inputs)
        ctx.recurrence, ctx.backend = recurrence, backend
        return h, h_last

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_h_last: Tensor) -> tuple[Tensor | None, ...]:
        h, h0, reset, *inputs = ctx.saved_tensors
        grads, grad_h0 = operators.backward(
            ctx.backend, RECURRENCES[ctx.recurrence], inputs, h, h0, grad_h, grad_h_last, reset
        )
        return None, None, None, grad_h0, *grads
