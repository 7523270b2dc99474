"""The sequential loop, differentiated by autograd: the definition of correct, for any recurrence.

Nothing here is fast, and nothing is derived by hand: it knows of a recurrence's gates and output
what `define` and `output` say, and takes their derivatives, and those of the loop, from autograd.
Every other backend is tested against it in fp64.
"""

import torch
from torch import Tensor

from models.scan.backend import Grads, Scanned
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.span import Span, span_dtype

asks_autograd = True


def fault(recurrence: Recurrence, device: str, dtype: torch.dtype) -> str | None:
    """Every device and dtype."""
    return None


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """As summarize and forward return."""
    return problem.new_span(), Scanned(problem.new_output(), problem.new_state())


def summarize(problem: Problem) -> Span:
    """One step composed with the next, from the first to the last."""
    kind = problem.recurrence.kind
    a, b = (x.to(span_dtype(x.dtype)) for x in _maps(problem))
    decay, state = a[:, 0], b[:, 0]
    for t in range(1, problem.steps):
        state = kind.step(a[:, t], kind.let_through(a[:, t], state), b[:, t])
        decay = kind.compose(a[:, t], kind.let_through(a[:, t], decay))
    return Span(decay.clone(), state.clone(), kind=kind)


@torch.no_grad()
def forward(problem: Problem, h_in: Tensor, span: Span | None) -> Scanned:
    """h_t = a_t h_{t-1} + b_t, one step after another; a span is not needed."""
    return Scanned(*_loop(problem, h_in))


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """The state of the map: what the outputs alone send back to the state that enters."""
    with torch.enable_grad():
        h_in = torch.zeros_like(problem.new_state()).requires_grad_()
        (state,) = torch.autograd.grad(_loop(problem, h_in)[0], h_in, grad_y)
    span = summarize(problem)
    kind = problem.recurrence.kind
    return Span(kind.adjoint(span.decay).resolve_conj(), state.to(span.state.dtype), kind=kind)


def backward(
    problem: Problem, scanned: Scanned, grads: Grads, span: Span | None
) -> tuple[Inputs, Tensor]:
    """The loop again, with a graph."""
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in problem.inputs)
        h_in = scanned.h_last.detach().requires_grad_()
        results = _loop(Problem(problem.recurrence, leaves, problem.reset), h_in)
        *gradients, grad_h_in = torch.autograd.grad(
            results, [*leaves, h_in], list(grads), materialize_grads=True
        )
    return tuple(gradients), grad_h_in


def _wide(problem: Problem) -> Inputs:
    """The inputs in fp32, or wider where they are."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in problem.inputs)


def _maps(problem: Problem) -> tuple[Tensor, Tensor]:
    """a and b of every step."""
    a, b = problem.recurrence.define(_wide(problem))
    return problem.cleared(a), b


def _loop(problem: Problem, h: Tensor) -> tuple[Tensor, Tensor]:
    """y of every step, and the state after the last."""
    a, b = _maps(problem)
    states = []
    for t in range(problem.steps):
        if problem.reset is not None:
            mask = problem.reset[:, t].bool().view(-1, *[1] * (h.dim() - 1))
            h = h.masked_fill(mask, 0.0)
        h = problem.recurrence.kind.step(a[:, t], h, b[:, t])
        states.append(h)
    y = problem.recurrence.output(_wide(problem), torch.stack(states, dim=1))
    return y.to(problem.inputs[0].dtype), h
