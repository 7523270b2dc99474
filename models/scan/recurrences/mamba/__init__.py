"""Mamba's selective scan: a state [B, D, N] that the inputs choose what to keep in.

Source: Gu & Dao 2023 (arXiv:2312.00752), algorithm 2 and section 3.3; the zero-order hold of A and
the Euler step of B, as in the authors' `selective_scan_ref`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan.recurrence import Inputs, NativeStates, Recurrence


@dataclass(frozen=True)
class Mamba(Recurrence):
    """h_t = exp(dt A) h_{t-1} + dt x_t B_t, y_t = sum_n C_t[n] h_t[n], dt = softplus(k_t + bias).

    inputs = (x, k, B, C, A, bias): x, k [B, T, D], B, C [B, T, N]; weights A [D, N], negative, and
    bias [D]. y [B, T, D].
    """

    name = "mamba"
    tensors = 6
    weights = 2
    own_output = True
    native_states = NativeStates(Path(__file__).with_name("states.cpp"), shared=(2, 3))
    triton_states = "models.scan.recurrences.mamba.triton"

    def faults(self, inputs: Inputs) -> str | None:
        if len(inputs) != self.tensors:
            return f"takes {self.tensors} inputs, got {len(inputs)}"
        x, k, b, c, a, bias = inputs
        fits = x.dim() == 3 and x.shape == k.shape and b.shape == c.shape and a.dim() == 2
        if fits and b.shape == (*x.shape[:2], a.shape[1]) and a.shape[0] == x.shape[2]:
            return None if bias.shape == a.shape[:1] else f"bias must be [D], got {[*bias.shape]}"
        shapes = ", ".join(str([*each.shape]) for each in inputs)
        return f"inputs must be x, k [B, T, D], B, C [B, T, N], A [D, N], bias [D]; got {shapes}"

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs[0].shape[0], *inputs[4].shape

    def output_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return tuple(inputs[0].shape)

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x, k, b, _, rate, bias = (each.to(self.state_dtype(inputs)) for each in inputs)
        dt = F.softplus(k + bias)
        return torch.exp(dt.unsqueeze(-1) * rate), (dt * x).unsqueeze(-1) * b.unsqueeze(2)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        x, k, b, c, rate, bias = (each.to(self.state_dtype(inputs)) for each in inputs)
        dt = F.softplus(k + bias)
        of_log = grad_a * torch.exp(dt.unsqueeze(-1) * rate)  # of dt A
        of_held = (grad_b * b.unsqueeze(2)).sum(-1)  # of dt x
        of_b = (grad_b * (dt * x).unsqueeze(-1)).sum(2)
        of_k = ((of_log * rate).sum(-1) + of_held * x) * torch.sigmoid(k + bias)
        of_rate = (of_log * dt.unsqueeze(-1)).sum((0, 1))
        return of_held * dt, of_k, of_b, torch.zeros_like(c), of_rate, of_k.sum((0, 1))

    def output(self, inputs: Inputs, h: Tensor) -> Tensor:
        return (h * inputs[3].unsqueeze(2)).sum(-1)

    def state_gradient(self, inputs: Inputs, grad_y: Tensor) -> Tensor:
        return grad_y.unsqueeze(-1) * inputs[3].unsqueeze(2)

    def output_gradients(
        self, inputs: Inputs, h: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, None, (grad_y.unsqueeze(-1) * h).sum(2), None, None


VARIANTS = (Mamba(),)
