"""The scan in plain torch: any device, no build, differentiable through hand-written backwards.

Time is cut into about sqrt(T) chunks of about sqrt(T) steps. One loop over the steps of a chunk
runs all chunks at once, so that T steps cost about sqrt(T) tensor operations. Like every backend:

    summarize           inputs -> the span as one map, h -> decay * h + state
    forward             inputs, entering state -> h, h_last
    summarize_backward  output gradients -> the backward's span: its decay is the forward's own
    backward            output gradients, gradient entering from the right -> input gradients
"""

import math

import torch
from torch import Tensor

from models.scan.recurrence import Inputs, Recurrence, Span


def supports(device: str, dtype: torch.dtype) -> bool:
    """Every device and float dtype."""
    return dtype.is_floating_point


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine: it always can."""
    return None


def chunk_count(recurrence: Recurrence, inputs: Inputs) -> int:
    """How many chunk maps a span of these inputs keeps."""
    steps = inputs[0].shape[1]
    return -(-steps // math.isqrt(steps))


def summarize(recurrence: Recurrence, inputs: Inputs, reset: Tensor | None) -> Span:
    """The map h -> decay * h + state of all T steps. reset [B, T] or None."""
    a, b = recurrence.gates(inputs)
    a = _apply_reset(a, reset)
    return _summarize_linear(a, b, reverse=False)


def forward(
    recurrence: Recurrence,
    inputs: Inputs,
    h_in: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, H] in the inputs' dtype and h_last [B, H], from the entering state h_in [B, H]."""
    a, b = recurrence.gates(inputs)
    a = _apply_reset(a, reset)
    span = span or _summarize_linear(a, b, reverse=False)
    h = _scan_linear(a, b, span, h_in, reverse=False)
    return h.to(inputs[0].dtype), torch.addcmul(span.state, span.decay, h_in)


def summarize_backward(
    recurrence: Recurrence, inputs: Inputs, grad_h: Tensor, reset: Tensor | None
) -> Span:
    """The backward as one map, G_out -> decay * G_out + state, of the gradient flowing leftwards.

    With q_t = grad_h_t + G_{t+1} and G_t = a_t q_t, G is itself a linear recurrence run from right
    to left: G_t = a_t G_{t+1} + a_t grad_h_t.
    """
    a = _apply_reset(recurrence.gates(inputs)[0], reset)
    return _summarize_linear(a, a * grad_h, reverse=True)


def backward(
    recurrence: Recurrence,
    inputs: Inputs,
    h: Tensor,
    h_in: Tensor,
    grad_h: Tensor,
    grad_out: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Inputs, Tensor]:
    """Gradients of the inputs and of h_in.

    h [B, T, H] is the forward's output, h_in [B, H] its entering state, grad_h [B, T, H] and
    grad_out [B, H] the gradients of h and of h_last. Returns (input gradients, grad_h_in [B, H]).
    """
    a = _apply_reset(recurrence.gates(inputs)[0], reset)
    span = span or _summarize_linear(a, a * grad_h, reverse=True)
    flow = _scan_linear(a, a * grad_h, span, grad_out, reverse=True)
    grad_b = torch.cat([flow[:, 1:], grad_out.unsqueeze(1)], dim=1).add_(grad_h)
    previous = torch.cat([h_in.unsqueeze(1), h[:, :-1].to(h_in.dtype)], dim=1)
    grad_a = _apply_reset(previous.mul_(grad_b), reset)
    grads = recurrence.gates_backward(inputs, grad_a, grad_b)
    return grads, torch.addcmul(span.state, span.decay, grad_out)


def _apply_reset(a: Tensor, reset: Tensor | None) -> Tensor:
    """A reset at t clears the state before step t: its decay is zero, nothing else changes."""
    return a if reset is None else a.masked_fill(reset.bool().unsqueeze(-1), 0.0)


def _chunks(x: Tensor) -> list[Tensor]:
    """Views of x [B, T, H]: [B, N, C, H] whole chunks, and [B, 1, R, H] for the rest if any."""
    steps = x.shape[1]
    length = math.isqrt(steps)
    whole = steps // length * length
    views = [x[:, :whole].unflatten(1, (-1, length))]
    if whole < steps:
        views.append(x[:, whole:].unsqueeze(1))
    return views


def _summarize_linear(a: Tensor, b: Tensor, reverse: bool) -> Span:
    """Chunk maps and the span's map of h = a * h + b, run to the right or (reverse) to the left."""
    decays, states = [], []
    for a_chunks, b_chunks in zip(_chunks(a), _chunks(b), strict=True):
        order = _order(a_chunks.shape[2], reverse)
        decay, state = a_chunks[:, :, order[0]].clone(), b_chunks[:, :, order[0]].clone()
        for t in order[1:]:
            state = torch.addcmul(b_chunks[:, :, t], a_chunks[:, :, t], state)
            decay *= a_chunks[:, :, t]
        decays.append(decay)
        states.append(state)
    chunk_decay, chunk_state = torch.cat(decays, dim=1), torch.cat(states, dim=1)
    order = _order(chunk_decay.shape[1], reverse)
    decay, state = chunk_decay[:, order[0]].clone(), chunk_state[:, order[0]].clone()
    for n in order[1:]:
        state = torch.addcmul(chunk_state[:, n], chunk_decay[:, n], state)
        decay *= chunk_decay[:, n]
    return Span(decay, state, torch.stack([chunk_decay, chunk_state]))


def _scan_linear(a: Tensor, b: Tensor, span: Span, entering: Tensor, reverse: bool) -> Tensor:
    """h [B, T, H] of the summarised recurrence, from the state that enters at its open end."""
    chunk_decay, chunk_state = span.chunks
    starts = torch.empty_like(chunk_state)  # the state entering each chunk
    for n in _order(chunk_state.shape[1], reverse):
        starts[:, n] = entering
        entering = torch.addcmul(chunk_state[:, n], chunk_decay[:, n], entering)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    first = 0
    for a_chunks, b_chunks, h_chunks in zip(_chunks(a), _chunks(b), _chunks(h), strict=True):
        count = a_chunks.shape[1]
        state = starts[:, first : first + count]
        for t in _order(a_chunks.shape[2], reverse):
            state = torch.addcmul(
                b_chunks[:, :, t], a_chunks[:, :, t], state, out=h_chunks[:, :, t]
            )
        first += count
    return h


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)
