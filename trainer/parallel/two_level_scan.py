"""The two-level scan: reduce this shard, exchange one small carry, scan from the right start."""

from typing import Any

import torch
from torch import Tensor

from models.scan import (
    RECURRENCES,
    Inputs,
    Recurrence,
    check_scan,
    choose_backend,
    operators,
)
from trainer.parallel.carry import exchange_carry, exchange_carry_backward
from trainer.parallel.sequence_group import SequenceGroup


def two_level_scan(
    recurrence: Recurrence,
    inputs: Inputs,
    h0: Tensor | None,
    group: SequenceGroup,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`models.scan.scan` over a sequence whose shards lie on the ranks of `group`, in order.

    inputs, reset and the result's h are this rank's shard, [B, T, ...]; h0 and the result's h_last
    [B, H] belong to the whole segment and are the same on every rank, as are their gradients.
    Every rank must call it. Raises ValueError as `scan` does.
    """
    h0 = check_scan(recurrence, inputs, h0, reset)
    return _TwoLevelScan.apply(
        recurrence.name, choose_backend(backend, inputs), group, reset, h0, *inputs
    )


class _TwoLevelScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recurrence: str,
        backend: str,
        group: SequenceGroup,
        reset: Tensor | None,
        h0: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        kind = RECURRENCES[recurrence]
        span = operators.summarize(backend, kind, inputs, reset)
        h_in, h_last, decays = exchange_carry(span, h0, group)
        h, _ = operators.forward(backend, kind, inputs, h_in, reset, span)
        ctx.save_for_backward(h, h_in, decays, reset, *inputs)
        ctx.recurrence, ctx.backend, ctx.group = recurrence, backend, group
        return h, h_last

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_h_last: Tensor) -> tuple[Tensor | None, ...]:
        h, h_in, decays, reset, *inputs = ctx.saved_tensors
        kind = RECURRENCES[ctx.recurrence]
        span = operators.summarize_backward(ctx.backend, kind, inputs, grad_h, reset)
        grad_out, grad_h0 = exchange_carry_backward(span.state, decays, grad_h_last, ctx.group)
        grads, _ = operators.backward(
            ctx.backend, kind, inputs, h, h_in, grad_h, grad_out, reset, span
        )
        return None, None, None, None, grad_h0, *grads
