"""minLSTM: forget gate, input gate and candidate that see the input only.

Source: Feng et al. 2024 (arXiv:2410.01201), section 3.2; the authors' selective-copying and Chomsky
runs have the normalisation off.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan.recurrence import Inputs, Recurrence
from models.scan.recurrences.mingru import candidate, candidate_slope


@dataclass(frozen=True)
class MinLSTM(Recurrence):
    """h_t = f h_{t-1} + i g(v_t), f and i normalised to sum to one if `normalize`.

    inputs = (fiv,), [B, T, 3H].
    """

    normalize: bool = True
    parts = 3

    @property
    def name(self) -> str:  # type: ignore[override]
        return "minlstm" if self.normalize else "minlstm-unnormalized"

    @property
    def native_gates(self) -> tuple[Path, str]:  # type: ignore[override]
        return Path(__file__).with_name("gates.h"), f"MinLSTM<{str(self.normalize).lower()}>"

    @property
    def triton_gates(self) -> str:  # type: ignore[override]
        name = "NORMALIZED" if self.normalize else "UNNORMALIZED"
        return f"models.scan.recurrences.minlstm.triton:{name}"

    def define(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        f, i, v = inputs[0].chunk(3, dim=-1)
        f, i = torch.sigmoid(f), torch.sigmoid(i)
        if self.normalize:
            f, i = f / (f + i), i / (f + i)
        return f, i * candidate(v)

    def gates(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        f, i, v = inputs[0].to(self.state_dtype(inputs)).chunk(3, dim=-1)
        keep, write = self._keep_and_write(f, i)
        return keep, write * candidate(v)

    def gates_backward(self, inputs: Inputs, grad_a: Tensor, grad_b: Tensor) -> Inputs:
        f, i, v = inputs[0].to(self.state_dtype(inputs)).chunk(3, dim=-1)
        keep, write = self._keep_and_write(f, i)
        g = candidate(v)
        if self.normalize:
            grad_difference = (grad_a - grad_b * g) * keep * write
            grad_f = grad_difference * torch.sigmoid(-f)
            grad_i = -grad_difference * torch.sigmoid(-i)
        else:
            grad_f = grad_a * keep * torch.sigmoid(-f)
            grad_i = grad_b * g * write * torch.sigmoid(-i)
        grads = torch.cat([grad_f, grad_i, grad_b * write * candidate_slope(v)], dim=-1)
        return (grads.to(inputs[0].dtype),)

    def _keep_and_write(self, f: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        if not self.normalize:
            return torch.sigmoid(f), torch.sigmoid(i)
        # f / (f + i) as a sigmoid of log f - log i: it cannot divide zero by zero.
        difference = F.logsigmoid(f) - F.logsigmoid(i)
        return torch.sigmoid(difference), torch.sigmoid(-difference)


VARIANTS = (MinLSTM(), MinLSTM(normalize=False))
