"""A mixer as a stranger would add it: this file, and a line of the table, `"average": ENTRY`."""

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import Linear
from models.mixer import Carry, SequenceMixer
from models.mixers import Entry
from models.scan.recurrences.linear import Linear as LinearRecurrence


class AverageMixer(SequenceMixer):
    """y = W_out h, h_t = a h_{t-1} + (1 - a) W_in x_t: an exponential moving average, a learned."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.recurrence = config.width, LinearRecurrence()
        self.into = Linear(config.width, config.width)
        self.out = Linear(config.width, config.width, scale=config.residual_scale)
        self.decay = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.decay, 2.0)

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        return (torch.zeros(batch_size, self.width, device=device),)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        (state,) = carry or self.init_carry(x.shape[0], x.device)
        a = torch.sigmoid(self.decay).to(x.dtype).expand_as(x)
        h, state = self.ops.scan(self.recurrence, (a, (1 - a) * self.into(x)), state, reset)
        return self.out(h), (state,)


ENTRY = Entry("tests.models.own_mixer:AverageMixer", mixing_flops_per_channel=3)
