"""The linear recurrence itself: a and b are the inputs."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.scan.recurrence import Inputs, Recurrence


@dataclass(frozen=True)
class Linear(Recurrence):
    """h_t = a_t * h_{t-1} + b_t with a and b given. inputs = (a, b), [B, T, H] each."""

    name = "linear"
    tensors = 2
    native_gates = Path(__file__).with_name("gates.h"), "Linear"
    triton_gates = "models.scan.recurrences.linear.triton:GATES"

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        dtype = self.state_dtype(inputs)
        return inputs[0].to(dtype), inputs[1].to(dtype)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        return grad_a.to(inputs[0].dtype), grad_b.to(inputs[1].dtype)


@dataclass(frozen=True)
class Complement(Recurrence):
    """h_t = (1 - c_t) * h_{t-1} + b_t: what 1 - a would lose where a is near one, c has.

    inputs = (c, b), [B, T, H] each.
    """

    name = "linear-complement"
    tensors = 2
    native_gates = Path(__file__).with_name("gates.h"), "Complement"
    triton_gates = "models.scan.recurrences.linear.triton:COMPLEMENT"

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        dtype = self.state_dtype(inputs)
        return 1 - inputs[0].to(dtype), inputs[1].to(dtype)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        return (-grad_a).to(inputs[0].dtype), grad_b.to(inputs[1].dtype)


VARIANTS = (Linear(), Complement())
