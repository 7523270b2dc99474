"""A streamed sequence: the exact gradient of a sequence of any length, a segment at a time.

There, without gradients, only the carries are kept. Back, each segment is run again from the carry
that entered it, and its backward takes the gradient of the carry that left it: what a segment
sends to an earlier one is that gradient and nothing else. Memory is one segment's, and the carries.
One forward more than unstreamed, but for the last `keep_segments`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.mixer import Carry
from trainer.data import MicroBatch
from trainer.layout import Plan

# (segment, its micro-batch, entering carry, whether to answer) -> (loss, leaving carry)
Run = Callable[[int, MicroBatch, list[Carry] | None, bool], tuple[Tensor, list[Carry]]]


def stream(
    plan: Plan,
    take: Callable[[], MicroBatch],
    run: Run,
    backward: Callable[[Tensor, bool], None],
) -> Tensor:
    """The sum of the segments' losses, whose gradient was given to `backward`, segment by segment.

    `take` gives the micro-batch of the next of `plan.reads`; `backward(loss, done)` is told which
    is the last. Every rank calls each equally often.
    """
    return (
        _truncated(plan, take, run, backward)
        if plan.truncate
        else _exact(plan, take, run, backward)
    )


def _exact(
    plan: Plan,
    take: Callable[[], MicroBatch],
    run: Run,
    backward: Callable[[Tensor, bool], None],
) -> Tensor:
    entering: list[list[Carry] | None] = [None]  # of each segment so far
    first_kept = max(0, plan.segments - plan.keep)
    with torch.no_grad():
        for segment in range(first_kept):
            entering.append(run(segment, take(), entering[-1], False)[1])
    kept = []
    for segment in range(first_kept, plan.segments):
        leaves = _leaves(entering.pop())
        loss, leaving = run(segment, take(), leaves, True)
        kept.append((loss, leaving, leaves))
        entering.append(leaving)
    entering.pop()
    flow: list[list[Tensor | None]] | None = None  # the gradient of the carry that left
    losses = []
    for segment in reversed(range(plan.segments)):
        if kept:
            loss, leaving, leaves = kept.pop()
        else:
            leaves = _leaves(entering.pop())
            loss, leaving = run(segment, take(), leaves, True)
        losses.append(loss.detach())
        backward(loss + _met(leaving, flow), segment == 0)
        flow = None if leaves is None else [[_gradient(x) for x in carry] for carry in leaves]
        del loss, leaving, leaves
    return torch.stack(losses).sum()


def _truncated(
    plan: Plan,
    take: Callable[[], MicroBatch],
    run: Run,
    backward: Callable[[Tensor, bool], None],
) -> Tensor:
    carry: list[Carry] | None = None
    losses = []
    for segment in range(plan.segments):
        loss, leaving = run(segment, take(), carry, True)
        losses.append(loss.detach())
        backward(loss, segment == plan.segments - 1)
        carry = [tuple(x.detach() for x in layer) for layer in leaving]
    return torch.stack(losses).sum()


def _leaves(carry: list[Carry] | None) -> list[Carry] | None:
    """The same values, at which a gradient ends; masks and counts have none."""
    if carry is None:
        return None
    return [
        tuple(x.detach().requires_grad_(x.is_floating_point()) for x in layer) for layer in carry
    ]


def _gradient(x: Tensor) -> Tensor | None:
    return x.grad


def _met(leaving: list[Carry], flow: list[list[Tensor | None]] | None) -> Any:
    """<carry, gradient of the carry>: what passes that gradient on, when it is back-propagated."""
    if flow is None:
        return 0.0
    met = []
    for layer, grads in zip(leaving, flow, strict=True):
        for x, grad in zip(layer, grads, strict=True):
            if grad is not None and x.requires_grad:
                # a cache has room at its end
                there = grad[tuple(slice(size) for size in x.shape)]
                wide = torch.promote_types(x.dtype, torch.float32)
                met.append((x.to(wide) * there.to(wide)).sum())
    return sum(met)
