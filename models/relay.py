"""A recurrence that is no affine map of its state: a cell, run piece after piece.

Such a recurrence has no summary. It is run where its state is known; across devices
trainer/parallel/relay.py guesses states and runs again what a guess had wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.scan.recurrence import usable
from models.segment import check_segment

State = tuple[Tensor, ...]  # each [B, H]

MOST_STEPS = 32_768  # of a call: cuDNN fails from 65,536 on (pytorch issue 133751)


class Cell(Protocol):
    """A recurrence with weights of its own, as torch.nn.GRU is one."""

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """y [B, T, H] of u [B, T, D], in its dtype, and the state after it, in fp32 or wider.

        What is computed is in the state's dtype: rounded to bf16 at every step, a state would lose
        what a memory of more than some hundred tokens adds to it.
        """

    def weights(self) -> list[Tensor]:
        """What `run` reads besides."""


@dataclass(frozen=True)
class Piece:
    """Steps [begin, end) without a reset but before the first; `cleared` [B] has those rows."""

    begin: int
    end: int
    cleared: Tensor | None = None

    def of(self, u: Tensor) -> Tensor:
        """Its steps of u [B, T, ...]."""
        return u[:, self.begin : self.end]

    def clear(self, state: State) -> State:
        """The state that enters, from the one before; or the gradient, on its way back."""
        if self.cleared is None:
            return state
        return tuple(each.masked_fill(self.cleared.unsqueeze(1), 0.0) for each in state)


def cut(reset: Tensor | None, steps: int, length: int) -> list[Piece]:
    """All steps in pieces of at most `length`, cut at its multiples and at resets [B, T]."""
    places = set(range(0, steps, length))
    if reset is not None:
        starts = reset.bool()
        places |= set(starts.any(0).nonzero().flatten().tolist())
    return list(_pieces(sorted(places), steps, reset))


def _pieces(places: list[int], steps: int, reset: Tensor | None) -> Iterator[Piece]:
    for begin, end in zip(places, [*places[1:], steps], strict=True):
        rows = None if reset is None else reset[:, begin].bool()
        yield Piece(begin, end, rows)


def entering(state: State, u: Tensor) -> State:
    """A carry as the cell takes it: fp32 whatever the inputs, fp64 for fp64."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    return tuple(usable(each).to(dtype) for each in state)


def relay(cell: Cell, u: Tensor, carry: State, reset: Tensor | None) -> tuple[Tensor, State]:
    """The cell over u [B, T, D] on one device, cleared before steps that reset [B, T] marks."""
    check_segment(u, reset)
    state, outputs = entering(carry, u), []
    for piece in cut(reset, u.shape[1], MOST_STEPS):
        y, state = cell.run(piece.of(u), piece.clear(state))
        outputs.append(y)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state
