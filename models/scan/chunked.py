"""The scan in plain torch: any recurrence, any device, no build, and hand-written backwards.

Time is cut into about sqrt(T) chunks of about sqrt(T) steps. One loop over the steps of a chunk
runs all chunks at once, so that T steps cost about sqrt(T) tensor operations. Gates and states are
in fp64, whatever the inputs: any recurrence is then exact over long memories, which in fp32 would
take forms of its own.

Where the output is not the state, states are many times as large as all that is read and written.
Such a scan goes tile by tile, keeps the states that enter the tiles, and makes the others again in
its backward: in memory are those of a tile, and of every sixteenth step at most.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.scan.backend import Grads, Scanned
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.span import Decay, Span, span_dtype

asks_autograd = False

TILE_NUMBERS, LEAST_TILE = 1 << 22, 16  # of the states of a tile, 32 MiB of fp64; and steps


def fault(recurrence: Recurrence, device: str, dtype: torch.dtype) -> str | None:
    """Every recurrence and dtype, on every device that has fp64."""
    return "it computes in fp64, which mps does not have" if device == "mps" else None


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """A span keeps its chunks' maps, or a forward the states that enter its tiles."""
    span, state = problem.new_span(), problem.new_state()
    if problem.recurrence.own_output:
        entered = state.new_empty(state.shape[0], len(_tiles(problem)), *state.shape[1:])
        return span, Scanned(problem.new_output(), state, (entered,))
    count = -(-problem.steps // math.isqrt(problem.steps))
    kept = tuple(x.new_empty(x.shape[0], count, *x.shape[1:]) for x in (span.decay, span.state))
    return replace(span, kept=kept), Scanned(problem.new_output(), state)


def summarize(problem: Problem) -> Span:
    """The gates, and their maps composed."""
    if problem.recurrence.own_output:
        return _compose(_Maps.of(tile).summarize() for tile in _tiles(problem))
    return _Maps.of(problem).summarize()


def forward(problem: Problem, h_in: Tensor, span: Span | None) -> Scanned:
    """The states entering all chunks, then the chunks."""
    dtype = problem.inputs[0].dtype
    if problem.recurrence.own_output:
        return _forward_in_tiles(problem, h_in)
    maps = _Maps.of(problem)
    span = span or maps.summarize()
    return Scanned(maps.states(span, h_in).to(dtype), span.apply(h_in).to(h_in.dtype))


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """With o_t the gradient of h_t from outside, q_t = o_t + G_{t+1} and G_t = a_t q_t: a linear
    recurrence run from right to left, G_t = a_t G_{t+1} + a_t o_t."""
    if problem.recurrence.own_output:
        pairs = zip(_tiles(problem), _tiles_of(problem, grad_y), strict=True)
        spans = [_Maps.of_gradient(tile, grad)[0].summarize() for tile, grad in pairs]
        return _compose(reversed(spans))
    return _Maps.of_gradient(problem, grad_y)[0].summarize()


def backward(
    problem: Problem, scanned: Scanned, grads: Grads, span: Span | None
) -> tuple[Inputs, Tensor]:
    """The flow of the gradient, and what it leaves at every step."""
    if problem.recurrence.own_output:
        return _backward_in_tiles(problem, scanned, grads)
    gradients, flow = _backward(problem, scanned.y, scanned.h_last, grads, span)
    narrow = tuple(g.to(x.dtype) for g, x in zip(gradients, problem.inputs, strict=True))
    return narrow, flow.to(grads[1].dtype)


def _backward(
    problem: Problem, h: Tensor, h_in: Tensor, grads: Grads, span: Span | None = None
) -> tuple[Inputs, Tensor]:
    """In fp64, from the states h [B, T, ...]."""
    recurrence, inputs = problem.recurrence, _wide(problem)
    grad_y, grad_out = grads
    maps, grad_h = _Maps.of_gradient(problem, grad_y)
    span = span or maps.summarize()
    flow = maps.states(span, grad_out)
    leaving = grad_out.to(flow.dtype).unsqueeze(1)
    grad_b = torch.cat([flow[:, 1:], leaving], dim=1).add_(grad_h)
    h = h.to(maps.a.dtype)
    previous = torch.cat([h_in.to(h.dtype).unsqueeze(1), h[:, :-1]], dim=1)
    if maps.reset is not None:
        previous = previous.masked_fill(maps.reset, 0.0)
    grad_a = problem.cleared(recurrence.kind.gradient(grad_b, previous, maps.a.shape))
    gradients = recurrence.gates_backward(inputs, grad_a, grad_b)
    if recurrence.own_output:
        read = recurrence.output_gradients(inputs, h, grad_y.to(span_dtype(grad_y.dtype)))
        gradients = tuple(g if r is None else g + r for g, r in zip(gradients, read, strict=True))
    return gradients, span.apply(grad_out)


def _tiles(problem: Problem) -> list[Problem]:
    """The steps cut so that the states of a tile fit a budget."""
    length = max(LEAST_TILE, TILE_NUMBERS // max(1, math.prod(problem.state_shape)))
    return [problem.part(begin, begin + length) for begin in range(0, problem.steps, length)]


def _tiles_of(problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
    """x [B, T, ...] cut as the problem is."""
    return x.split([tile.steps for tile in _tiles(problem)], dim=1)


def _compose(spans: Iterable[Span]) -> Span:
    """Spans in the order in which states pass them, as one."""
    whole: Span | None = None
    for span in spans:
        if whole is not None:
            earlier = span.kind.let_through(span.decay, whole.decay)
            decay = span.kind.compose(span.decay, earlier)
            span = Span(decay, span.apply(whole.state), kind=span.kind)
        whole = Span(span.decay, span.state, kind=span.kind)
    assert whole is not None
    return whole


def _forward_in_tiles(problem: Problem, h_in: Tensor) -> Scanned:
    recurrence, dtype = problem.recurrence, problem.inputs[0].dtype
    h, entered, outputs = h_in.to(span_dtype(h_in.dtype)), [], []
    for tile in _tiles(problem):
        entered.append(h.to(h_in.dtype))
        maps = _Maps.of(tile)
        states = maps.states(maps.summarize(), h)
        outputs.append(recurrence.output(_wide(tile), states).to(dtype))
        h = states[:, -1]
    y = torch.cat(outputs, dim=1)
    return Scanned(y, h.to(h_in.dtype), (torch.stack(entered, dim=1),))


def _backward_in_tiles(problem: Problem, scanned: Scanned, grads: Grads) -> tuple[Inputs, Tensor]:
    """From the last tile to the first, each from the state that entered it."""
    count = len(problem.inputs) - problem.recurrence.weights
    tiles, entered = _tiles(problem), scanned.kept[0]
    of_y, flow = _tiles_of(problem, grads[0]), grads[1]
    stepped, of_weights = [], [torch.zeros((), dtype=torch.float64)] * (len(problem.inputs) - count)
    for number in reversed(range(len(tiles))):
        maps, h_in = _Maps.of(tiles[number]), entered[:, number]
        h = maps.states(maps.summarize(), h_in)
        gradients, flow = _backward(tiles[number], h, h_in, (of_y[number], flow))
        narrow = zip(gradients[:count], problem.inputs, strict=False)
        stepped.append(tuple(g.to(x.dtype) for g, x in narrow))
        of_weights = [
            a + b.to(a.device) for a, b in zip(gradients[count:], of_weights, strict=True)
        ]
    joined = [torch.cat(parts, dim=1) for parts in zip(*reversed(stepped), strict=True)]
    joined += [g.to(x.dtype) for g, x in zip(of_weights, problem.inputs[count:], strict=True)]
    return tuple(joined), flow.to(grads[1].dtype)


def _wide(problem: Problem) -> Inputs:
    """The inputs in fp64, or complex128."""
    return tuple(x.to(span_dtype(x.dtype)) for x in problem.inputs)


@dataclass(frozen=True)
class _Maps:
    """h = a h + b at every step, run to the right or (reverse) to the left; [B, T, ...] each.

    `reset` [B, T, 1, ...] says where a is zero because the state is cleared, whatever it was.
    """

    a: Tensor
    b: Tensor
    kind: Decay
    reset: Tensor | None
    reverse: bool = False

    @classmethod
    def of(cls, problem: Problem) -> "_Maps":
        a, b = problem.recurrence.gates(_wide(problem))
        return cls(problem.cleared(a), b, problem.recurrence.kind, _mask(problem, b))

    @classmethod
    def of_gradient(cls, problem: Problem, grad_y: Tensor) -> tuple["_Maps", Tensor]:
        """Of the gradient's flow; and the gradient of every h from outside."""
        recurrence, inputs = problem.recurrence, _wide(problem)
        a = problem.cleared(recurrence.gates(inputs)[0])
        a = recurrence.kind.adjoint(a)
        grad_h = grad_y.to(span_dtype(grad_y.dtype))
        if recurrence.own_output:
            grad_h = recurrence.state_gradient(inputs, grad_h)
        grad_h = grad_h.to(a.dtype)  # a matrix product promotes nothing
        flows = recurrence.kind.compose(a, grad_h)
        mask = _mask(problem, flows)
        if mask is not None:  # where the gradient is not finite, a decay of zero stops nothing
            flows = flows.masked_fill(mask, 0.0)
        return cls(a, flows, recurrence.kind, mask, reverse=True), grad_h

    def order(self, length: int) -> range:
        return range(length - 1, -1, -1) if self.reverse else range(length)

    def summarize(self) -> Span:
        """Maps of the chunks, and of all of them."""
        decays, states = [], []
        for a, b, reset in self._in_chunks():
            decay, state = self._composed(a, b, reset, dim=2)
            decays.append(decay)
            states.append(state)
        kept = torch.cat(decays, dim=1), torch.cat(states, dim=1)
        return Span(*self._composed(*kept, None, dim=1), kept, self.kind)

    def _in_chunks(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """a, b and reset of the whole chunks, and of the rest."""
        resets = [None, None] if self.reset is None else _chunks(self.reset)
        return list(zip(_chunks(self.a), _chunks(self.b), resets, strict=False))

    def _composed(
        self, a: Tensor, b: Tensor, reset: Tensor | None, dim: int
    ) -> tuple[Tensor, Tensor]:
        """The steps, or chunks, along a dimension as one."""
        first, *rest = self.order(a.shape[dim])
        decay, state = a.select(dim, first).clone(), b.select(dim, first).clone()
        for t in rest:
            later = a.select(dim, t)
            mask = None if reset is None else reset.select(dim, t)
            state = self.kind.step(later, self._before(later, mask, state), b.select(dim, t))
            decay = self.kind.compose(later, self._before(later, mask, decay))
        return decay.resolve_conj(), state

    def _before(self, a: Tensor, mask: Tensor | None, h: Tensor) -> Tensor:
        """What of a state, or of earlier decay, a step lets through; or a chunk, without a mask."""
        if self.reset is None:
            return h
        return self.kind.let_through(a, h) if mask is None else h.masked_fill(mask, 0.0)

    def states(self, span: Span, entering: Tensor) -> Tensor:
        """The state after every step [B, T, ...], from the one that enters at the open end."""
        chunk_decay, chunk_state = span.kept
        starts = torch.empty_like(chunk_state)  # the state entering each chunk
        entering = entering.to(chunk_state.dtype)
        for n in self.order(chunk_state.shape[1]):
            starts[:, n] = entering
            decay = chunk_decay[:, n]
            entering = self.kind.step(decay, self._before(decay, None, entering), chunk_state[:, n])
        h = torch.empty_like(self.b, memory_format=torch.contiguous_format)
        first = 0
        for (a, b, reset), out in zip(self._in_chunks(), _chunks(h), strict=True):
            state = starts[:, first : first + a.shape[1]]
            for t in self.order(a.shape[2]):
                mask = None if reset is None else reset[:, :, t]
                if mask is not None:
                    state = state.masked_fill(mask, 0.0)
                state = self.kind.step(a[:, :, t], state, b[:, :, t])
                out[:, :, t] = state
            first += a.shape[1]
        return h


def _mask(problem: Problem, h: Tensor) -> Tensor | None:
    """The reset as a mask [B, T, 1, ...] of states h [B, T, ...]."""
    reset = problem.reset
    return None if reset is None else reset.bool().view(*reset.shape, *[1] * (h.dim() - 2))


def _chunks(x: Tensor) -> list[Tensor]:
    """Views of x [B, T, ...]: [B, N, C, ...] whole chunks, and [B, 1, R, ...] for the rest."""
    steps = x.shape[1]
    length = math.isqrt(steps)
    whole = steps // length * length
    views = [x[:, :whole].unflatten(1, (-1, length))]
    if whole < steps:
        views.append(x[:, whole:].unsqueeze(1))
    return views
