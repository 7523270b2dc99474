"""The four functions of a backend as torch operators, and the choice of the backend.

As operators the compiler and activation checkpointing see each of them as one step with known
shapes: nothing is traced into a kernel, and a policy can name the small results that it keeps
(trainer/parallel/recompute.py). chunked.py says what the functions compute.
"""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from models.scan.recurrence import RECURRENCES, Inputs, Recurrence, Span, state_dtype

# Modules with chunked.py's functions, in the order in which "auto" prefers them.
BACKENDS = {
    "triton": "models.scan.gpu",
    "native": "models.scan.native",
    "chunked": "models.scan.chunked",
}


def choose_backend(name: str, inputs: Inputs) -> str:
    """The backend that runs the scan; "auto" is the fastest for these inputs on this machine.

    Raises ValueError for a backend that is not known, or asked for by name and not to be had.
    """
    return _constant_choice(name, inputs[0].device.type, inputs[0].dtype)


@torch.compiler.assume_constant_result
def _constant_choice(name: str, device: str, dtype: torch.dtype) -> str:
    return _choose(name, device, dtype)


@cache
def _choose(name: str, device: str, dtype: torch.dtype) -> str:
    if name == "auto":
        # The interpreter is for tests: "auto" keeps Triton to the devices that it is for.
        candidates = [b for b in BACKENDS if not (b == "triton" and device == "cpu")]
        faults = {b: fault for b in candidates if (fault := _fault(b, device, dtype))}
        chosen = next(b for b in candidates if b not in faults)
        wanted = {"cuda": "triton", "cpu": "native"}.get(device, chosen)
        if chosen != wanted and dtype != torch.float64:
            message = f"the scan runs in plain torch, many times slower: {faults[wanted]}"
            warnings.warn(message, stacklevel=5)
        return chosen
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"scan backend {name!r} is not known: use one of {known}")
    if fault := _fault(name, device, dtype):
        raise ValueError(f"scan backend {name!r} cannot be used: {fault}; use 'auto' or 'chunked'")
    return name


def _fault(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run inputs of this device and dtype here; None when it can."""
    try:
        backend = _module(name)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    if not backend.supports(device, dtype):
        return f"it is not made for {dtype} on {device}"
    return backend.unavailable()


@cache
def _module(name: str) -> ModuleType:
    return import_module(BACKENDS[name])


def summarize(backend: str, recurrence: Recurrence, inputs: Inputs, reset: Tensor | None) -> Span:
    """The span of the inputs as one map."""
    return Span(*_summarize(list(inputs), reset, recurrence.name, backend))


def forward(
    backend: str,
    recurrence: Recurrence,
    inputs: Inputs,
    h_in: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, H] and h_last [B, H]."""
    return _forward(list(inputs), h_in, reset, _pack(span), recurrence.name, backend)


def summarize_backward(
    backend: str, recurrence: Recurrence, inputs: Inputs, grad_h: Tensor, reset: Tensor | None
) -> Span:
    """The backward's span as one map."""
    return Span(*_summarize_backward(list(inputs), grad_h, reset, recurrence.name, backend))


def backward(
    backend: str,
    recurrence: Recurrence,
    inputs: Inputs,
    h: Tensor,
    h_in: Tensor,
    grad_h: Tensor,
    grad_out: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Inputs, Tensor]:
    """Gradients of the inputs and of h_in [B, H]."""
    *grads, grad_h_in = _backward(
        list(inputs), h, h_in, grad_h, grad_out, reset, _pack(span), recurrence.name, backend
    )
    return tuple(grads), grad_h_in


def _pack(span: Span | None) -> list[Tensor]:
    return [] if span is None else [span.decay, span.state, span.chunks]


def _unpack(span: list[Tensor]) -> Span | None:
    return Span(*span) if span else None


@custom_op("longhaul::scan_summarize", mutates_args=())
def _summarize(
    inputs: list[Tensor], reset: Tensor | None, recurrence: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    span = _module(backend).summarize(RECURRENCES[recurrence], tuple(inputs), reset)
    return span.decay, span.state, span.chunks


@custom_op("longhaul::scan_forward", mutates_args=())
def _forward(
    inputs: list[Tensor],
    h_in: Tensor,
    reset: Tensor | None,
    span: list[Tensor],
    recurrence: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _module(backend).forward(
        RECURRENCES[recurrence], tuple(inputs), h_in, reset, _unpack(span)
    )


@custom_op("longhaul::scan_summarize_backward", mutates_args=())
def _summarize_backward(
    inputs: list[Tensor], grad_h: Tensor, reset: Tensor | None, recurrence: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    span = _module(backend).summarize_backward(
        RECURRENCES[recurrence], tuple(inputs), grad_h, reset
    )
    return span.decay, span.state, span.chunks


@custom_op("longhaul::scan_backward", mutates_args=())
def _backward(
    inputs: list[Tensor],
    h: Tensor,
    h_in: Tensor,
    grad_h: Tensor,
    grad_out: Tensor,
    reset: Tensor | None,
    span: list[Tensor],
    recurrence: str,
    backend: str,
) -> list[Tensor]:
    grads, grad_h_in = _module(backend).backward(
        RECURRENCES[recurrence], tuple(inputs), h, h_in, grad_h, grad_out, reset, _unpack(span)
    )
    return [*grads, grad_h_in]


def _empty_span(
    inputs: list[Tensor], recurrence: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = RECURRENCES[recurrence].state_shape(tuple(inputs))
    count = _module(backend).chunk_count(RECURRENCES[recurrence], tuple(inputs))
    dtype = state_dtype(tuple(inputs))
    shapes = (batch, width), (batch, width), (2, batch, count, width)
    decay, state, chunks = (inputs[0].new_empty(shape, dtype=dtype) for shape in shapes)
    return decay, state, chunks


_summarize.register_fake(
    lambda inputs, reset, recurrence, backend: _empty_span(inputs, recurrence, backend)
)
_summarize_backward.register_fake(
    lambda inputs, grad_h, reset, recurrence, backend: _empty_span(inputs, recurrence, backend)
)


@_forward.register_fake
def _(
    inputs: list[Tensor],
    h_in: Tensor,
    reset: Tensor | None,
    span: list[Tensor],
    recurrence: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    h = inputs[0].new_empty(RECURRENCES[recurrence].state_shape(tuple(inputs)))
    return h, h_in.new_empty(h_in.shape)


@_backward.register_fake
def _(
    inputs: list[Tensor],
    h: Tensor,
    h_in: Tensor,
    grad_h: Tensor,
    grad_out: Tensor,
    reset: Tensor | None,
    span: list[Tensor],
    recurrence: str,
    backend: str,
) -> list[Tensor]:
    return [*(x.new_empty(x.shape) for x in inputs), h_in.new_empty(h_in.shape)]
