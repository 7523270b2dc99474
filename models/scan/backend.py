"""What a backend offers, which one runs a scan, and its functions as torch operators.

As operators the compiler and activation checkpointing see each function as one step with known
shapes: nothing is traced into a kernel, and a policy can name the small results that it keeps
(trainer/parallel/recompute.py). A backend that asks autograd itself is called as it is.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.library import custom_op

from models.scan.recurrence import KNOWN, Inputs, Problem, Recurrence, remember
from models.scan.span import Span

# A backend is a module, and a line here; "auto" takes the fastest of a device, or chunked.
BACKENDS = {
    "triton": "models.scan.triton",
    "native": "models.scan.native",
    "chunked": "models.scan.chunked",
    "reference": "models.scan.reference",  # by name only
}
_FASTEST = {"cuda": "triton", "cpu": "native"}

Grads = tuple[Tensor, Tensor]  # of y [B, T, ...] and of the state that leaves [B, ...]


@dataclass(frozen=True)
class Scanned:
    """What a scan gave: y [B, T, ...], a state [B, ...], and what its backward wants kept.

    The state is the one that leaves; to a backward it is the one that entered.
    """

    y: Tensor
    h_last: Tensor
    kept: tuple[Tensor, ...] = ()


class Backend(Protocol):
    """A module that runs recurrences over time."""

    asks_autograd: bool  # and is therefore called as it is: autograd does not see into an operator

    def fault(self, recurrence: Recurrence, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run this recurrence here, in inputs of this dtype; None when it can."""

    def empty(self, problem: Problem) -> tuple[Span, Scanned]:
        """What `summarize` and `forward` return, uninitialised: shapes for the compiler."""

    def summarize(self, problem: Problem) -> Span:
        """All steps as one map."""

    def forward(self, problem: Problem, h_in: Tensor, span: Span | None) -> Scanned:
        """y and h_last from the state that enters; `span` is what `summarize` gave, if asked."""

    def summarize_backward(self, problem: Problem, grad_y: Tensor) -> Span:
        """The map G_out -> decay G_out + state of the gradient that flows from right to left."""

    def backward(
        self, problem: Problem, scanned: Scanned, grads: Grads, span: Span | None
    ) -> tuple[Inputs, Tensor]:
        """Gradients of the inputs and of the state that entered, which `scanned` has."""


def choose_backend(name: str, recurrence: Recurrence, device: str, dtype: torch.dtype) -> str:
    """The backend that runs it on inputs of that dtype; "auto" is the fastest that can, here.

    Raises ValueError for a backend that is not known, or asked for by name and not to be had.
    """
    remember(recurrence)
    return _constant_choice(name, recurrence.name, device, dtype)


def _constant_choice(name: str, recurrence: str, device: str, dtype: torch.dtype) -> str:
    return _choose(name, recurrence, device, dtype)


def _asks_autograd(name: str) -> bool:
    return load(name).asks_autograd


# As torch.compiler.assume_constant_result does, which would import the compiler: 1.5 s a process.
_constant_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
_asks_autograd._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _choose(name: str, recurrence: str, device: str, dtype: torch.dtype) -> str:
    if name == "auto":
        # The interpreter is for tests: "auto" keeps Triton to the devices that it is for.
        fastest = _FASTEST.get(device, "chunked")
        fault = _fault(fastest, recurrence, device, dtype)
        if fault is None:
            return fastest
        if fastest == "chunked":
            raise ValueError(f"no scan runs here: {fault}")
        if dtype != torch.float64 or device == "cpu":
            message = f"the scan of {recurrence} runs in plain torch, many times slower: {fault}"
            warnings.warn(message, stacklevel=5)
        return "chunked"
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"scan backend {name!r} is not known: use one of {known}")
    if fault := _fault(name, recurrence, device, dtype):
        raise ValueError(f"scan backend {name!r} cannot be used: {fault}; use 'auto' or 'chunked'")
    return name


def _fault(name: str, recurrence: str, device: str, dtype: torch.dtype) -> str | None:
    try:
        return load(name).fault(KNOWN[recurrence], device, dtype)
    except ImportError as error:
        return f"{error.name or error} is not installed"


@cache
def load(name: str) -> Backend:
    """The backend's module. Raises ImportError where a library of its is missing."""
    return cast(Backend, import_module(BACKENDS[name]))


def summarize(backend: str, problem: Problem) -> Span:
    """As `Backend.summarize`."""
    if _asks_autograd(backend):
        return load(backend).summarize(problem)
    return _span(_summarize(*_of(problem), _how(backend, problem)), problem)


def forward(backend: str, problem: Problem, h_in: Tensor, span: Span | None = None) -> Scanned:
    """As `Backend.forward`."""
    if _asks_autograd(backend):
        return load(backend).forward(problem, h_in, span)
    y, h_last, *kept = _forward(*_of(problem), h_in, _flat(span), _how(backend, problem))
    return Scanned(y, h_last, tuple(kept))


