"""The contract of everything that moves information along a sequence, and the verbs it does it by.

A mixer is written once, from the verbs of `SequenceOps`. On one device `LocalOps` answers them;
across devices `trainer.parallel` hands the mixer its own answers. No mixer asks which it has.
"""

from pkgutil import resolve_name
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import Cache
from models.config import ModelConfig
from models.mixers import MIXERS
from models.relay import Cell, State, relay
from models.scan import Inputs, Recurrence, scan
from models.segment import check_segment
from models.softmax_attention import QKV, attend

Carry = tuple[Tensor, ...]


class SequenceOps(Protocol):
    """The verbs: how a mixer reaches other steps of the sequence."""

    def scan(
        self, recurrence: Recurrence, inputs: Inputs, carry: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """h [B, T, H] and the state [B, H] that leaves the segment, from the one that enters."""

    def relay(
        self, cell: Cell, u: Tensor, carry: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        """y [B, T, H] of a cell that is no affine map of its state, and the state that leaves."""

    def halo(
        self, x: Tensor, width: int, carry: Tensor, reset: Tensor | None, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] behind the `width` steps before it, [B, width + T, D], and the tail.

        carry and tail [B, width, D] are the steps before and at the end of the segment. Steps that
        a reset [B, T] hides from everything after it come as zeros. With `last` nothing follows
        the segment, and the tail comes empty.
        """

    def attend(
        self,
        qkv: QKV,
        cache: Cache,
        reset: Tensor | None,
        rope_base: float,
        last: bool,
    ) -> tuple[Tensor, Cache | None]:
        """Causal softmax attention [B, T, heads, d] over the cache and the segment so far.

        Queries, keys and values come without positions, which are known here alone. With `last`
        nothing is cached. Over ranks each one's cache has the heads that it attends with.
        """


class LocalOps:
    """The verbs on one device."""

    def scan(
        self, recurrence: Recurrence, inputs: Inputs, carry: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return scan(recurrence, inputs, carry, reset=reset)

    def relay(
        self, cell: Cell, u: Tensor, carry: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        return relay(cell, u, carry, reset)

    def halo(
        self, x: Tensor, width: int, carry: Tensor, reset: Tensor | None, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        check_segment(x, reset)
        check_halo(carry, width)
        extended = torch.cat([carry.to(x.dtype), x], dim=1)
        return extended, x[:, :0] if last else visible_tail(extended, width, reset)

    def attend(
        self,
        qkv: QKV,
        cache: Cache,
        reset: Tensor | None,
        rope_base: float,
        last: bool,
    ) -> tuple[Tensor, Cache | None]:
        return attend(qkv, cache, reset, rope_base, last)


def check_halo(carry: Tensor, width: int) -> None:
    """Raises ValueError where a carry [B, width, D] is none of the layer's."""
    if carry.shape[1] != width:
        raise ValueError(
            f"the carry has {carry.shape[1]} steps where the layer looks back {width}: a carry of "
            f"`last=True`, or of another model, cannot be gone on from"
        )


def visible_tail(x: Tensor, width: int, reset: Tensor | None) -> Tensor:
    """The last `width` steps of x [B, S, D], zeroed where a later reset hides them.

    reset [B, T] marks the last T steps of x; T and `width` may each be the larger.
    """
    tail = x[:, x.shape[1] - width :]
    if reset is None:
        return tail.clone()  # a view would keep all of x, for as long as the carry is kept
    starts = F.pad(reset, (max(0, width - reset.shape[1]), 0))[:, -width:]
    later = F.pad(starts[:, 1:], (0, 1)).flip(1).cumsum(1).flip(1)
    return tail.masked_fill((later > 0).unsqueeze(-1), 0.0)


class SequenceMixer(nn.Module):
    """A layer that mixes along time: x [B, T, D] -> y [B, T, D], and a carry.

    The carry is the state entering the next segment of the same sequence; an empty history is
    `init_carry`. `ops` answers the verbs and is replaced from outside to shard the sequence. A
    mixer draws its own initial values, so one made alone is ready for use; what it adds to the
    residual starts smaller by `ModelConfig.residual_scale`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: SequenceOps = LocalOps()

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        """reset [B, T] bool or uint8, set at a document's first token.

        `last` says that no segment follows: a carry that costs memory need not be made.
        """
        raise NotImplementedError

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        """The carry of an empty history."""
        raise NotImplementedError


def build_mixer(name: str, config: ModelConfig) -> SequenceMixer:
    """The mixer `name` of `MIXERS`."""
    return resolve_name(MIXERS[name].path)(config)
