"""Recurrences that are in no table: what a stranger would write, and where the house admits it.

Their states are not their outputs, and are no rows of channels: [B, D, N] with a decay for every
number, [B, D, N] complex with a decay for every row, [B, K, V] with a matrix for a decay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.scan import MATRIX, Inputs, Recurrence


@dataclass(frozen=True)
class Readout(Recurrence):
    """h_t = a_t h_{t-1} + b_t on a state [B, D, N], y_t = sum_n c_t[n] h_t[:, n].

    inputs = (a, b, c), a and b [B, T, D, N], c [B, T, N]; y [B, T, D].
    """

    name = "readout"
    own_output = True

    def faults(self, inputs: Inputs) -> str | None:
        a, b, c = inputs
        fits = a.shape == b.shape and c.shape == (*a.shape[:2], a.shape[3])
        return None if fits else "inputs must be a, b [B, T, D, N] and c [B, T, N]"

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        batch, _, *state = inputs[0].shape
        return batch, *state

    def output_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return tuple(inputs[0].shape[:3])

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        dtype = self.state_dtype(inputs)
        return inputs[0].to(dtype), inputs[1].to(dtype)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        a, b, c = inputs
        return grad_a.to(a.dtype), grad_b.to(b.dtype), torch.zeros_like(c)

    def output(self, inputs: Inputs, h: Tensor) -> Tensor:
        return (inputs[2].unsqueeze(2) * h).sum(-1)

    def state_gradient(self, inputs: Inputs, grad_y: Tensor) -> Tensor:
        return grad_y.unsqueeze(-1) * inputs[2].unsqueeze(2)

    def output_gradients(
        self, inputs: Inputs, h: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, (grad_y.unsqueeze(-1) * h).sum(2)


@dataclass(frozen=True)
class Rotation(Recurrence):
    """h_t = 0.9 e^{i w_t} h_{t-1} + x_t, y = Re h: a complex state [B, D, N], a decay for N.

    inputs = (w, x), w [B, T, D], x [B, T, D, N].
    """

    name = "rotation"
    own_output = True

    def faults(self, inputs: Inputs) -> str | None:
        return None if inputs[1].shape[:3] == inputs[0].shape else "x must be [B, T, D, N]"

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        batch, _, *state = inputs[1].shape
        return batch, *state

    def decay_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return (*self.state_shape(inputs)[:2], 1)

    def state_dtype(self, inputs: Inputs) -> torch.dtype:
        return torch.complex128 if inputs[0].dtype == torch.float64 else torch.complex64

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        angle, x = inputs
        decay = torch.polar(torch.full_like(angle, 0.9), angle).unsqueeze(-1)
        return decay.to(self.state_dtype(inputs)), x.to(self.state_dtype(inputs))

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        a = self.gates(inputs)[0]
        # d a / d angle = i a, and torch's gradient of a complex number is the conjugate's
        return (grad_a * (1j * a).conj()).real.squeeze(-1), grad_b.real

    def output(self, inputs: Inputs, h: Tensor) -> Tensor:
        return h.real

    def state_gradient(self, inputs: Inputs, grad_y: Tensor) -> Tensor:
        return torch.complex(grad_y, torch.zeros_like(grad_y))


@dataclass(frozen=True)
class Mixing(Recurrence):
    """h_t = A_t h_{t-1} + B_t with A_t [K, K] and a state [B, K, V]. inputs = (A, B)."""

    name = "mixing"
    kind = MATRIX

    def faults(self, inputs: Inputs) -> str | None:
        return None if inputs[0].shape[-1] == inputs[1].shape[-2] else "A [K, K] and B [K, V]"

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        batch, _, *state = inputs[1].shape
        return batch, *state

    def decay_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs[0].shape[0], *inputs[0].shape[2:]

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        dtype = self.state_dtype(inputs)
        return inputs[0].to(dtype), inputs[1].to(dtype)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        return grad_a.to(inputs[0].dtype), grad_b.to(inputs[1].dtype)


def own_inputs(recurrence: Recurrence, batch: int, steps: int) -> Inputs:
    """Random leaves in fp64 that keep the state in bounds."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, steps, *shape, dtype=torch.float64)

    if isinstance(recurrence, Readout):
        inputs = torch.sigmoid(noise(3, 4) + 1), noise(3, 4), noise(4)
    elif isinstance(recurrence, Rotation):
        inputs = noise(3), noise(3, 4)
    else:
        inputs = noise(3, 3) * 0.4, noise(3, 2)
    return tuple(x.requires_grad_() for x in inputs)


OWN: tuple[Recurrence, ...] = (Readout(), Rotation(), Mixing())
