"""Full attention over shards by all-to-all: every rank sees the whole sequence for its own heads.

Source: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509). README.md beside this file says
why DeepSpeed's own layer is not the one used.
"""

from typing import Any

import torch
from torch import Tensor

from models.mixer import Carry
from models.once import once
from models.softmax_attention import QKV, Cache, attend
from trainer.parallel.sequence_group import SequenceGroup


def ulysses_attend(
    qkv: QKV,
    cache: Cache,
    reset: Tensor | None,
    rope_base: float,
    last: bool,
    group: SequenceGroup,
) -> tuple[Tensor, Carry]:
    """`models.softmax_attention.attend` of a sequence whose shards lie on the ranks of `group`.

    Queries, keys, values and reset [B, T] are this rank's shard; the cache is the same on every
    rank, entering and leaving, as are its gradients. Sends
    (P - 1) / P * T * (2 heads + 2 kv heads) * d numbers, kv heads counted as at least P: with fewer
    than that, each goes to every rank that has a head which reads it.
    Raises ValueError where the ranks do not divide the heads.
    """
    q, k, v = qkv
    ranks, heads, kv_heads = group.size, q.shape[2], k.shape[2]
    if heads % ranks:
        raise ValueError(
            f"model.heads {heads} cannot be dealt to parallel.sp {ranks} ranks: use a multiple of "
            f"{ranks} heads, or an sp that divides them"
        )
    copies = _copies(heads, kv_heads, ranks)
    k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
    by_rank = [_split_heads(x, ranks) for x in (q, k, v)]
    parts = group.all_to_all(torch.cat(by_rank, dim=3))  # [P shards, B, T, heads / P, d]
    sizes = [x.shape[3] for x in by_rank]
    q, k, v = (x.movedim(0, 1).flatten(1, 2) for x in parts.split(sizes, dim=3))
    if reset is not None:
        reset = group.all_gather(reset).movedim(0, 1).flatten(1, 2)

    length = int(cache.length)
    keys, values = (
        _Own.apply(
            _split_heads(x[:, :, :length].repeat_interleave(copies, dim=1), ranks, dim=1), group
        )
        for x in (cache.keys, cache.values)
    )
    own = Cache(keys, values, cache.visible, cache.length, cache.length.clone())
    y, leaving = attend(QKV(q, k, v), own, reset, rope_base, last)
    shards = y.unflatten(1, (ranks, -1)).movedim(1, 0)
    y = _join_heads(group.all_to_all(shards))
    if not leaving:
        return y, ()
    total = int(leaving[3])
    keys, values = (
        _join_heads(_Everyone.apply(x[:, :, :total].contiguous(), group), dim=1)[:, ::copies]
        for x in leaving[:2]
    )
    return y, Cache(keys, values, *leaving[2:4], leaving[3].clone())


def _copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key-value head is sent, so that ranks divide them all."""
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % ranks == 0)


def _split_heads(x: Tensor, ranks: int, dim: int = 2) -> Tensor:
    """[..., heads, ...] as [P, ..., heads / P, ...], for rank i what it holds."""
    return x.unflatten(dim, (ranks, -1)).movedim(dim, 0)


def _join_heads(x: Tensor, dim: int = 2) -> Tensor:
    """[P, ..., heads / P, ...] as [..., heads, ...], heads in dimension `dim`."""
    return x.movedim(0, dim).flatten(dim, dim + 1)


class _Own(torch.autograd.Function):
    """This rank's part of x [P, ...], equal on all ranks; every rank gets its whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return x[group.rank].contiguous()

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grad), None


class _Everyone(torch.autograd.Function):
    """The parts of all ranks as [P, ...]; their gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.group.rank], None
