"""The GPU backend: reduce-then-scan with a recurrence's gates fused, in Triton.

Time is cut into chunks, and each phase runs over all of them at once:

    aggregate   every chunk's map h -> decay * h + state     reads what the gates need
    carry       the state entering each chunk                the same kernels, on the maps
    output      every chunk from its entering state          reads all inputs, writes all outputs

Where there are channels enough to fill the device, one chunk spans all steps and only the output
phase runs: the fewest bytes there can be. Runs on CUDA, or on a CPU in Triton's interpreter
(TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

import os
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from models.scan import triton_states
from models.scan.backend import Grads, Scanned
from models.scan.kernels import loops
from models.scan.kernels.gates import TritonGates
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.recurrences.linear import Linear
from models.scan.span import Span

BLOCK = 128  # channels of a program: four to a lane, 8 bytes of bf16
CHUNKS = (512, 256, 128, 64)  # steps of a chunk: the longest that keeps the device busy
BUSY_PROGRAMS = 16384  # four waves of one-warp programs on 132 processors
SERIAL_CHANNELS = 32768  # B * H from which one chunk spans all steps
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

asks_autograd = False


def fault(recurrence: Recurrence, device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run it here. To import this module takes Triton."""
    runs = device == "cuda" or (device == "cpu" and INTERPRETED)
    if not runs or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is not made for {dtype} on {device}"
    if recurrence.triton_states:
        return None
    if recurrence.triton_gates is None:
        return f"{recurrence.name} has no gates in Triton"
    if unfit := recurrence.kernel_fault():
        return unfit
    gates = gates_of(recurrence)
    if (gates.values, gates.separate) != (
        recurrence.tensors * recurrence.parts,
        recurrence.tensors > 1,
    ):
        return f"{recurrence.name} has other values than its gates in Triton say"
    if gates.values > (2 if gates.separate else 3):
        return (
            f"{recurrence.name} has {gates.values} values of a channel in {recurrence.tensors} "
            f"inputs: the loops in Triton take three of one input, or one each of two"
        )
    return None


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """A span keeps its chunks' maps, [2, B, N, H]."""
    if problem.recurrence.triton_states:
        return triton_states.empty(problem)
    span = problem.new_span()
    count = _ceil(problem.steps, _chunk_steps(problem))
    maps = span.state.new_empty(2, problem.batch, count, problem.width)
    scanned = Scanned(problem.new_output(), problem.new_state())
    return Span(span.decay, span.state, (maps,)), scanned


def summarize(problem: Problem) -> Span:
    """Reads the inputs once; keeps every chunk's map."""
    if problem.recurrence.triton_states:
        return triton_states.summarize(problem)
    return _summarize(problem, None, reverse=False)


def forward(problem: Problem, h_in: Tensor, span: Span | None) -> Scanned:
    """Without a span it may run as one chunk."""
    if problem.recurrence.triton_states:
        return triton_states.forward(problem, h_in)
    return _forward(problem, h_in, span, reverse=False)


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """Reads the gradient and what the decay needs."""
    if problem.recurrence.triton_states:
        return triton_states.summarize_backward(problem, grad_y)
    return _summarize(problem, grad_y.contiguous(), reverse=True)


def backward(
    problem: Problem, scanned: Scanned, grads: Grads, span: Span | None
) -> tuple[Inputs, Tensor]:
    """The preactivations' gradient is one tensor, like the preactivations."""
    if problem.recurrence.triton_states:
        return triton_states.backward(problem, scanned, grads)
    grad_y, grad_out = (grad.contiguous() for grad in grads)
    if span is None and not _one_chunk(problem):
        span = summarize_backward(problem, grad_y)
    ends, chunk = _ends(problem, span, grad_out, reverse=True)
    inputs = tuple(x.contiguous() for x in problem.inputs)
    gradients = tuple(torch.empty_like(x) for x in inputs)
    grad_h_in = torch.empty_like(grad_out)
    _Launch(problem, chunk).run(
        loops.backward_kernel,
        *(inputs[0], inputs[-1], scanned.y.contiguous(), grad_y, scanned.h_last.contiguous()),
        *(ends, grad_out, gradients[0], gradients[-1], grad_h_in),
    )
    return gradients, grad_h_in


