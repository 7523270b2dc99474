"""The relay over shards: a recurrence that is no affine map, run by all ranks at once, and exact.

A GRU or an LSTM has no summary, but it forgets: two runs over the same inputs from different
states fall together. So every rank starts at once from a guess. Where the state that truly enters
turns out to be another, the rank runs again from its start, only until it meets the states it has
kept: from there on all of them are right. README.md beside this file has the cost.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.once import once
from models.relay import Cell, Piece, State, cut, entering
from models.segment import check_segment
from trainer.parallel.sequence_group import SequenceGroup

# Pieces are cut at multiples of so many steps of a shard, always at the same places: what a kernel
# rounds then depends on the state that enters a piece, and on nothing else.
PIECE_TOKENS = 256


@dataclass(frozen=True)
class RelayExchange:
    """Among which ranks, and how near two states are to pass for the same; 0: equal to the bit."""

    group: SequenceGroup
    tolerance: float = 0.0

    def relay(
        self, cell: Cell, u: Tensor, carry: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        """`models.relay.relay` of a sequence whose shards lie on the ranks.

        u [B, T, D] and reset [B, T] are this rank's shard; the carry is the same on every rank,
        entering and leaving, as are its gradients. Every rank must make the call.
        """
        check_segment(u, reset)
        pieces, state = cut(reset, u.shape[1], PIECE_TOKENS), entering(carry, u)
        run = _Run(cell, pieces, len(state))
        y, *last = _Relay.apply(self, run, u, *state, *cell.weights())
        return y, tuple(last)

    def settle(self, mine: "_Track", fixed: Tensor, first: int) -> list[Tensor]:
        """Rounds until what enters every rank is what its neighbour gives: what all then give.

        `fixed` enters the rank `first` from outside, which is at one end of the ranks; what a rank
        gives enters the next from there.
        """
        group, ranks = self.group, range(self.group.size)
        step = 1 if first == 0 else -1
        given: list[Tensor] = []
        used = [fixed if rank == first else torch.zeros_like(fixed) for rank in ranks]
        mine.run(used[group.rank])
        for number in range(1, group.size + 1):
            gathered = group.all_gather(mine.report())
            given = [each[: fixed.numel()].view(fixed.shape).to(fixed.dtype) for each in gathered]
            rerun, residual = gathered[:, fixed.numel() :].unbind(1)
            group.relays.add(number, int(rerun.max()), float(residual.max()))
            arriving = [fixed if rank == first else given[rank - step] for rank in ranks]
            off = [mine.distance(arriving[r], used[r]) for r in ranks]
            wrong = [not distance <= mine.tolerance for distance in off]
            passed = max((d for d, w in zip(off, wrong, strict=True) if not w), default=0.0)
            self.group.relays.add(number, 0, passed)
            # as far from `first` as rounds were made, all is right, or not a number
            if not any(wrong) or number == group.size:
                break
            used = [arriving[r] if wrong[r] else used[r] for r in ranks]
            mine.rerun_tokens = 0
            if wrong[group.rank]:
                mine.rerun(used[group.rank])
        return given


@dataclass(frozen=True)
class _Run:
    """A cell, and the pieces of this rank's steps."""

    cell: Cell
    pieces: list[Piece]
    states: int  # tensors of its state


