"""The CPU backend: kernels/scan.cpp around a recurrence's own gates in C++, built at first use.

Recurrences whose states are no rows bring a loop of their own (native_states.py).
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.scan import native_states
from models.scan.backend import Grads, Scanned
from models.scan.library import in_large_pages, library
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.span import Span

SOURCE = Path(__file__).parent / "kernels" / "scan.cpp"
# The numbers by which scan.cpp knows dtypes and kernels, and its limit on inputs.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD = range(4)
MOST_INPUTS = 4


class _Arguments(ctypes.Structure):
    """scan.cpp's struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "width")),
        *((name, ctypes.c_void_p * MOST_INPUTS) for name in ("x", "out")),
        *(
            (name, ctypes.c_void_p)
            for name in ("reset", "h", "grad_h", "state_in", "h_in", "state")
        ),
        *((name, ctypes.c_void_p) for name in ("span_decay", "span_state")),
        ("threads", ctypes.c_int32),
    ]


asks_autograd = False


def fault(recurrence: Recurrence, device: str, dtype: torch.dtype) -> str | None:
    """Why the library cannot run it on this machine; builds it if need be."""
    if device != "cpu" or dtype not in DTYPES:
        return f"it is not made for {dtype} on {device}"
    if recurrence.native_states:
        return native_states.fault(recurrence)
    if recurrence.native_gates is None:
        return f"{recurrence.name} has no gates in C++"
    if unfit := recurrence.kernel_fault():
        return unfit
    try:
        _library_of(recurrence)
    except OSError as error:  # no compiler, or no home for its cache
        return str(error)
    return None


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """Nothing of size T is kept."""
    if problem.recurrence.native_states:
        return native_states.empty(problem)
    return problem.new_span(), Scanned(problem.new_output(), problem.new_state())


def summarize(problem: Problem) -> Span:
    """Reads the inputs once at most, from their end."""
    if problem.recurrence.native_states:
        return native_states.summarize(problem)
    span = problem.new_span()
    _Call(problem).run(SUMMARIZE, span_decay=span.decay, span_state=span.state)
    return span


def forward(problem: Problem, h_in: Tensor, span: Span | None) -> Scanned:
    """In one pass; a span is not needed."""
    if problem.recurrence.native_states:
        return native_states.forward(problem, h_in)
    scanned = empty(problem)[1]
    in_large_pages(scanned.y)
    _Call(problem, out=(scanned.y,)).run(FORWARD, state_in=h_in, state=scanned.h_last)
    return scanned


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """Reads the gradient, and what the decay is made of."""
    if problem.recurrence.native_states:
        return native_states.summarize_backward(problem, grad_y)
    span = problem.new_span()
    spans = {"span_decay": span.decay, "span_state": span.state}
    _Call(problem).run(SUMMARIZE_BACKWARD, grad_h=grad_y, **spans)
    return span


def backward(
    problem: Problem, scanned: Scanned, grads: Grads, span: Span | None
) -> tuple[Inputs, Tensor]:
    """In one pass; a span is not needed."""
    if problem.recurrence.native_states:
        return native_states.backward(problem, scanned, grads)
    grad_y, grad_out = grads
    gradients = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem.inputs
    )
    for gradient in gradients:
        in_large_pages(gradient)
    grad_h_in = problem.new_state()
    _Call(problem, out=gradients).run(
        BACKWARD,
        h=scanned.y,
        grad_h=grad_y,
        state_in=grad_out,
        h_in=scanned.h_last,
        state=grad_h_in,
    )
    return gradients, grad_h_in


@dataclass(frozen=True)
class _Call:
    """A call of the library. Tensors it writes are new and contiguous; others are made so."""

    problem: Problem
    out: Inputs = ()

    def run(self, kernel: int, **tensors: Tensor) -> None:
        problem = self.problem
        if problem.reset is not None:
            tensors["reset"] = problem.reset.to(torch.uint8)
        inputs = [x.contiguous() for x in problem.inputs]  # alive until the call has ended
        alive = {name: x.contiguous() for name, x in tensors.items()}
        pointers = ctypes.c_void_p * MOST_INPUTS
        arguments = _Arguments(
            batch=problem.batch,
            steps=problem.steps,
            width=problem.width,
            x=pointers(*(x.data_ptr() for x in inputs)),
            out=pointers(*(x.data_ptr() for x in self.out)),
            threads=torch.get_num_threads(),
            **{name: x.data_ptr() for name, x in alive.items()},
        )
        library = _library_of(problem.recurrence)
        library.longhaul_scan(kernel, DTYPES[inputs[0].dtype], ctypes.byref(arguments))


def _library_of(recurrence: Recurrence) -> ctypes.CDLL:
    assert recurrence.native_gates is not None
    header, gates = recurrence.native_gates
    # what the gates say of their inputs is held to what the recurrence says
    defined = {"GATES": gates, "TENSORS_GIVEN": recurrence.tensors, "PARTS_GIVEN": recurrence.parts}
    options = tuple(f"-D{name}={value}" for name, value in defined.items())
    return library(SOURCE, options, header)
