"""A streamed sequence: the exact gradient of a sequence of any length, a segment at a time.

There, without gradients, only the carries are kept. Back, each segment is run again from the carry
that entered it, and its backward takes the gradient of the carry that left it: what a segment
sends to an earlier one is that gradient and nothing else. Memory is one segment's, and the carries.
One forward more than unstreamed, but for the last `keep_segments`. Between two segments a
`Position` is all that a later start needs to go on.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.mixer import Carry
from trainer.data import MicroBatch
from trainer.layout import Plan


class Shelf:
    """Where what is small lies side by side, and stays until the way back has come to it.

    Among the large tensors of a segment, which come and go, small ones that stay would split what
    is free, each in another place: the heap would grow by a megabyte or more with every segment.
    No graph may hold what lies there while more is put beside it: it would be taken for changed.
    """

    LARGE = 8 << 20  # bytes: such a tensor lies by itself
    SLABS = (1 << 20, 64 << 20)  # bytes of the first, and the most; each is twice the one before

    def __init__(self) -> None:
        self._slab = self.SLABS[0]
        self._free: dict[torch.device, Tensor] = {}

    def put(self, x: Tensor) -> Tensor:
        """The same values, without what they are cut from."""
        if x.nbytes > self.LARGE:
            return _own(x)
        free = self._free.get(x.device)
        if free is None or len(free) < x.nbytes:
            free = torch.empty(max(self._slab, x.nbytes), dtype=torch.uint8, device=x.device)
            self._slab = min(2 * self._slab, self.SLABS[1])
        self._free[x.device] = free[-(-x.nbytes // 64) * 64 :]  # the next is aligned, too
        return free[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)

    def put_carry(self, carry: list[Carry], entered: list[Carry] | None) -> list[Carry]:
        """The same values; what passed through from the one that entered stays that object."""
        passed = {id(x) for layer in entered or [] for x in layer}
        return [tuple(x if id(x) in passed else self.put(x) for x in layer) for layer in carry]


@dataclass
class Position:
    """How far a sequence is: so many of `plan.reads` are done, and this is left of them."""

    reads: int = 0
    # the carries that enter the segments which are to be run (again), in their order
    entering: list[list[Carry] | None] = field(default_factory=lambda: [None])
    flow: list[list[Tensor | None]] | None = None  # the gradient of the carry that left the next
    losses: list[Tensor] = field(default_factory=list)
    _of_losses: Shelf = field(default_factory=Shelf)

    def answered(self, loss: Tensor) -> None:
        """A segment had this loss."""
        self.losses.append(self._of_losses.put(loss.detach()))


class Work(Protocol):
    """What a segment is put through. Every rank makes each call equally often."""

    def take(self, here: Position | None) -> MicroBatch:
        """That of the next of `plan.reads`; None where activations are held, which none can keep.

        The place to save the position, and to raise where the step is to be given up.
        """

    def run(
        self, segment: int, batch: MicroBatch, carry: list[Carry] | None, answer: bool
    ) -> tuple[Tensor, list[Carry]]:
        """Its loss, where there is to be an answer, and the carry that leaves it."""

    def backward(self, loss: Tensor, done: bool) -> None:
        """Add the gradient of `loss`, which is the last one where it is `done`."""


def stream(plan: Plan, work: Work, here: Position | None = None) -> Tensor:
    """The sum of the segments' losses, whose gradient was given to `work`, segment by segment.

    From the position of an earlier start, where there is one.
    """
    here = here or Position()
    _truncated(plan, work, here) if plan.truncate else _exact(plan, work, here)
    return torch.stack(here.losses).sum()


def _exact(plan: Plan, work: Work, here: Position) -> None:
    first_kept = plan.segments - plan.keep
    _there(first_kept, work, here)
    if here.reads == first_kept:
        kept = []
        for segment in range(first_kept, plan.segments):
            batch = work.take(here if segment == first_kept else None)
            leaves = _leaves(here.entering.pop())
            loss, leaving = work.run(segment, batch, leaves, True)
            here.entering.append(leaving)
            kept.append((loss, leaving, leaves))
        here.entering.pop()
        del loss, leaving, leaves
        while kept:
            _back(here, work, *kept.pop(), done=not (kept or here.entering))
        here.reads = plan.segments
    while here.entering:
        batch = work.take(here)
        leaves = _leaves(here.entering.pop())
        loss, leaving = work.run(len(here.entering), batch, leaves, True)
        _back(here, work, loss, leaving, leaves, done=not here.entering)
        del loss, leaving, leaves
        here.reads += 1


@torch.no_grad()
def _there(end: int, work: Work, here: Position) -> None:
    """To this segment, of which only the carry that enters it is left, as of all before it."""
    shelf = Shelf()
    while here.reads < end:
        batch = work.take(here)
        entered = here.entering[-1]
        leaving = work.run(here.reads, batch, entered, False)[1]
        here.entering.append(shelf.put_carry(leaving, entered))
        here.reads += 1


def _back(
    here: Position,
    work: Work,
    loss: Tensor,
    leaving: list[Carry],
    leaves: list[Carry] | None,
    *,
    done: bool,
) -> None:
    """The backward of a segment; what it sends to the one before is the position's flow."""
    _pass_on(leaving, here.flow, leaves)
    work.backward(loss + _met(leaving, here.flow), done)
    here.answered(loss)
    here.flow = None if leaves is None else [[_gradient(x) for x in carry] for carry in leaves]


