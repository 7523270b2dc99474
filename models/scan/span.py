"""A stretch of steps as one affine map of the state: how maps act, compose and travel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Decay:
    """What a step does to the state that enters it, h -> a h; `ELEMENTWISE` or `MATRIX`."""

    def step(self, a: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """a h + b, as large as b."""
        raise NotImplementedError

    def let_through(self, a: Tensor, h: Tensor) -> Tensor:
        """h, or zero where a is: a state that is cleared is gone, if it was not finite too."""
        raise NotImplementedError

    def compose(self, later: Tensor, earlier: Tensor) -> Tensor:
        """The decay of two steps."""
        raise NotImplementedError

    def adjoint(self, a: Tensor) -> Tensor:
        """The decay of the gradient that flows back through the step."""
        raise NotImplementedError

    def gradient(self, q: Tensor, h: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a, of that shape, from q, the gradient of a h."""
        raise NotImplementedError


class _Elementwise(Decay):
    def step(self, a: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return torch.addcmul(b, a, h)

    def let_through(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.where(a == 0, 0.0, h)

    def compose(self, later: Tensor, earlier: Tensor) -> Tensor:
        return later * earlier

    def adjoint(self, a: Tensor) -> Tensor:
        return a.conj()

    def gradient(self, q: Tensor, h: Tensor, shape: torch.Size) -> Tensor:
        return (q * h.conj()).sum_to_size(shape)


class _Matrix(Decay):
    def step(self, a: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return b + a @ h

    def let_through(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.where((a == 0).all(-1, keepdim=True).all(-2, keepdim=True), 0.0, h)

    def compose(self, later: Tensor, earlier: Tensor) -> Tensor:
        return later @ earlier

    def adjoint(self, a: Tensor) -> Tensor:
        return a.mH

    def gradient(self, q: Tensor, h: Tensor, shape: torch.Size) -> Tensor:
        return (q @ h.mH).sum_to_size(shape)


ELEMENTWISE = _Elementwise()  # a [B, ...] that broadcasts against h [B, ...], real or complex
MATRIX = _Matrix()  # a [B, ..., K, K] on h [B, ..., K, V]


def span_dtype(state: torch.dtype) -> torch.dtype:
    """Of the spans of steps whose states are of that dtype."""
    return torch.complex128 if state.is_complex else torch.float64


@dataclass(frozen=True)
class Span:
    """Consecutive steps as one map, h -> decay h + state.

    decay and state [B, ...] in fp64 (complex128): a decay is near one where memory is long, and in
    fp32 what it lacks would be lost. A span is small, so that costs nothing. `kept` is what the
    backend that summarised the steps wants again for their output; nobody else reads it.
    """

    decay: Tensor
    state: Tensor
    kept: tuple[Tensor, ...] = ()
    kind: Decay = ELEMENTWISE

    def apply(self, h: Tensor) -> Tensor:
        """The state that leaves, from the one that enters, in the span's dtype."""
        entering = self.kind.let_through(self.decay, h.to(self.state.dtype))
        return self.kind.step(self.decay, entering, self.state)

    def pack(self) -> Tensor:
        """Decay and state as real numbers, [B, n]: what crosses to another device."""
        return torch.cat([_real(self.decay), _real(self.state)], dim=1)

    def unpack(self, packed: Tensor) -> "Span":
        """The span of a device where this span's counterpart was packed."""
        size = _real(self.decay).shape[1]
        return replace(
            self,
            decay=_like(packed[:, :size], self.decay),
            state=_like(packed[:, size:], self.state),
            kept=(),
        )

    def with_state(self, packed: Tensor, decay: Tensor) -> "Span":
        """The map of the gradient through a span of that decay whose state was packed."""
        return replace(self, decay=self.kind.adjoint(decay), state=_like(packed, self.state))

    def pack_state(self) -> Tensor:
        """The state alone, [B, n]."""
        return _real(self.state)


def _real(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).flatten(1)


def _like(packed: Tensor, x: Tensor) -> Tensor:
    """The tensor shaped as x whose `_real` this is."""
    if x.is_complex():
        return torch.view_as_complex(packed.reshape(*x.shape, 2))
    return packed.view(x.shape)
