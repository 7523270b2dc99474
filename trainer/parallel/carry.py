"""exchange_carry: what the spans of all shards make of the entering state, in one all_gather.

A shard is the affine map h -> decay * h + state. Every rank gathers all P maps and composes for
itself those before its own (the state entering its shard) and all of them (the state leaving the
segment). The entering and leaving states are the same on every rank, and so are their gradients:
give every rank the same gradient of h_last, and every rank gets the full gradient of h0.
"""

import torch
from torch import Tensor

from models.scan import Span
from trainer.parallel.sequence_group import SequenceGroup


def exchange_carry(span: Span, h0: Tensor, group: SequenceGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The state entering this shard, the state leaving the segment, and all shards' decays.

    span.decay, span.state, h0 [B, H] in the state's dtype. Returns h_in [B, H], h_last [B, H] and
    decays [P, B, H], which the backward wants. Sends 2 * B * H numbers.
    """
    decays, states = group.all_gather(torch.stack([span.decay, span.state])).unbind(1)
    h, h_in = h0, h0
    for rank in range(group.size):
        if rank == group.rank:
            h_in = h
        h = torch.addcmul(states[rank], decays[rank], h)
    return h_in, h, decays


def exchange_carry_backward(
    grad_local: Tensor, decays: Tensor, grad_h_last: Tensor, group: SequenceGroup
) -> tuple[Tensor, Tensor]:
    """The gradient entering this shard from the right, and the gradient of h0.

    grad_local [B, H] is what this shard's own outputs send to its entering state; over a span the
    gradient is the map G -> decay * G + grad_local with the forward's own decay, so only B * H
    numbers are sent. decays [P, B, H], grad_h_last [B, H].
    """
    states = group.all_gather(grad_local)
    flow, grad_out = grad_h_last, grad_h_last
    for rank in reversed(range(group.size)):
        if rank == group.rank:
            grad_out = flow
        flow = torch.addcmul(states[rank], decays[rank], flow)
    return grad_out, flow
