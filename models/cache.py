"""What full attention keeps of the tokens before a segment: a carry that grows.

In pieces, one a segment: on a CPU no segment copies what was there, and the gradient of each piece
is added up where it lies. In inference mode a few tokens at a time, as decoding has them, go into a
single piece with room.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys that a decoded token's products take at a time; room is made for as many, at least.
DECODED_KEYS = 256


class Cache(NamedTuple):
    """Keys, rotated, and values of the tokens before; counts are int64 on the CPU."""

    seen: Tensor  # [B]: so many of the last tokens belong to the document that goes on
    length: Tensor  # scalar: tokens before
    filled: Tensor  # scalar: how much of a piece with room any continuation has written
    # keys and values in turn, [B, kv heads, n, d], the oldest first; if there is but one of each,
    # it may have room behind its first `length` tokens, which all continuations of a text share
    pieces: tuple[Tensor, ...]

    @classmethod
    def empty(cls, batch_size: int) -> "Cache":
        """Of an empty history."""
        zero = torch.zeros((), dtype=torch.int64)
        return cls(torch.zeros(batch_size, dtype=torch.int64), zero, zero.clone(), ())

    @classmethod
    def of(cls, flat: tuple[Tensor, ...]) -> "Cache":
        """What `flat` gave. Raises ValueError for what it did not."""
        if len(flat) < 3 or len(flat) % 2 == 0:
            raise ValueError(
                f"the carry of attention has {len(flat)} tensors: one of `last=True`, or of "
                f"another mixer, cannot be gone on from"
            )
        return cls(flat[0], flat[1], flat[2], flat[3:])

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """As the tensors of a carry."""
        return self.seen, self.length, self.filled, *self.pieces

    @property
    def keys(self) -> list[Tensor]:
        """[B, kv heads, n, d] of each piece, without room."""
        return [self._without_room(x) for x in self.pieces[::2]]

    @property
    def values(self) -> list[Tensor]:
        return [self._without_room(x) for x in self.pieces[1::2]]

    def _without_room(self, x: Tensor) -> Tensor:
        length = int(self.length)
        return x[:, :, :length] if x.shape[2] > length else x

    @property
    def all_seen(self) -> bool:
        return bool((self.seen == self.length).all())


def for_gradients(cache: Cache) -> Cache:
    """The same, of whose pieces none is written to by a continuation, or made for inference."""
    if not any(x.is_inference() or x.shape[2] > int(cache.length) for x in cache.pieces):
        return cache
    pairs = zip(cache.keys, cache.values, strict=True)
    return cache._replace(pieces=tuple(x.clone() for pair in pairs for x in pair))


def longer(cache: Cache, k: Tensor, v: Tensor, reset: Tensor | None) -> Cache:
    """With a segment's k and v [B, T, kv heads, d] as a piece more; reset [B, T] hides."""
    steps = k.shape[1]
    own = (x.transpose(1, 2).contiguous() for x in (k, v))
    seen = cache.seen + steps
    if reset is not None:
        starts = reset.cpu() != 0
        since = starts.flip(1).int().argmax(1) + 1
        seen = torch.where(starts.any(1), since, seen)
    kept = (x for pair in zip(cache.keys, cache.values, strict=True) for x in pair)
    return Cache(seen, cache.length + steps, torch.zeros_like(cache.filled), (*kept, *own))


def with_tokens(cache: Cache, k: Tensor, v: Tensor) -> Cache:
    """With a few k and v [B, T, kv heads, d] in a single piece, in place where there is room."""
    past, steps = int(cache.length), k.shape[1]
    total = past + steps
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    filled = cache.filled
    roomy = len(cache.pieces) == 2 and int(filled) == past and total <= cache.pieces[0].shape[2]
    if roomy and cache.pieces[0].dtype == k.dtype:
        keys, values = cache.pieces  # behind which nobody else has written
        keys[:, :, past:total], values[:, :, past:total] = k, v
    else:
        # zeros: a product passes over some of the room, and over what is hidden; a weight of zero
        # would let infinity through
        room = k.new_zeros(*k.shape[:2], total // 4 + DECODED_KEYS, k.shape[3])
        keys, values = (
            torch.cat([*(x.to(new.dtype) for x in old), new, room], dim=2)
            for old, new in ((cache.keys, k), (cache.values, v))
        )
        if not cache.all_seen:
            there = torch.arange(past) >= past - cache.seen[:, None]
            there = F.pad(there, (0, keys.shape[2] - past), value=True)[:, None, :, None]
            keys, values = (x.masked_fill(~there.to(x.device), 0.0) for x in (keys, values))
        filled = torch.zeros_like(filled)
    filled.fill_(total)
    return Cache(cache.seen + steps, cache.length + steps, filled, (keys, values))
