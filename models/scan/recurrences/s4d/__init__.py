"""S4D: a diagonal state space, complex, and the same at every step.

Source: Gu et al. 2022 (arXiv:2206.11893), sections 3.2 and 3.3.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.scan.recurrence import Inputs, NativeStates, Recurrence


@dataclass(frozen=True)
class S4D(Recurrence):
    """h_t = exp(rate) h_{t-1} + x_t, y_t = 2 Re sum_n weight[n] h_t[:, n], a state [B, D, N].

    inputs = (x, rate, weight): x [B, T, D]; weights rate and weight [D, N], complex. rate is dt A,
    with a negative real part; weight is C times what a step holds of its input. y [B, T, D].
    """

    name = "s4d"
    tensors = 3
    weights = 2
    own_output = True
    native_states = NativeStates(Path(__file__).with_name("states.cpp"))
    triton_states = "models.scan.recurrences.s4d.triton"

    def faults(self, inputs: Inputs) -> str | None:
        if len(inputs) != self.tensors:
            return f"takes {self.tensors} inputs, got {len(inputs)}"
        x, rate, weight = inputs
        fits = x.dim() == 3 and rate.dim() == 2 and rate.shape == weight.shape
        if fits and rate.shape[0] == x.shape[2] and rate.is_complex() and weight.is_complex():
            return None
        shapes = ", ".join(f"{[*each.shape]} {each.dtype}" for each in inputs)
        return f"inputs must be x [B, T, D], rate and weight [D, N] complex; got {shapes}"

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs[0].shape[0], *inputs[1].shape

    def state_dtype(self, inputs: Inputs) -> torch.dtype:
        return torch.complex128 if inputs[0].dtype == torch.float64 else torch.complex64

    def output_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return tuple(inputs[0].shape)

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x, rate = inputs[0], inputs[1].to(self.state_dtype(inputs))
        shape = (*x.shape, rate.shape[1])
        return torch.exp(rate).expand(shape), x.to(rate.dtype).unsqueeze(-1).expand(shape)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        rate = inputs[1].to(self.state_dtype(inputs))
        of_rate = grad_a.sum((0, 1)) * torch.exp(rate).conj()
        return grad_b.real.sum(-1), of_rate, torch.zeros_like(rate)

    def output(self, inputs: Inputs, h: Tensor) -> Tensor:
        return 2 * (inputs[2].to(h.dtype) * h).sum(-1).real

    def state_gradient(self, inputs: Inputs, grad_y: Tensor) -> Tensor:
        return 2 * grad_y.unsqueeze(-1) * inputs[2].conj()

    def output_gradients(
        self, inputs: Inputs, h: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, (2 * grad_y.unsqueeze(-1) * h.conj()).sum((0, 1))


VARIANTS = (S4D(),)
