"""CarryExchange: what the spans of all shards make of the entering state, in one all_gather.

A shard is one affine map of the state. Every rank gathers all P maps and composes for itself those
before its own (the state entering its shard) and all of them (the state leaving the segment). The
entering and leaving states are the same on every rank, and so are their gradients: give every rank
the same gradient of h_last, and every rank gets the full gradient of h0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.scan import Span
from trainer.parallel.sequence_group import SequenceGroup


@dataclass(frozen=True)
class CarryExchange:
    """`models.scan.Exchange` among the ranks of a group."""

    group: SequenceGroup

    def enter(self, span: Span, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state entering this shard, the state leaving the segment, and all shards' decays.

        Sends a decay and a state, 2 * B * H numbers of fp64 where both are rows; states are
        [B, ...], the decays, which the backward wants, [P, B, ...].
        """
        spans = [span.unpack(packed) for packed in self.group.all_gather(span.pack())]
        h, h_in = h0, h0
        for rank, other in enumerate(spans):
            if rank == self.group.rank:
                h_in = h
            h = other.apply(h)
        decays = torch.stack([other.decay for other in spans])
        return h_in.to(h0.dtype), h.to(h0.dtype), decays

    def enter_backward(
        self, span: Span, decays: Tensor, grad_h_last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient entering this shard from the right, and the gradient of h0.

        The span's state is what this shard's own outputs send to its entering state. The gradient
        passes a span by the forward's own decay, so that only states are sent, half as much.
        """
        states = self.group.all_gather(span.pack_state())
        flow, grad_out = grad_h_last, grad_h_last
        for rank in reversed(range(self.group.size)):
            if rank == self.group.rank:
                grad_out = flow
            flow = span.with_state(states[rank], decays[rank]).apply(flow)
        return grad_out.to(grad_h_last.dtype), flow.to(grad_h_last.dtype)
