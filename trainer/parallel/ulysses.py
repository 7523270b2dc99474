"""Full attention over shards by all-to-all: every rank sees the whole sequence for its own heads.

Source: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509). README.md beside this file says
why DeepSpeed's own layer is not the one used.
"""

import torch
from torch import Tensor

from models.cache import Cache
from models.softmax_attention import QKV, attend
from trainer.parallel.sequence_group import SequenceGroup


def ulysses_attend(
    qkv: QKV,
    cache: Cache,
    reset: Tensor | None,
    rope_base: float,
    last: bool,
    group: SequenceGroup,
) -> tuple[Tensor, Cache | None]:
    """`models.softmax_attention.attend` of a sequence whose shards lie on the ranks of `group`.

    Queries, keys, values and reset [B, T] are this rank's shard; the cache, entering and leaving,
    has the whole sequence for this rank's heads. Sends
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
    copies = head_copies(heads, kv_heads, ranks)
    k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
    by_rank = [_split_heads(x, ranks) for x in (q, k, v)]
    parts = group.all_to_all(torch.cat(by_rank, dim=3))  # [P shards, B, T, heads / P, d]
    sizes = [x.shape[3] for x in by_rank]
    q, k, v = (x.movedim(0, 1).flatten(1, 2) for x in parts.split(sizes, dim=3))
    if reset is not None:
        reset = group.all_gather(reset).movedim(0, 1).flatten(1, 2)

    y, leaving = attend(QKV(q, k, v), cache, reset, rope_base, last)
    shards = y.unflatten(1, (ranks, -1)).movedim(1, 0)
    return _join_heads(group.all_to_all(shards)), leaving


def head_copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key-value head is sent, so that ranks divide them all."""
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % ranks == 0)


def _split_heads(x: Tensor, ranks: int) -> Tensor:
    """[B, T, heads, d] as [P, B, T, heads / P, d], for rank i what it holds."""
    return x.unflatten(2, (ranks, -1)).movedim(2, 0)


def _join_heads(x: Tensor) -> Tensor:
    """[P, B, T, heads / P, d] as [B, T, heads, d]."""
    return x.movedim(0, 2).flatten(2, 3)
