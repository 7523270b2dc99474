"""The verbs across devices, and the one place where a model meets them."""

import torch
from torch import Tensor, nn

from models.cache import Cache
from models.mixer import SequenceMixer, check_halo, visible_tail
from models.relay import Cell, State
from models.scan import Inputs, Recurrence, scan
from models.segment import check_segment
from models.softmax_attention import QKV
from trainer.parallel.carry import CarryExchange
from trainer.parallel.halo import exchange_halo
from trainer.parallel.relay import RelayExchange
from trainer.parallel.sequence_group import SequenceGroup
from trainer.parallel.topology import Topology
from trainer.parallel.ulysses import ulysses_attend


class ShardedOps:
    """`models.mixer.SequenceOps` for a sequence whose shards lie on the ranks of a group."""

    def __init__(self, group: SequenceGroup, relay_tolerance: float = 0.0) -> None:
        self.group = group
        self.relays = RelayExchange(group, relay_tolerance)

    def scan(
        self, recurrence: Recurrence, inputs: Inputs, carry: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return scan(recurrence, inputs, carry, reset=reset, exchange=CarryExchange(self.group))

    def relay(
        self, cell: Cell, u: Tensor, carry: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        return self.relays.relay(cell, u, carry, reset)

    def halo(
        self, x: Tensor, width: int, carry: Tensor, reset: Tensor | None, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        if x.shape[1] < width:
            raise ValueError(
                f"a shard of {x.shape[1]} tokens is shorter than its halo of {width}: "
                f"use longer sequences or fewer SP ranks"
            )
        check_segment(x, reset)
        check_halo(carry, width)
        tail = visible_tail(x, width, reset)
        halo, leaving = exchange_halo(tail, carry.to(x.dtype), self.group, last)
        return torch.cat([halo, x], dim=1), leaving

    def attend(
        self,
        qkv: QKV,
        cache: Cache,
        reset: Tensor | None,
        rope_base: float,
        last: bool,
    ) -> tuple[Tensor, Cache | None]:
        return ulysses_attend(qkv, cache, reset, rope_base, last, self.group)


def parallelize(model: nn.Module, topology: Topology, relay_tolerance: float = 0.0) -> None:
    """Hand every mixer of `model` the ops of its SP group; call it before DeepSpeed wraps it.

    States within `relay_tolerance` of each other pass for the same where a GRU or LSTM is relayed;
    with 0 they must be equal to the bit.
    """
    if topology.sp_size == 1:
        return
    ops = ShardedOps(topology.sequence, relay_tolerance)
    for module in model.modules():
        if isinstance(module, SequenceMixer):
            module.ops = ops
