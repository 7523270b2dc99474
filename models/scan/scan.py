"""The scan of any recurrence, on one device or many: the one autograd function, and what it needs.

Each scan returns (y [B, T, ...] in the inputs' dtype, h_last [B, ...] in fp32, fp64 for fp64
inputs) and is differentiable in every input and in h0, from y and from h_last.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from models.once import once
from models.scan import backend as backends
from models.scan.backend import Scanned, choose_backend
from models.scan.recurrence import KNOWN, Inputs, Problem, Recurrence
from models.scan.recurrences.linear import Complement, Linear
from models.scan.recurrences.mingru import MinGRU
from models.scan.recurrences.minlstm import MinLSTM
from models.scan.span import Span


class Exchange(Protocol):
    """What devices that hold one sequence between them tell each other; None on one device."""

    def enter(self, span: Span, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state entering this shard, the state leaving the sequence, all shards' decays."""

    def enter_backward(
        self, span: Span, decays: Tensor, grad_h_last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient entering this shard from the right, and the gradient of h0.

        `span` is the backward's, `decays` what `enter` gave.
        """


def linear_scan(
    a: Tensor | None,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    one_minus_a: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t.

    a, b [B, T, H] float, any sign; h0 [B, H] or None for zeros; reset [B, T] bool or uint8, set
    where the state is cleared before the step. For long memories (positive decays near one) give
    `one_minus_a` and None for a: rounded to fp32, an a of 1 - 1e-6 is 3 % off in what it lacks to
    one. Where that is wider than b (fp32 beside bf16), the scan is in its dtype and h in b's.
    Raises ValueError for shapes that do not fit.
    """
    if (a is None) == (one_minus_a is None):
        raise ValueError("linear_scan takes either a or one_minus_a: give one of them")
    decay, recurrence = (a, Linear()) if a is not None else (one_minus_a, Complement())
    assert decay is not None
    for given in (decay, b):  # what is not float would be rounded to it, or h to what it is
        if not given.is_floating_point():
            raise ValueError(f"linear scan inputs must be float, got {given.dtype}")
    wide = torch.promote_types(decay.dtype, b.dtype)
    inputs = decay.to(wide), b.to(wide)
    h, h_last = scan(recurrence, inputs, h0, reset=reset, backend=backend)
    return h.to(b.dtype), h_last


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
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """Run any recurrence. See `linear_scan` for shapes and errors.

    With an exchange the sequence lies on several devices: inputs, reset and y are this one's shard,
    h0 and h_last belong to the whole and are the same on every device, as are their gradients, and
    every device must make the call.
    """
    problem = Problem(recurrence, inputs, reset)
    h0 = problem.entering(h0)
    chosen = choose_backend(backend, recurrence, inputs[0].device.type, inputs[0].dtype)
    method = _Method(recurrence.name, chosen, exchange)
    return _Scan.apply(method, reset, h0, *inputs)


@dataclass(frozen=True)
class _Method:
    """How a scan is done: by names, which the compiler can keep."""

    recurrence: str
    backend: str
    exchange: Exchange | None

    def problem(self, inputs: Inputs, reset: Tensor | None) -> Problem:
        return Problem(KNOWN[self.recurrence], inputs, reset)


class _Scan(torch.autograd.Function):
    """Reduce, exchange, scan; without an exchange it is the scan of one device.

    Nothing O(T) crosses the wire and no pass over the data corrects anything; the backward is the
    mirror image (README.md beside this file).
    """

    @staticmethod
    def forward(
        ctx: Any, method: _Method, reset: Tensor | None, h0: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        problem = method.problem(inputs, reset)
        if method.exchange is None:
            scanned, h_in, decays = backends.forward(method.backend, problem, h0), h0, None
            h_last = scanned.h_last
        else:
            span = backends.summarize(method.backend, problem)
            h_in, h_last, decays = method.exchange.enter(span, h0)
            scanned = backends.forward(method.backend, problem, h_in, span)
        ctx.save_for_backward(reset, h_in, decays, scanned.y, *scanned.kept, *inputs)
        ctx.method, ctx.kept = method, len(scanned.kept)
        return scanned.y, h_last

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor, grad_h_last: Tensor) -> tuple[Tensor | None, ...]:
        reset, h_in, decays, y, *saved = ctx.saved_tensors
        method: _Method = ctx.method
        scanned = Scanned(y, h_in, tuple(saved[: ctx.kept]))
        problem = method.problem(tuple(saved[ctx.kept :]), reset)
        if method.exchange is None:
            grads, grad_h0 = backends.backward(
                method.backend, problem, scanned, (grad_y, grad_h_last)
            )
        else:
            span = backends.summarize_backward(method.backend, problem, grad_y)
            grad_out, grad_h0 = method.exchange.enter_backward(span, decays, grad_h_last)
            grads, _ = backends.backward(method.backend, problem, scanned, (grad_y, grad_out), span)
        return None, None, grad_h0, *grads
