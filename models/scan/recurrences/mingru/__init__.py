"""minGRU: an update gate and a candidate that see the input only.

Source: Feng et al. 2024 (arXiv:2410.01201), section 3.1 and appendix B.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.scan.recurrence import Inputs, Recurrence


def candidate(v: Tensor) -> Tensor:
    """g(v) = v + 0.5 for v >= 0, sigmoid(v) below: positive and continuous."""
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


def candidate_slope(v: Tensor) -> Tensor:
    """g'(v)."""
    s = torch.sigmoid(v)
    return torch.where(v >= 0, 1.0, s * (1 - s))


@dataclass(frozen=True)
class MinGRU(Recurrence):
    """h_t = (1 - z) h_{t-1} + z g(v_t), z = sigmoid(k). inputs = (kv,), [B, T, 2H]."""

    name = "mingru"
    parts = 2
    native_gates = Path(__file__).with_name("gates.h"), "MinGRU"
    triton_gates = "models.scan.recurrences.mingru.triton:GATES"

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        k, v = inputs[0].to(self.state_dtype(inputs)).chunk(2, dim=-1)
        return torch.sigmoid(-k), torch.sigmoid(k) * candidate(v)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        k, v = inputs[0].to(self.state_dtype(inputs)).chunk(2, dim=-1)
        z = torch.sigmoid(k)
        grad_k = z * torch.sigmoid(-k) * (grad_b * candidate(v) - grad_a)
        grads = torch.cat([grad_k, grad_b * z * candidate_slope(v)], dim=-1)
        return (grads.to(inputs[0].dtype),)


VARIANTS = (MinGRU(),)
