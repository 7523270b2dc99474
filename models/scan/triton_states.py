"""The GPU's loops over states [B, D, N]: a recurrence's own kernels, of kernels/states.py's kind.

As in triton.py time is cut into chunks: every chunk's map, what enters each, then every chunk. The
states that enter tiles of steps are kept; the backward makes those in between again, in a scratch
for as many programs as run at once.
"""

import os
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from models.scan.backend import Grads, Scanned
from models.scan.recurrence import Inputs, Problem
from models.scan.span import Span

NUMBERS = 256  # of the states of a program, real ones; half as many complex ones
TILE = 64  # steps
CHUNKS = 256  # at most, of multiples of TILE: a program composes them one after another
BUSY_PROGRAMS = 4096  # no more chunks than make so many of them: each has maps of its own in memory
PROGRAMS = 1024  # of a backward that run at once, at most: each has a scratch
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """Kept are the states that enter the tiles."""
    state, tiles = problem.new_state(), -(-problem.steps // TILE)
    kept = state.new_empty(problem.batch, tiles, *problem.state_shape[1:])
    return problem.new_span(), Scanned(problem.new_output(), state, (kept,))


def summarize(problem: Problem) -> Span:
    """Reads the inputs once."""
    return _Call(problem).span(None)


def forward(problem: Problem, h_in: Tensor) -> Scanned:
    """Chunk maps, what enters the chunks, the output."""
    call, scanned = _Call(problem), empty(problem)[1]
    ends, last, _ = call.carried(*call.maps(None), h_in, reverse=False)
    kernel = call.kernels.forward_kernel
    call.run(kernel, *call.inputs, ends, _numbers(scanned.kept[0]), scanned.y, TILE=TILE)
    return Scanned(scanned.y, _as_state(last, scanned.h_last), scanned.kept)


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """Reads the gradient, and what the decay is made of."""
    return _Call(problem).span(grad_y.contiguous())


def backward(problem: Problem, scanned: Scanned, grads: Grads) -> tuple[Inputs, Tensor]:
    """The flow's maps, what enters the chunks from the right, the gradients."""
    call, grad_y = _Call(problem), grads[0].contiguous()
    ends, left, _ = call.carried(*call.maps(grad_y), grads[1], reverse=True)
    found = call.gradients(scanned.kept[0], grad_y, ends)
    return found, _as_state(left, scanned.h_last)


@dataclass(frozen=True)
class _Call:
    """The kernels of a problem's recurrence, and how its steps are cut."""

    problem: Problem

    @property
    def kernels(self) -> Any:
        module = self.problem.recurrence.triton_states
        assert module is not None
        return resolve_name(module)

    @property
    def chunk(self) -> int:
        tiles = -(-self.problem.steps // TILE)
        wanted = BUSY_PROGRAMS // max(1, self.problem.batch * self.blocks)
        return TILE * -(-tiles // max(1, min(CHUNKS, wanted)))

    @property
    def chunks(self) -> int:
        return -(-self.problem.steps // self.chunk)

    @property
    def block(self) -> int:
        """Channels of a program, with all their states."""
        complexes = self.problem.recurrence.state_dtype(self.problem.inputs).is_complex
        return block_of(self.problem.state_shape[2], complexes)

    @property
    def blocks(self) -> int:
        return -(-self.problem.state_shape[1] // self.block)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """x, k, b, c and two weights; the first again in place of what a recurrence has not."""
        problem = self.problem
        count = len(problem.inputs) - problem.recurrence.weights
        stepped = [x.contiguous() for x in problem.inputs[:count]]
        weights = [_numbers(w.resolve_conj()).contiguous() for w in problem.inputs[count:]]
        wide = torch.float64 if problem.inputs[count].is_complex() else torch.float32
        return *stepped, *stepped[:1] * (4 - count), *(w.to(wide) for w in weights)

    def new(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uninitialised numbers of states."""
        numbers = (
            (2,) if self.problem.recurrence.state_dtype(self.problem.inputs).is_complex else ()
        )
        return self.problem.inputs[0].new_empty(*shape, *numbers, dtype=dtype)

    def maps(self, grad_y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every chunk's state from zero, or the gradient's flow, and what its decay is made of."""
        batch, width, states = self.problem.state_shape
        state = self.new(batch, self.chunks, width, states)
        log = state.new_empty(batch, self.chunks, width)
        out = self.problem.inputs[0] if grad_y is None else grad_y
        kernel = self.kernels.summarize_kernel
        self.run(kernel, *self.inputs, out, state, log, FLOW=grad_y is not None)
        return state, log

    def carried(
        self, state: Tensor, log: Tensor, entering: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What enters every chunk, what leaves the last one, and the decay of all."""
        shape = self.problem.state_shape
        ends, last, decay = torch.empty_like(state), self.new(*shape), self.new(*shape)
        wide = _numbers(entering.resolve_conj()).double().contiguous()
        rate = self.inputs[4]
        kernel, programs = self.kernels.carry_kernel, shape[0] * self.blocks
        tensors = (state, log, rate, wide, ends, last, decay)
        self.run(kernel, *tensors, programs=programs, REVERSE=reverse)
        return ends, last, decay

    def span(self, grad_y: Tensor | None) -> Span:
        """All steps as one map."""
        like = self.problem.new_span()
        zeros = torch.zeros_like(self.problem.new_state())
        maps = self.maps(grad_y)
        _, state, decay = self.carried(*maps, zeros, reverse=grad_y is not None)
        return Span(_as_state(decay, like.decay), _as_state(state, like.state), kind=like.kind)

    def gradients(self, kept: Tensor, grad_y: Tensor, ends: Tensor) -> Inputs:
        """Of all inputs."""
        problem, chunks = self.problem, self.chunks
        batch, _, states = problem.state_shape
        count = len(problem.inputs) - problem.recurrence.weights
        tasks = batch * chunks * self.blocks
        programs = min(tasks, 3 if INTERPRETED else PROGRAMS)
        padded = _power_of_two(states)
        scratch = self.new(programs, TILE + 1, self.block, padded, dtype=torch.float32)
        stepped = [torch.empty_like(x) for x in self.inputs[:count]]
        if count > 2:  # those that all channels read: a part for each block
            shape = (self.blocks, *problem.inputs[2].shape)
            stepped[2:] = [grad_y.new_empty(shape, dtype=torch.float32) for _ in stepped[2:]]
        weights = [w.new_empty((batch * chunks, *w.shape), dtype=w.dtype) for w in self.inputs[4:]]
        out = (*stepped, *stepped[:1] * (4 - count), *weights)
        kernel = self.kernels.backward_kernel
        tensors = (*self.inputs, _numbers(kept.contiguous()), grad_y, ends, scratch, *out)
        self.run(kernel, *tensors, programs=programs, tasks=tasks, TILE=TILE)
        found = [*stepped[:2], *(x.sum(0) for x in stepped[2:]), *(w.sum(0) for w in weights)]
        pairs = zip(found, problem.inputs, strict=True)
        return tuple(
            (torch.view_as_complex(g) if x.is_complex() else g).to(x.dtype) for g, x in pairs
        )

    def run(
        self, kernel: Any, *tensors: Tensor, programs: int | None = None, **constants: Any
    ) -> None:
        """Launch it, over all chunks of all rows and blocks of channels where nothing is said."""
        problem = self.problem
        batch, width, states = problem.state_shape
        if "HAS_RESET" in kernel.arg_names:
            constants["HAS_RESET"] = problem.reset is not None
            reset = tensors[0] if problem.reset is None else problem.reset.to(torch.uint8)
            tensors = (reset.contiguous(), *tensors)
        sizes = [problem.steps, width, states, self.chunk]
        if "tasks" in constants:
            sizes.append(constants.pop("tasks"))
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs or batch * self.chunks * self.blocks,)](
                *tensors,
                *sizes,
                BLOCK=self.block,
                NP=_power_of_two(states),
                num_warps=1,
                **constants,
            )


def block_of(states: int, complexes: bool) -> int:
    """Channels of a program: as many as fit its registers."""
    return max(1, NUMBERS // (2 if complexes else 1) // _power_of_two(states))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _numbers(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _as_state(numbers: Tensor, like: Tensor) -> Tensor:
    return (torch.view_as_complex(numbers) if like.is_complex() else numbers).to(like.dtype)
