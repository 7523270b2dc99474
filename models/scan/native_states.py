"""The CPU's loops over states [B, D, N]: a C++ source of the recurrence on kernels/states.h."""

import ctypes

import torch
from torch import Tensor

from models.scan.backend import Grads, Scanned
from models.scan.library import in_large_pages, library
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.span import Span

# states.h knows dtypes, kernels and limits by these numbers.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD = range(4)
MOST_INPUTS, TILE = 8, 64
# channels of a task: they read what they share once. Sums over channels go by groups, so they are
# the same on any number of threads.
GROUP = 64


class _Arguments(ctypes.Structure):
    """states.h's struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "width", "states")),
        *((name, ctypes.c_int64) for name in ("groups", "group")),
        *((name, ctypes.c_void_p * MOST_INPUTS) for name in ("x", "out")),
        *((name, ctypes.c_void_p) for name in ("reset", "grad_y", "kept", "state_in", "state")),
        *((name, ctypes.c_void_p) for name in ("span_decay", "span_state")),
        ("threads", ctypes.c_int32),
    ]


def fault(recurrence: Recurrence) -> str | None:
    """Why its library cannot run on this machine; builds it if need be."""
    try:
        _library_of(recurrence)
    except OSError as error:  # no compiler, or no home for its cache
        return str(error)
    return None


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """Kept are the states that enter the tiles."""
    state, tiles = problem.new_state(), -(-problem.steps // TILE)
    kept = state.new_empty(problem.batch, tiles, *problem.state_shape[1:])
    return problem.new_span(), Scanned(problem.new_output(), state, (kept,))


def summarize(problem: Problem) -> Span:
    """Reads the inputs once."""
    return _summarized(problem, SUMMARIZE)


def forward(problem: Problem, h_in: Tensor) -> Scanned:
    """In one pass."""
    scanned, (_, left) = empty(problem)[1], _new_wide(problem)
    in_large_pages(scanned.y)
    tensors = {"kept": _numbers(scanned.kept[0]), "state_in": _wide(h_in), "state": left}
    _run(problem, FORWARD, (scanned.y,), tensors)
    return Scanned(scanned.y, _as_state(left, scanned.h_last), scanned.kept)


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """Reads the gradient, and what the decay is made of."""
    return _summarized(problem, SUMMARIZE_BACKWARD, grad_y=grad_y.contiguous())


def backward(problem: Problem, scanned: Scanned, grads: Grads) -> tuple[Inputs, Tensor]:
    """In one pass, the states of a tile made again from the one that entered it."""
    shared, count = _shared(problem), len(problem.inputs) - problem.recurrence.weights
    groups = _groups(problem)
    out = []
    for number, x in enumerate(problem.inputs):
        if number >= count:  # a part for each row of the batch
            each = torch.view_as_real(x).shape if x.is_complex() else x.shape
            out.append(x.new_empty((problem.batch, *each), dtype=torch.float64))
        elif number in shared:  # a part for each group of channels
            out.append(x.new_empty((groups, *x.shape), dtype=_accumulators(problem)))
        else:
            out.append(torch.empty_like(x, memory_format=torch.contiguous_format))
            in_large_pages(out[-1])
    tensors = {
        "kept": _numbers(scanned.kept[0].contiguous()),
        "grad_y": grads[0].contiguous(),
        "state_in": _wide(grads[1]),
        "state": _new_wide(problem)[1],
    }
    _run(problem, BACKWARD, tuple(out), tensors)
    for number, x in enumerate(problem.inputs):
        if number >= count or number in shared:
            whole = out[number].sum(0)
            out[number] = (torch.view_as_complex(whole) if x.is_complex() else whole).to(x.dtype)
    return tuple(out), _as_state(tensors["state"], scanned.h_last)


def _summarized(problem: Problem, kernel: int, **tensors: Tensor) -> Span:
    decay, state = _new_wide(problem)
    _run(problem, kernel, (), {**tensors, "span_decay": decay, "span_state": state})
    span = problem.new_span()
    return Span(_as_state(decay, span.decay), _as_state(state, span.state), kind=span.kind)


def _run(problem: Problem, kernel: int, out: Inputs, tensors: dict[str, Tensor]) -> None:
    """Call the library. What it writes is new and contiguous."""
    count = len(problem.inputs) - problem.recurrence.weights
    inputs = [x.contiguous() for x in problem.inputs[:count]]  # alive until the call has ended
    for weight in problem.inputs[count:]:
        complexes = weight.is_complex()
        inputs.append(
            _wide(weight) if complexes else weight.to(_accumulators(problem)).contiguous()
        )
    if problem.reset is not None:
        tensors = {**tensors, "reset": problem.reset.to(torch.uint8).contiguous()}
    batch, width, states = problem.state_shape
    pointers = ctypes.c_void_p * MOST_INPUTS
    arguments = _Arguments(
        batch=batch,
        steps=problem.steps,
        width=width,
        states=states,
        groups=_groups(problem),
        group=GROUP,
        x=pointers(*(x.data_ptr() for x in inputs)),
        out=pointers(*(x.data_ptr() for x in out)),
        threads=torch.get_num_threads(),
        **{name: x.data_ptr() for name, x in tensors.items()},
    )
    library = _library_of(problem.recurrence)
    library.longhaul_scan(kernel, DTYPES[inputs[0].dtype], ctypes.byref(arguments))


def _groups(problem: Problem) -> int:
    """How many groups of channels there are."""
    return -(-problem.state_shape[1] // GROUP)


def _shared(problem: Problem) -> tuple[int, ...]:
    assert problem.recurrence.native_states is not None
    return problem.recurrence.native_states.shared


def _accumulators(problem: Problem) -> torch.dtype:
    """What the kernel computes in."""
    return torch.float64 if problem.inputs[0].dtype == torch.float64 else torch.float32


def _new_wide(problem: Problem) -> tuple[Tensor, Tensor]:
    """Two uninitialised states, as numbers of fp64."""
    span = problem.new_span()
    return _numbers(span.decay), _numbers(span.state)


def _numbers(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _wide(state: Tensor) -> Tensor:
    """A state or weight as numbers of fp64, contiguous."""
    return _numbers(state.resolve_conj()).double().contiguous()


def _as_state(numbers: Tensor, like: Tensor) -> Tensor:
    return (torch.view_as_complex(numbers) if like.is_complex() else numbers).to(like.dtype)


def _library_of(recurrence: Recurrence) -> ctypes.CDLL:
    assert recurrence.native_states is not None
    return library(recurrence.native_states.source)
