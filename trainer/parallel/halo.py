"""exchange_halo: the steps just before a shard, from the neighbour that holds them."""

from typing import Any

import torch
from torch import Tensor

from models.once import once
from trainer.parallel.sequence_group import SequenceGroup


def exchange_halo(
    tail: Tensor, carry: Tensor, group: SequenceGroup, last: bool = False
) -> tuple[Tensor, Tensor]:
    """The halo of this shard, and the halo of the next segment.

    tail [B, w, D] is the end of this shard, carry [B, w, D] of the same dtype the end of the
    segment before, the same on every rank. Returns the left neighbour's tail (the carry on the
    first rank) and, on every rank, the last rank's tail; with `last` nothing follows and that
    comes empty, for which no rank waits. Differentiable in both; as for
    `exchange_carry`, gradients of what is the same on every rank are the same on every rank.
    """
    return _Halo.apply(tail, carry, group, last)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tail: Tensor, carry: Tensor, group: SequenceGroup, last: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.last = group, last
        halo = group.shift(tail, 1, carry)
        if last:
            return halo, tail.new_empty(tail[:, :0].shape)
        return halo, group.broadcast(tail, group.size - 1)

    @staticmethod
    @once
    def backward(
        ctx: Any, grad_halo: Tensor, grad_leaving: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        group: SequenceGroup = ctx.group
        if ctx.last:
            grad_leaving = torch.zeros_like(grad_halo)
        # the last rank's tail went to the next segment
        grad_tail = group.shift(grad_halo, -1, grad_leaving)
        grad_carry = group.broadcast(grad_halo, 0) if ctx.needs_input_grad[1] else None
        return grad_tail, grad_carry, None, None
