"""The three recurrences: how each turns its preactivations into h_t = a_t * h_{t-1} + b_t.

A `Recurrence` holds gates and their derivatives only. How the recurrence is then run over time is
the business of a backend, and across devices of the two-level scan. chunked.py and the two-level
scan run any recurrence of RECURRENCES; the fused kernels have their own copy of the gates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Span:
    """A stretch of steps as one affine map, h -> decay * h + state.

    decay, state [B, H] in the state's dtype. chunks [2, B, N, H]: decay and state of the chunks
    into which the backend cuts the span and which its output pass wants again; N may be 0.
    """

    decay: Tensor
    state: Tensor
    chunks: Tensor


class Recurrence:
    """Gates of a diagonal recurrence, and their derivatives."""

    name: str  # short and lower case: operators and messages know the recurrence by it
    parts: int  # preactivations per state channel, in each of the inputs

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int]:
        """(B, T, H) of the state that `inputs` drive."""
        batch, steps, width = inputs[0].shape
        return batch, steps, width // self.parts

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """a, b [B, T, H] in the state's dtype, from `inputs` in any float dtype."""
        raise NotImplementedError

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        """Gradients of `inputs`, in the inputs' dtypes, from those of a and b [B, T, H]."""
        raise NotImplementedError


def state_dtype(inputs: Inputs) -> torch.dtype:
    """States, carries and accumulators are fp32 whatever the inputs; fp64 inputs keep fp64."""
    return torch.float64 if inputs[0].dtype == torch.float64 else torch.float32


def _candidate(v: Tensor) -> tuple[Tensor, Tensor]:
    """g(v) and g'(v), [B, T, H] each (SCAN: v + 0.5 above zero, sigmoid below)."""
    s = torch.sigmoid(v)
    positive = v >= 0
    return torch.where(positive, v + 0.5, s), torch.where(positive, 1.0, s * (1 - s))


@dataclass(frozen=True)
class Linear(Recurrence):
    """h_t = a_t * h_{t-1} + b_t with a and b given. inputs = (a, b), [B, T, H] each."""

    name = "linear"
    parts = 1

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(inputs)
        return inputs[0].to(dtype), inputs[1].to(dtype)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        return grad_a.to(inputs[0].dtype), grad_b.to(inputs[1].dtype)


@dataclass(frozen=True)
class MinGRU(Recurrence):
    """h_t = (1 - z) h_{t-1} + z g(v), z = sigmoid(k). inputs = (kv,), [B, T, 2H].

    Source: Feng et al. 2024 (arXiv:2410.01201), section 3.1.
    """

    name = "mingru"
    parts = 2

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        k, v = inputs[0].to(state_dtype(inputs)).chunk(2, dim=-1)
        z = torch.sigmoid(k)
        return torch.sigmoid(-k), z * _candidate(v)[0]

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        k, v = inputs[0].to(state_dtype(inputs)).chunk(2, dim=-1)
        z = torch.sigmoid(k)
        g, slope = _candidate(v)
        grad_k = z * torch.sigmoid(-k) * (grad_b * g - grad_a)
        return (torch.cat([grad_k, grad_b * z * slope], dim=-1).to(inputs[0].dtype),)


@dataclass(frozen=True)
class MinLSTM(Recurrence):
    """h_t = f h_{t-1} + i g(v), f and i normalised to sum to one if `normalize`.

    inputs = (fiv,), [B, T, 3H]. Source: Feng et al. 2024 (arXiv:2410.01201), section 3.2; the
    authors' selective-copying and Chomsky runs have the normalisation off.
    """

    normalize: bool = True
    parts = 3

    @property
    def name(self) -> str:  # type: ignore[override]
        return "minlstm" if self.normalize else "minlstm-unnormalized"

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        f, i, v = inputs[0].to(state_dtype(inputs)).chunk(3, dim=-1)
        g = _candidate(v)[0]
        if not self.normalize:
            return torch.sigmoid(f), torch.sigmoid(i) * g
        # f / (f + i) as a sigmoid of log f - log i: it cannot divide zero by zero.
        difference = F.softplus(-i) - F.softplus(-f)
        return torch.sigmoid(difference), torch.sigmoid(-difference) * g

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        f, i, v = inputs[0].to(state_dtype(inputs)).chunk(3, dim=-1)
        g, slope = _candidate(v)
        if self.normalize:
            difference = F.softplus(-i) - F.softplus(-f)
            keep, write = torch.sigmoid(difference), torch.sigmoid(-difference)
            grad_difference = (grad_a - grad_b * g) * keep * write
            grad_f = grad_difference * torch.sigmoid(-f)
            grad_i = -grad_difference * torch.sigmoid(-i)
        else:
            keep, write = torch.sigmoid(f), torch.sigmoid(i)
            grad_f = grad_a * keep * torch.sigmoid(-f)
            grad_i = grad_b * g * write * torch.sigmoid(-i)
        grads = torch.cat([grad_f, grad_i, grad_b * write * slope], dim=-1)
        return (grads.to(inputs[0].dtype),)


RECURRENCES: dict[str, Recurrence] = {
    recurrence.name: recurrence
    for recurrence in (Linear(), MinGRU(), MinLSTM(), MinLSTM(normalize=False))
}
