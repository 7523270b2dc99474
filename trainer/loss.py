"""What a model is to make small: cross-entropy of next tokens, or squared errors of actions.

The logits of no more than a tile of tokens are ever held.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.once import once
from trainer.data import MicroBatch


def summed_loss(batch: MicroBatch) -> Callable[..., Tensor]:
    """The loss (hidden, weight, labels, tile) of the kind of labels that a micro-batch has."""
    if batch.labels.is_floating_point():
        return summed_squared_error
    return summed_cross_entropy if batch.scored_tokens is None else scored_cross_entropy


def summed_squared_error(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Sum over all frames of the mean squared error of an action; a scalar in fp32 (fp64).

    hidden [B, T, D], weight [A, D] of the same dtype, labels [B, T, A] fp32. `tile` is of no use:
    actions are few numbers.
    """
    return _squared_errors(hidden, weight, labels).sum()


def _squared_errors(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # wide before tanh: in bf16 that is one, and flat, from 3.5 on
    acted = F.linear(hidden, weight).to(accumulator).tanh()
    return (acted - labels).square().mean(-1)


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Sum over all tokens of -log softmax(W x)[label], in nats; a scalar in fp32 (fp64 for fp64).

    hidden [B, T, D], weight [V, D] of the same dtype, labels [B, T] int64; `tile` tokens at a time,
    so memory is O(tile * V) whatever T. The gradient of a cross-entropy is known as soon as its
    logits are, so it is made in the forward and only scaled in the backward.
    Source: the fused linear cross-entropy of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
    """
    return _SummedCrossEntropy.apply(hidden, weight, labels, tile)


def scored_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """`summed_cross_entropy` of the tokens whose label is not negative."""
    scored = labels >= 0
    return summed_cross_entropy(hidden[scored][None], weight, labels[scored][None], tile)


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
    """Of every token: its loss in nats and whether its label is the likeliest, [2, B, T] fp32.

    For evaluation. Arguments as above; both are zero where a label is negative. Of frames, the
    squared error and zero.
    """
    if labels.is_floating_point():
        errors = _squared_errors(hidden, weight, labels).float()
        return torch.stack([errors, torch.zeros_like(errors)])
    scores = torch.zeros(2, labels.numel(), device=labels.device)
    counted = (labels.flatten() >= 0).nonzero().squeeze(1)  # of a million tokens it may be two
    for places in counted.split(tile):
        label = labels.flatten()[places]
        logits = F.linear(hidden.flatten(0, 1)[places], weight).float()
        scores[0, places] = F.cross_entropy(logits, label, reduction="none")
        scores[1, places] = (logits.argmax(dim=-1) == label).float()
    return scores.view(2, *labels.shape)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tile: int) -> Tensor:
        accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=accumulator, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=accumulator)
        rows = hidden.flatten(0, 1)
        for begin in range(0, rows.shape[0], tile):
            x, label = rows[begin : begin + tile], labels.flatten()[begin : begin + tile]
            log_p = F.log_softmax(F.linear(x, weight).to(accumulator), dim=-1)
            picked = log_p.gather(1, label.unsqueeze(1))
            total -= picked.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = log_p.exp_()
            grad_logits.scatter_add_(1, label.unsqueeze(1), -torch.ones_like(picked))
            grad_logits = grad_logits.to(x.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden.flatten(0, 1)[begin : begin + tile])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.dtype)
        if grad_hidden is not None:
            # a zero-dimensional fp32 factor: multiplied in fp32, rounded once
            grad_hidden = grad_hidden * grad
        return grad_hidden, grad_weight, None, None
