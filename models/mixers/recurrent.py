"""The layer around a recurrence: convolution -> preactivations -> scan -> gate -> projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig
from models.layers import CausalConv, Linear
from models.mixer import Carry, SequenceMixer
from models.scan import Recurrence


class RecurrentMixer(SequenceMixer):
    """y = W_out (h * silu(W_gate x)), h = scan(W conv(x) + bias).

    Convolution and gate are each optional. A subclass brings its recurrence and the bias with which
    that forgets.
    Source: Feng et al. 2024 (arXiv:2410.01201) with the gated block of Griffin (De et al. 2024,
    arXiv:2402.19427, section 2).
    """

    def __init__(self, config: ModelConfig, recurrence: Recurrence) -> None:
        super().__init__()
        width, state = config.width, config.state_width
        self.recurrence, self.memory_tokens = recurrence, config.memory_tokens
        self.width, self.state_width = width, state
        self.halo_width = max(0, config.conv_width - 1)
        self.conv = CausalConv(width, config.conv_width) if config.conv_width else None
        self.preactivations = Linear(width, recurrence.parts * state, bias=True)
        self.gate = Linear(width, state) if config.gate else None
        self.out = Linear(state, width, scale=config.residual_scale)
        # A decayed gate forgets its time scale; candidates share the gates' tensor, so that the
        # scan reads one input and returns one gradient.
        self.preactivations.weight.no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Channels' memories spread evenly in log time, from 2 to `memory_tokens` tokens.

        The layers within have drawn their own values. Source: chrono initialisation, Tallec &
        Ollivier 2018 (arXiv:1804.11188).
        """
        channels = (torch.arange(self.state_width) + 0.5) / self.state_width
        memory = 2 * (self.memory_tokens / 2) ** channels
        self.preactivations.bias.copy_(self.forget_bias(memory))

    def forget_bias(self, memory_tokens: Tensor) -> Tensor:
        """Bias [parts * H] with which channel i forgets over memory_tokens[i] tokens ([H])."""
        raise NotImplementedError

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        """(state [B, H] fp32, the convolution's halo [B, conv_width - 1, D])."""
        state = torch.zeros(batch_size, self.state_width, device=device)
        return state, torch.zeros(batch_size, self.halo_width, self.width, device=device)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        state, tail = carry or self.init_carry(x.shape[0], x.device)
        u = x
        if self.conv is not None:
            u, tail = self.ops.halo(x, self.halo_width, tail, reset)
            u = self.conv(u, reset)
        h, state = self.ops.scan(self.recurrence, (self.preactivations(u),), state, reset)
        if self.gate is not None:
            h = h * F.silu(self.gate(x))
        return self.out(h), (state, tail)
