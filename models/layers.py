"""Layers without state of their own, each with its initial values. RMSNorm is torch's.

Initial values: matrices N(0, 1 / fan_in), times `scale` for those that write to the residual; the
convolution is the identity plus noise. Deterministic given `torch.manual_seed`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """torch's layer, starting from N(0, scale^2 / fan_in) and a bias of zeros."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False, scale: float = 1.0) -> None:
        self.scale = scale  # read when torch's own constructor draws the values
        super().__init__(fan_in, fan_out, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the initial values."""
        nn.init.normal_(self.weight, std=self.scale * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SwiGLU(nn.Module):
    """y = W_out (silu(W_gate x) * W_in x), [B, T, D] -> [B, T, D].

    Source: Shazeer 2020 (arXiv:2002.05202).
    """

    def __init__(self, width: int, hidden: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.gate_and_in = Linear(width, 2 * hidden)
        self.out = Linear(hidden, width, scale=residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_in(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class CausalConv(nn.Module):
    """Depthwise causal convolution, y_t = bias + sum_j weight[j] * x_{t-j}, j < width.

    It runs as `width` shifted multiply-adds, so x stays in [B, T, D] layout.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity plus noise."""
        nn.init.normal_(self.weight, std=0.1)
        self.weight[0] += 1
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, reset: Tensor | None = None) -> Tensor:
        """x [B, width - 1 + T, D], the halo first -> y [B, T, D].

        No tap reaches across a reset [B, T]: the token of a document's start, and those after it,
        do not see the tokens before it. Halo entries are masked by whoever supplied the halo.
        """
        halo = self.width - 1
        steps = x.shape[1] - halo
        y = self.bias + self.weight[0] * x[:, halo:]
        visible = None
        for lag in range(1, self.width):
            tap = x[:, halo - lag : halo - lag + steps]
            if reset is not None:
                clear = F.pad(reset == 0, (lag - 1, 0), value=True)[:, :steps]
                visible = clear if visible is None else visible & clear
                tap = tap.masked_fill(~visible.unsqueeze(-1), 0.0)
            y = torch.addcmul(y, tap, self.weight[lag])
        return y
