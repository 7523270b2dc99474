"""S4D: a diagonal state space, the same at every step, in the layer of the other recurrences."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import Linear
from models.mixer import Carry
from models.mixers import S4D_STATES
from models.mixers.recurrent import RecurrentMixer
from models.scan.recurrences.s4d import S4D

LARGEST_STEP = 0.1  # of a channel's dt at initialisation, as published


class S4DMixer(RecurrentMixer):
    """h = gelu(S4D(u) + skip * u), u = W_in conv(x): N complex states a channel, held for a step.

    h' = A h + u in continuous time, discretised by a zero-order hold of dt; y = 2 Re(C h). A starts
    as S4D-Lin or S4D-Inv (`s4d_init`); channels' step sizes start evenly in log from
    1 / memory_tokens to 0.1, where the authors draw them from 1e-3 to 0.1.
    Source: Gu et al. 2022 (arXiv:2206.11893), sections 3 and 4.
    """

    def add_recurrence(self, config: ModelConfig) -> None:
        self.recurrence = S4D()
        self.states, self.init = config.state_size or S4D_STATES, config.s4d_init
        self.into = Linear(self.width, self.state_width)
        shape = self.state_width, self.states
        self.log_step = nn.Parameter(torch.empty(self.state_width))
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(shape)) for _ in range(2))
        self.read = nn.Parameter(torch.empty(2, *shape))  # C, real and imaginary
        self.skip = nn.Parameter(torch.empty(self.state_width))
        for weight in (self.log_decay, self.frequency, self.read):
            weight.no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A = -1/2 + i pi n, or -1/2 + i N/pi (N / (2 n + 1) - 1) with N twice the states."""
        channels = (torch.arange(self.state_width, device="cpu") + 0.5) / self.state_width
        slowest = min(1 / self.memory_tokens, LARGEST_STEP)
        self.log_step.copy_(math.log(slowest) + channels * math.log(LARGEST_STEP / slowest))
        n, both = torch.arange(self.states, device="cpu"), 2 * self.states
        lin, inv = math.pi * n, both / math.pi * (both / (2 * n + 1) - 1)
        self.log_decay.fill_(math.log(0.5))
        self.frequency.copy_((lin if self.init == "lin" else inv).expand_as(self.frequency))
        nn.init.normal_(self.read, std=0.5**0.5)
        nn.init.ones_(self.skip)

    def init_state(self, batch_size: int, device: torch.device) -> Carry:
        """[B, H, N, 2] fp32, real and imaginary."""
        return (torch.zeros(batch_size, self.state_width, self.states, 2, device=device),)

    def recur(self, u: Tensor, state: Carry, reset: Tensor | None) -> tuple[Tensor, Carry]:
        u = self.into(u)
        wide = [p.double() for p in (self.log_step, self.log_decay, self.frequency)]
        a = torch.complex(-wide[1].exp(), wide[2])
        rate = wide[0].exp().unsqueeze(-1) * a
        held = torch.expm1(rate) / a  # what a step keeps of an input of one
        weight = torch.complex(*self.read.double()) * held
        entering = torch.view_as_complex(state[0].contiguous())
        y, leaving = self.ops.scan(self.recurrence, (u, rate, weight), entering, reset)
        return F.gelu(torch.addcmul(y, self.skip, u)), (torch.view_as_real(leaving),)