class _Track:
    """What a rank has run of a relay, and what it gives on."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance  # of `distance`
        self.rerun_tokens, self.residual = 0, 0.0

    def run(self, arriving: Tensor) -> None:
        """All of it, from what arrives."""
        raise NotImplementedError

    def rerun(self, arriving: Tensor) -> None:
        """As much as changes, now that another one arrives."""
        raise NotImplementedError

    def distance(self, one: Tensor, other: Tensor) -> float:
        """How far from the one that arrives another is that was used."""
        raise NotImplementedError

    def given(self) -> Tensor:
        """What arrives at the next rank."""
        raise NotImplementedError

    def report(self) -> Tensor:
        """What all ranks are told, as one row."""
        given = self.given().flatten()
        wide = torch.promote_types(given.dtype, torch.float32)
        figures = torch.tensor([self.rerun_tokens, self.residual], dtype=wide)
        return torch.cat([given.to(wide), figures.to(given.device)])


class _States(_Track):
    """Forward: the states that enter the pieces, and the outputs."""

    def __init__(self, run: _Run, u: Tensor, tolerance: float) -> None:
        super().__init__(tolerance)
        self.of, self.u = run, u
        self.entered: list[State] = []  # one for each piece
        self.outputs: list[Tensor] = []
        self.left: State = ()

    def run(self, arriving: Tensor) -> None:
        state = tuple(arriving)
        for piece in self.of.pieces:
            state = piece.clear(state)
            self.entered.append(state)
            y, state = self.of.cell.run(piece.of(self.u), state)
            self.outputs.append(y)
        self.left = state

    def rerun(self, arriving: Tensor) -> None:
        state = tuple(arriving)
        for number, piece in enumerate(self.of.pieces):
            state = piece.clear(state)
            kept = self.entered[number]
            distance = self.distance(torch.stack(state), torch.stack(kept))
            if distance <= self.tolerance:
                self.residual = max(self.residual, distance)
                return
            self.entered[number] = state
            self.outputs[number], state = self.of.cell.run(piece.of(self.u), state)
            self.rerun_tokens += piece.end - piece.begin
        self.left = state

    def distance(self, one: Tensor, other: Tensor) -> float:
        return 0.0 if torch.equal(one, other) else _largest(one - other)

    def given(self) -> Tensor:
        return torch.stack(self.left)


class _Flow(_Track):
    """Backward: the gradients of inputs and weights, and the flow from right to left.

    The flow is linear in what arrives from the right. When another gradient arrives, the difference
    alone is carried on, until in every row it is below a rounding of the flow at the same place: as
    much is rounded there anyway, from rank to rank too, and grows as much. Where a row has no flow
    of its own, a rounding of a rounding of its largest flow anywhere in the shard ends it.
    """

    def __init__(self, run: _Run, u: Tensor, entered: list[State], grad_y: Tensor) -> None:
        wide = torch.promote_types(u.dtype, torch.float32)
        super().__init__(torch.finfo(wide).eps)
        self.of, self.u, self.entered, self.grad_y = run, u, entered, grad_y
        self.grad_u = torch.zeros_like(u)
        self.learning = [w for w in run.cell.weights() if w.requires_grad]
        self.grad_weights = [torch.zeros_like(w, dtype=wide) for w in self.learning]
        self.used, self.left = torch.empty(0), torch.empty(0)
        # by piece and row [pieces, B]: the most that has come into it from the right
        self.sizes = torch.zeros(len(run.pieces), u.shape[0], dtype=wide, device=u.device)

    def run(self, arriving: Tensor) -> None:
        flow = tuple(arriving)
        for number in reversed(range(len(self.of.pieces))):
            self.sizes[number] = _by_row(torch.stack(flow))
            flow = self._back(number, flow, self.of.pieces[number].of(self.grad_y))
        self.used, self.left = arriving, torch.stack(flow)

    def rerun(self, arriving: Tensor) -> None:
        flow = tuple(arriving - self.used)
        self.used = arriving
        largest = torch.maximum(self.sizes.amax(0), _by_row(arriving))
        for number in reversed(range(len(self.of.pieces))):
            size = _by_row(torch.stack(flow))
            here = torch.maximum(self.sizes[number], self.tolerance * largest)
            share = float(_share(size, here).max())
            if share <= self.tolerance:
                self.residual = max(self.residual, share)
                return
            self.sizes[number] += size
            piece = self.of.pieces[number]
            flow = self._back(number, flow, None)
            self.rerun_tokens += piece.end - piece.begin
        self.left = self.left + torch.stack(flow)

    def _back(self, number: int, flow: State, grad_y: Tensor | None) -> State:
        """Through a piece, which is run again for it; the flow on its left."""
        piece = self.of.pieces[number]
        with torch.enable_grad():
            u = piece.of(self.u).detach().requires_grad_()
            state = tuple(each.detach().requires_grad_() for each in self.entered[number])
            y, last = self.of.cell.run(u, state)
            results, grads = (last, flow) if grad_y is None else ((y, *last), (grad_y, *flow))
            leaves = [u, *state, *self.learning]
            found = torch.autograd.grad(results, leaves, grads, materialize_grads=True)
        piece.of(self.grad_u).add_(found[0])
        for total, grad in zip(self.grad_weights, found[1 + len(state) :], strict=True):
            total.add_(grad)
        return piece.clear(found[1 : 1 + len(state)])

    def distance(self, one: Tensor, other: Tensor) -> float:
        """As a share of what arrives, in the row where that is most."""
        return float(_share(_by_row(one - other), _by_row(one)).max())

    def given(self) -> Tensor:
        return self.left


class _Relay(torch.autograd.Function):
    """States of pieces are kept, and nothing else: a piece is run again for its backward."""

    @staticmethod
    def forward(
        ctx: Any, exchange: RelayExchange, run: _Run, u: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        states = _States(run, u, exchange.tolerance)
        given = exchange.settle(states, torch.stack(tensors[: run.states]), first=0)
        ctx.exchange, ctx.run = exchange, run
        kept = torch.stack([torch.stack(state) for state in states.entered])
        ctx.save_for_backward(u, kept, *tensors[run.states :])
        return torch.cat(states.outputs, dim=1), *given[-1]

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor, *grad_last: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        exchange: RelayExchange = ctx.exchange
        u, kept, *_ = ctx.saved_tensors  # the weights, to be told where one was changed meanwhile
        flow = _Flow(run, u, [tuple(state) for state in kept], grad_y)
        last = exchange.group.size - 1
        given = exchange.settle(flow, torch.stack(grad_last), first=last)
        found = iter(flow.grad_weights)
        weights = run.cell.weights()
        of_weights = [next(found).to(w.dtype) if w.requires_grad else None for w in weights]
        return None, None, flow.grad_u, *given[0], *of_weights


def _by_row(flow: Tensor) -> Tensor:
    """The largest of each row's numbers: [B] of [states, B, H]."""
    return flow.abs().amax(dim=(0, 2))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Of each row; 0 where there is no part, infinite or no number where either is."""
    return torch.where(part == 0, 0.0, part / whole)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