def _truncated(plan: Plan, work: Work, here: Position) -> None:
    while here.reads < plan.segments:
        batch = work.take(here)
        loss, leaving = work.run(here.reads, batch, here.entering.pop(), True)
        work.backward(loss, here.reads == plan.segments - 1)
        here.answered(loss)
        here.entering.append(_apart(leaving))
        here.reads += 1


def _apart(carry: list[Carry]) -> list[Carry]:
    """The same values without what they are cut from: a view would keep a whole segment."""
    return [tuple(_own(x) for x in layer) for layer in carry]


def _own(x: Tensor) -> Tensor:
    if x.untyped_storage().nbytes() > 2 * x.nbytes:
        return x.detach().clone()
    # what passes through, as the pieces of a cache do, is one object for all segments
    return x.detach() if x.requires_grad else x


def _leaves(carry: list[Carry] | None) -> list[Carry] | None:
    """The same values, at which a gradient ends; masks and counts have none."""
    return None if carry is None else [tuple(_leaf(x) for x in layer) for layer in carry]


def _leaf(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(x.is_floating_point())
    if leaf.requires_grad and x.dtype.itemsize < 4:
        leaf.grad_dtype = torch.float32  # to which thousands of segments may add
    return leaf


def _gradient(x: Tensor) -> Tensor | None:
    return x.grad


def _pass_on(
    leaving: list[Carry], flow: list[list[Tensor | None]] | None, leaves: list[Carry] | None
) -> None:
    """What passes through a segment as it is has its gradient already; more is added to it there.

    It leaves the flow, which meets the rest.
    """
    if flow is None or leaves is None:
        return
    for layer, grads, entered in zip(leaving, flow, leaves, strict=True):
        same = {id(x): x for x in entered}
        for index, (x, grad) in enumerate(zip(layer, grads, strict=True)):
            if grad is not None and (leaf := same.pop(id(x), None)) is not None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                leaf.grad, grads[index] = grad.to(wide), None


def _met(leaving: list[Carry], flow: list[list[Tensor | None]] | None) -> Any:
    """<carry, gradient of the carry>: what passes that gradient on, when it is back-propagated."""
    if flow is None:
        return 0.0
    met = []
    for layer, grads in zip(leaving, flow, strict=True):
        for x, grad in zip(layer, grads, strict=True):
            if grad is not None and x.requires_grad:
                wide = torch.promote_types(x.dtype, torch.float32)
                met.append((x.to(wide) * grad.to(wide)).sum())
    return sum(met)