def summarize_backward(backend: str, problem: Problem, grad_y: Tensor) -> Span:
    """As `Backend.summarize_backward`."""
    if _asks_autograd(backend):
        return load(backend).summarize_backward(problem, grad_y)
    return _span(_summarize_backward(*_of(problem), grad_y, _how(backend, problem)), problem)


def backward(
    backend: str, problem: Problem, scanned: Scanned, grads: Grads, span: Span | None = None
) -> tuple[Inputs, Tensor]:
    """As `Backend.backward`."""
    if _asks_autograd(backend):
        return load(backend).backward(problem, scanned, grads, span)
    saved = [scanned.y, scanned.h_last, *scanned.kept]
    *gradients, grad_h_in = _backward(
        *_of(problem), saved, list(grads), _flat(span), _how(backend, problem)
    )
    return tuple(gradients), grad_h_in


# The operators: plain lists of tensors, and `how`, the names of backend and recurrence.


def _of(problem: Problem) -> tuple[list[Tensor], Tensor | None]:
    return list(problem.inputs), problem.reset


def _how(backend: str, problem: Problem) -> str:
    return f"{backend}/{problem.recurrence.name}"


def _flat(span: Span | None) -> list[Tensor]:
    return [] if span is None else [span.decay, span.state, *span.kept]


def _span(tensors: list[Tensor], problem: Problem) -> Span:
    decay, state, *kept = tensors
    return Span(decay, state, tuple(kept), problem.recurrence.kind)


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """The same, but none a view of another's memory: an operator's results must not be."""
    seen: set[int] = set()
    for i, x in enumerate(tensors):
        tensors[i] = x.resolve_conj().contiguous()  # as the compiler is told
        place = tensors[i].untyped_storage().data_ptr()
        if place in seen:
            tensors[i] = tensors[i].clone()
        seen.add(place)
    return tensors


def _solver(how: str, inputs: list[Tensor], reset: Tensor | None = None) -> tuple[Backend, Problem]:
    backend, _, recurrence = how.partition("/")
    return load(backend), Problem(KNOWN[recurrence], tuple(inputs), reset)


@custom_op("longhaul::scan_summarize", mutates_args=())
def _summarize(inputs: list[Tensor], reset: Tensor | None, how: str) -> list[Tensor]:
    backend, problem = _solver(how, inputs, reset)
    return _flat(backend.summarize(problem))


@custom_op("longhaul::scan_forward", mutates_args=())
def _forward(
    inputs: list[Tensor], reset: Tensor | None, h_in: Tensor, span: list[Tensor], how: str
) -> list[Tensor]:
    backend, problem = _solver(how, inputs, reset)
    scanned = backend.forward(problem, h_in, _span(span, problem) if span else None)
    return _apart([scanned.y, scanned.h_last, *scanned.kept])


@custom_op("longhaul::scan_summarize_backward", mutates_args=())
def _summarize_backward(
    inputs: list[Tensor], reset: Tensor | None, grad_y: Tensor, how: str
) -> list[Tensor]:
    backend, problem = _solver(how, inputs, reset)
    return _flat(backend.summarize_backward(problem, grad_y))


@custom_op("longhaul::scan_backward", mutates_args=())
def _backward(
    inputs: list[Tensor],
    reset: Tensor | None,
    saved: list[Tensor],
    grads: list[Tensor],
    span: list[Tensor],
    how: str,
) -> list[Tensor]:
    backend, problem = _solver(how, inputs, reset)
    y, h_in, *kept = saved
    gradients, grad_h_in = backend.backward(
        problem,
        Scanned(y, h_in, tuple(kept)),
        (grads[0], grads[1]),
        _span(span, problem) if span else None,
    )
    return _apart([*gradients, grad_h_in])


def _empty_span(inputs: list[Tensor], how: str) -> list[Tensor]:
    backend, problem = _solver(how, inputs)
    return _flat(backend.empty(problem)[0])


def _empty_scanned(inputs: list[Tensor], how: str) -> list[Tensor]:
    backend, problem = _solver(how, inputs)
    scanned = backend.empty(problem)[1]
    return [scanned.y, scanned.h_last, *scanned.kept]


_summarize.register_fake(lambda inputs, reset, how: _empty_span(inputs, how))
_summarize_backward.register_fake(lambda inputs, reset, grad_y, how: _empty_span(inputs, how))
_forward.register_fake(lambda inputs, reset, h_in, span, how: _empty_scanned(inputs, how))
_backward.register_fake(
    lambda inputs, reset, saved, grads, span, how: [
        *(x.new_empty(x.shape) for x in inputs),
        saved[1].new_empty(saved[1].shape),
    ]
)