def _summarize(problem: Problem, grad_y: Tensor | None, reverse: bool) -> Span:
    """Of the states from left to right, or (with grad_y) of their gradient from right to left."""
    chunk = _chunk_steps(problem)
    inputs = tuple(x.contiguous() for x in problem.inputs)
    count = _ceil(problem.steps, chunk)
    maps = inputs[0].new_empty(2, problem.batch, count, problem.width, dtype=torch.float64)
    _Launch(problem, chunk).run(
        loops.summarize_kernel,
        *(inputs[0], inputs[-1], inputs[0] if grad_y is None else grad_y, maps),
        FLOW=grad_y is not None,
        REVERSE=reverse,
    )
    if count == 1:
        return Span(maps[0, :, 0].clone(), maps[1, :, 0].clone(), (maps,))
    whole = _summarize(Problem(Linear(), (maps[0], maps[1])), None, reverse)
    return Span(whole.decay, whole.state, (maps,))


def _forward(problem: Problem, h_in: Tensor, span: Span | None, reverse: bool) -> Scanned:
    h_in = h_in.contiguous()
    if span is None and not _one_chunk(problem):
        span = _summarize(problem, None, reverse)
    ends, chunk = _ends(problem, span, h_in, reverse)
    inputs = tuple(x.contiguous() for x in problem.inputs)
    scanned = Scanned(problem.new_output(), torch.empty_like(h_in))
    _Launch(problem, chunk).run(
        loops.forward_kernel,
        *(inputs[0], inputs[-1], h_in, ends, scanned.y, scanned.h_last),
        REVERSE=reverse,
    )
    return scanned


def _ends(
    problem: Problem, span: Span | None, entering: Tensor, reverse: bool
) -> tuple[Tensor, int]:
    """The state that leaves every chunk [B, N, H] fp64, and the steps of a chunk."""
    if span is None or span.kept[0].shape[2] == 1:
        return entering, problem.steps  # one chunk: nobody reads its end
    decay, state = span.kept[0]
    maps = Problem(Linear(), (decay, state))
    ends = _forward(maps, entering.to(maps.inputs[0].dtype), None, reverse).y
    return ends, _chunk_steps(problem)


def _one_chunk(problem: Problem) -> bool:
    """Whether a device that has the whole sequence runs it as one chunk, without a carry."""
    return problem.batch * problem.width >= SERIAL_CHANNELS or problem.steps <= CHUNKS[-1]


def _chunk_steps(problem: Problem) -> int:
    columns = problem.batch * _ceil(problem.width, BLOCK)
    for chunk in CHUNKS:
        if columns * _ceil(problem.steps, chunk) >= BUSY_PROGRAMS:
            return chunk
    return CHUNKS[-1]


def gates_of(recurrence: Recurrence) -> TritonGates:
    """The recurrence's own gates in Triton."""
    assert recurrence.triton_gates is not None
    return resolve_name(recurrence.triton_gates)


def constants(kernel: Any, gates: TritonGates, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel is compiled with for these gates, and inputs of that dtype."""
    wide = dtype == torch.float64  # maps of chunks
    named = {
        "GATES": gates.gates,
        "DECAY": gates.decay,
        "BACKWARD": gates.backward,
        "VALUES": gates.values,
        "SEPARATE": gates.separate,
        "DECAY_READS": min(gates.decay_reads, gates.values),
        "BACKWARD_READS": min(gates.backward_reads, gates.values),
        # rows whose loads are in flight together: as many as fit the registers without a spill
        "UNROLL": (4 if kernel is loops.backward_kernel or wide else 8) // max(1, gates.values - 1),
        "WIDE": wide,
        "BLOCK": BLOCK,
    }
    return {name: value for name, value in named.items() if name in kernel.arg_names}


@dataclass(frozen=True)
class _Launch:
    """A kernel over all chunks of so many steps, of all rows and channels."""

    problem: Problem
    chunk: int

    def run(self, kernel: Any, *tensors: Tensor, **flags: bool) -> None:
        problem = self.problem
        batch, steps, width = problem.batch, problem.steps, problem.width
        reset = problem.reset
        programs = batch * _ceil(steps, self.chunk) * _ceil(width, BLOCK)
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](
                tensors[0] if reset is None else reset.to(torch.uint8).contiguous(),
                *tensors,
                steps,
                width,
                self.chunk,
                HAS_RESET=reset is not None,
                RAW=not INTERPRETED,
                num_warps=1,
                **flags,
                **constants(kernel, gates_of(problem.recurrence), problem.inputs[0].dtype),
            )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
