"""Mamba: a selective state space, whose step size, input and output maps see the input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import CausalConv, Linear
from models.mixer import Carry, SequenceMixer
from models.mixers import MAMBA_STATES, MAMBA_TAPS
from models.scan.recurrences.mamba import Mamba

LARGEST_STEP = 0.1  # of a channel's dt at initialisation, as published


class MambaMixer(SequenceMixer):
    """y = W_out ((scan(u) + skip * u) * silu(z)), u = silu(conv(x')), [x' | z] = W_in x.

    The published block, with H = expansion * D channels of `state_size` states each: its gate z and
    a convolution are part of it, whatever other recurrences go without (`gate`, and `conv_width` 0,
    where it has MAMBA_TAPS). Channels' step sizes start evenly in log from 1 / memory_tokens to
    0.1, where the authors draw them from 1e-3 to 0.1.
    Source: Gu & Dao 2023 (arXiv:2312.00752), sections 3.4 and 3.6, and the authors' `Mamba` module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.state_width = config.width, config.state_width
        self.memory_tokens, self.states = config.memory_tokens, config.state_size or MAMBA_STATES
        taps = config.conv_width or MAMBA_TAPS
        self.halo_width, self.rank = taps - 1, -(-width // 16)
        self.recurrence = Mamba()
        self.into = Linear(width, 2 * self.state_width)
        self.conv = CausalConv(self.state_width, taps)
        self.select = Linear(self.state_width, self.rank + 2 * self.states)
        self.step = Linear(self.rank, self.state_width, scale=3**-0.5)
        self.step_bias = nn.Parameter(torch.empty(self.state_width))
        self.log_rate = nn.Parameter(torch.empty(self.state_width, self.states))
        self.skip = nn.Parameter(torch.empty(self.state_width))
        self.out = Linear(self.state_width, width, scale=config.residual_scale)
        for weight in (self.select.weight, self.step.weight, self.log_rate):
            weight.no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rates from 1 to N (S4D-Real) and step sizes; the layers within have drawn their own."""
        channels = (torch.arange(self.state_width, device="cpu") + 0.5) / self.state_width
        slowest = min(1 / self.memory_tokens, LARGEST_STEP)
        step = slowest * (LARGEST_STEP / slowest) ** channels
        self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.log_rate.copy_(
            torch.arange(1, self.states + 1, device="cpu").log().expand_as(self.log_rate)
        )
        nn.init.ones_(self.skip)

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        """(state [B, H, N] fp32, the convolution's halo [B, taps - 1, H])."""
        state = torch.zeros(batch_size, self.state_width, self.states, device=device)
        halo = torch.zeros(batch_size, self.halo_width, self.state_width, device=device)
        return state, halo

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        state, tail = carry or self.init_carry(x.shape[0], x.device)
        u, z = self.into(x).chunk(2, dim=-1)
        extended, tail = self.ops.halo(u, self.halo_width, tail, reset, last)
        u = F.silu(self.conv(extended, reset))
        low_rank, b, c = self.select(u).split([self.rank, self.states, self.states], dim=-1)
        rate = -torch.exp(self.log_rate.to(torch.promote_types(x.dtype, torch.float32)))
        step, b, c = (each.to(u.dtype) for each in (self.step(low_rank), b, c))  # autocast's
        inputs = (u, step, b, c, rate, self.step_bias.to(rate.dtype))
        y, state = self.ops.scan(self.recurrence, inputs, state, reset)
        y = torch.addcmul(y, self.skip, u) * F.silu(z)
        return self.out(y), (state, tail)
