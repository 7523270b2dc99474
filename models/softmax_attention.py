"""Softmax attention on one device: rotary positions, what is cached before, a sliding window.

Layout is [B, T, heads, d] throughout. Fewer key-value heads than query heads are shared among them
in order (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245). The products run in
torch's scaled_dot_product_attention, so no [T, T] matrix exists where its kernels avoid one.
"""

from contextlib import nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from models.attention_pieces import attend_pieces
from models.cache import DECODED_KEYS, Cache, for_gradients, longer, with_tokens
from models.segment import check_segment

_DECODED = 64  # tokens at a time, at most: a frame has three


class QKV(NamedTuple):
    """Queries [B, T, heads, d], keys and values [B, T, kv heads, d], not yet rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


def rotate(x: Tensor, first: int, base: float) -> Tensor:
    """x [B, T, heads, d] turned by the angles of positions first, first + 1, ...; d is even.

    Source: Su et al. 2021 (arXiv:2104.09864), with the halves of d as pairs, as Llama has it.
    """
    cos, sin = _angles(x.shape[1], first, x.shape[-1] // 2, base, x.device, x.dtype)
    left, right = x.chunk(2, dim=-1)  # products with fp32 angles are fp32
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=4)  # shared by all layers; a decoded token asks for an entry of its own
def _angles(
    count: int, first: int, half: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, d / 2], in fp32 or wider; made in fp64, or they blur at 1M positions.

    Out of sight of whoever records operators, as activation checkpointing does: a block that is run
    again may have to make what it found here at first.
    """
    unseen = nullcontext() if torch.compiler.is_compiling() else _disable_current_modes()
    with unseen, torch.inference_mode(False), torch.no_grad():
        positions = torch.arange(first, first + count, dtype=torch.float64, device=device)
        exponents = torch.arange(half, dtype=torch.float64, device=device) / half
        angles = (positions[:, None] * base**-exponents).unsqueeze(1)
        dtype = torch.promote_types(dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def attend(
    qkv: QKV,
    cache: Cache,
    reset: Tensor | None,
    rope_base: float,
    last: bool = False,
) -> tuple[Tensor, Cache | None]:
    """Causal attention of a segment to itself and to what is cached before it.

    reset [B, T] marks documents, between which nothing is seen. Returns [B, T, heads, d] and the
    cache with this segment in it; with `last` none.
    """
    check_segment(qkv.q, reset)
    past, v = int(cache.length), qkv.v
    q, k = rotate(qkv.q, past, rope_base), rotate(qkv.k, past, rope_base)
    # not where gradients are only off for now: a streamed sequence runs each segment twice, and
    # both runs must leave the same pieces
    decoding = past and q.shape[1] <= _DECODED and reset is None
    decoding = decoding and torch.is_inference_mode_enabled()
    if decoding and q.shape[1] == 1:
        cache = with_tokens(cache, k, v)
        return _attend_one(q, cache), None if last else cache
    if torch.is_grad_enabled():
        cache = for_gradients(cache)
    y = _attend_after(q, k, v, cache, reset) if past else _attend_documents(q, k, v, reset)
    if last:
        return y, None
    return y, with_tokens(cache, k, v) if decoding else longer(cache, k, v, reset)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None) -> Tensor:
    """Causal attention within each document, one call a document: no mask, no wasted product."""
    batch, steps = q.shape[:2]
    starts = [] if reset is None else reset[:, 1:].nonzero().tolist()
    if not starts:
        return _attention(q, k, v, is_causal=True)
    rows = []
    for row in range(batch):
        edges = [0, *(at + 1 for where, at in starts if where == row), steps]
        lengths = [stop - start for start, stop in pairwise(edges)]
        parts = zip(*(x[row : row + 1].split(lengths, dim=1) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([_attention(*part, is_causal=True) for part in parts], dim=1))
    return torch.cat(rows)


def _attend_one(q: Tensor, cache: Cache) -> Tensor:
    """One query [B, 1, heads, d] against the cache, a single piece, that it is the last of.

    Plain products that read every key once: torch's kernel takes 4 to 9 times as long for one query
    in bf16 on a CPU. Keys are taken in multiples of 256, because a product of a size that was not
    seen before is prepared anew there, for longer than it takes.
    """
    keys, values = cache.pieces
    total, capacity = int(cache.length), keys.shape[2]
    span = min(capacity, -(-total // DECODED_KEYS) * DECODED_KEYS)
    keys, values = keys[:, :, :span], values[:, :, :span]
    grouped = q[:, 0].unflatten(1, (keys.shape[1], -1))  # [B, kv heads, queries of each, d]
    scores = keys @ (grouped * q.shape[-1] ** -0.5).transpose(2, 3)
    scores = scores.transpose(2, 3).contiguous()  # [B, kv heads, queries of each, span]
    place = torch.arange(span, device=q.device)
    hidden = place >= total
    if not cache.all_seen:
        first = (total - cache.seen).to(q.device)
        hidden = hidden | (place < first[:, None])[:, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(q.dtype) @ values).flatten(1, 2).unsqueeze(1)


def _attend_after(q: Tensor, k: Tensor, v: Tensor, cache: Cache, reset: Tensor | None) -> Tensor:
    """A segment's q, k, v [B, T, ...] behind what is cached.

    What is visible of that ends where the segment begins, so every document is a call of its own.
    """
    if reset is None and cache.all_seen:
        return attend_pieces(q, k, v, cache.keys, cache.values)
    rows = []
    for row, seen in enumerate(cache.seen.tolist()):
        here = slice(row, row + 1)
        starts = [] if reset is None else reset[row].nonzero().flatten().tolist()
        ends = starts[0] if starts else q.shape[1]
        parts = []
        if ends:  # the document that goes on from before
            keys, values = (
                _last([x[here] for x in each], seen) for each in (cache.keys, cache.values)
            )
            own = q[here, :ends], k[here, :ends], v[here, :ends]
            parts.append(attend_pieces(*own, keys, values))
        if starts:
            later = q[here, ends:], k[here, ends:], v[here, ends:]
            parts.append(_attend_documents(*later, None if reset is None else reset[here, ends:]))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def _last(pieces: list[Tensor], tokens: int) -> list[Tensor]:
    """The last so many tokens of pieces [B, kv heads, n, d]."""
    kept: list[Tensor] = []
    for piece in reversed(pieces):
        if tokens > 0:
            kept.append(piece[:, :, max(0, piece.shape[2] - tokens) :])
        tokens -= piece.shape[2]
    return kept[::-1]


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, reset: Tensor | None, rope_base: float
) -> Tensor:
    """Attention of every token to itself and the W - 1 tokens before it; linear in T.

    q [B, T, heads, d]; k, v [B, W - 1 + T, kv heads, d], the halo first, none rotated; visible
    [B, W - 1] bool tells which of the halo is there at all; reset [B, T] marks documents.
    Queries go in blocks against the keys that any of a block may see, (C + W - 1) / W times the
    products that are needed. With resets the mask takes T * (C + W - 1) bytes.
    """
    check_segment(q, reset)
    batch, steps = q.shape[:2]
    halo = k.shape[1] - steps
    block = min(steps, max(16, (halo + 1) // 2))  # C
    blocks = -(-steps // block)
    span = block + halo  # keys that a block may see
    # Only relative positions count, so every shard may start from its own.
    q, k = rotate(q, halo, rope_base), rotate(k, 0, rope_base)
    lost = None
    if reset is not None:
        k, v, lost = _without_infinities(q, k, v, reset)
    padding = (0, 0, 0, 0, 0, blocks * block - steps)
    q = F.pad(q, padding).unflatten(1, (blocks, block))
    k, v = (F.pad(x, padding).unfold(1, span, block).movedim(-1, 2) for x in (k, v))

    row = torch.arange(block, device=q.device)[:, None]
    key = torch.arange(span, device=q.device)
    band = (row <= key) & (key <= row + halo)  # [C, C + W - 1]
    document = torch.zeros_like(visible[:, :1], dtype=torch.int64).expand(-1, steps)
    document = document if reset is None else reset.cumsum(1)
    document = F.pad(document, (0, blocks * block - steps), value=-2)
    seen = torch.cat([torch.where(visible, 0, -1), document], dim=1).unfold(1, span, block)
    # Without resets only the first blocks, which see the halo, need more than the band.
    special = blocks if reset is not None else min(blocks, -(-halo // block))
    same = document.unflatten(1, (blocks, block))[:, :special, :, None]
    mask = (band & (same == seen[:, :special, None])).flatten(0, 1).unsqueeze(1)
    parts = [slice(0, special), slice(special, blocks)]
    pieces = []
    for part, allowed in zip(parts, (mask, band), strict=True):
        if part.stop > part.start:
            queries, keys, values = (x[:, part].flatten(0, 1) for x in (q, k, v))
            y = _attention(queries, keys, values, attn_mask=allowed)
            pieces.append(y.unflatten(0, (batch, part.stop - part.start)))
    y = torch.cat(pieces, dim=1).flatten(1, 2)[:, :steps]
    return y if lost is None else y.masked_fill(lost, float("nan"))


def _without_infinities(
    q: Tensor, k: Tensor, v: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v with zeros for keys that are not finite, and the queries that see one of these.

    A weight of zero lets infinity through, so it must not be there for the documents after it;
    those that do see it [B, T, heads, 1] have no result.
    """
    halo = k.shape[1] - q.shape[1]
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))  # [B, W - 1 + T, kv heads]
    before = F.pad(bad.cumsum(1), (0, 0, 1, 0))  # how many lie before each key
    step = torch.arange(q.shape[1], device=q.device)
    begun = torch.where(reset != 0, step + halo, 0).cummax(1).values  # its document, among the keys
    first = torch.maximum(begun, step)[:, :, None].expand(-1, -1, bad.shape[2])
    seen = before[:, halo + 1 :] - before.gather(1, first)
    lost = (seen > 0).repeat_interleave(q.shape[2] // bad.shape[2], dim=2).unsqueeze(-1)
    hidden = bad.unsqueeze(-1)
    return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0), lost


def _attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """torch's kernel, in our layout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=shared, **how)
    return y.transpose(1, 2)
