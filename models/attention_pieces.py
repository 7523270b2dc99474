"""Causal attention of a segment behind pieces of keys and values, which a CPU does not copy.

Each piece is attended to by itself, and the parts are put together by their log-sum-exps; with
those of the whole, each part's backward is that of the whole. Source: blockwise attention as in
Ring Attention (Liu et al. 2023, arXiv:2310.01889), on the kernels of torch: operators of its own,
for torch has no public call that tells log-sum-exps on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.once import once

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_MASKED_ROWS = 512  # queries at a time where a kernel may want a mask: bounds it to so many rows


def attend_pieces(
    q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor]
) -> Tensor:
    """q [B, T, heads, d] over k, v [B, T, kv heads, d] causally, and over all that is before.

    keys and values are pieces [B, kv heads, n, d], the oldest first, one at least. Returns
    [B, T, heads, d].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type != "cpu":
        return _joined(q, [*keys, k], [*values, v]).transpose(1, 2)
    pieces = [x.to(q.dtype) for pair in zip(keys, values, strict=True) for x in pair]
    return _Pieces.apply(q, k.contiguous(), v.contiguous(), *pieces).transpose(1, 2)


def _joined(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """On a GPU, whose kernels know of queries that are the last ones; a copy of all pieces."""
    from torch.nn.attention.bias import causal_lower_right  # imports the compiler, 1.2 s

    k, v = (torch.cat([x.to(q.dtype) for x in each], dim=2) for each in (keys, values))
    past, parts = k.shape[2] - q.shape[2], []
    for begin in range(0, q.shape[2], _MASKED_ROWS):
        rows = slice(begin, min(q.shape[2], begin + _MASKED_ROWS))
        seen = past + rows.stop
        mask: Any = causal_lower_right(rows.stop - begin, seen)
        its = (q[:, :, rows], k[:, :, :seen], v[:, :, :seen])
        grouped = q.shape[1] != k.shape[1]
        parts.append(F.scaled_dot_product_attention(*its, attn_mask=mask, enable_gqa=grouped))
    return torch.cat(parts, dim=2)


class _Pieces(torch.autograd.Function):
    """q [B, heads, T, d], its own k and v, then keys and values of the pieces in turn."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, *parts: Tensor) -> Tensor:
        groups = q.shape[1] // parts[0].shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        y, total = _KERNEL(q, *_expanded(parts[:2], groups), 0.0, True)
        y = y.to(wide)
        for at in range(2, len(parts), 2):
            part, its = _KERNEL(q, *_expanded(parts[at : at + 2], groups), 0.0, False)
            both = torch.logaddexp(total, its)
            y *= (total - both).exp().unsqueeze(-1)
            y += part * (its - both).exp().unsqueeze(-1)
            total = both
        y = y.to(q.dtype)
        ctx.save_for_backward(q, y, total, *parts)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, y, total, *parts = ctx.saved_tensors
        groups = q.shape[1] // parts[0].shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        of_q = torch.zeros_like(q, dtype=wide)
        grads: list[Tensor] = []
        for at in range(0, len(parts), 2):
            k, v = _expanded(parts[at : at + 2], groups)
            its, *of_kv = _BACKWARD(grad, q, k, v, y, total, 0.0, at == 0)
            of_q += its
            grads += (x.unflatten(1, (-1, groups)).sum(2) if groups > 1 else x for x in of_kv)
        return of_q.to(q.dtype), *grads


def _expanded(pair: Any, groups: int) -> list[Tensor]:
    """Keys and values with a head for each of the queries'."""
    return [x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in pair]
