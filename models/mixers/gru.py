"""GRU: torch's own layer, whose gates see the hidden state, so that it is no scan but a relay."""

import torch
from torch import Tensor, nn

from models.mixer import SequenceOps
from models.mixers.recurrent import RelayMixer
from models.relay import State


class GRU(nn.GRU):
    """torch.nn.GRU(fan_in, H), one layer, batch first, as a `models.relay.Cell`.

    Called like a mixer's part, so that whoever gathers weights by module finds them in use.
    """

    def __init__(self, fan_in: int, state_width: int) -> None:
        super().__init__(fan_in, state_width, batch_first=True)

    def forward(  # type: ignore[override]
        self, u: Tensor, state: State, reset: Tensor | None, ops: SequenceOps
    ) -> tuple[Tensor, State]:
        """h [B, T, H] of u [B, T, D], and the state that leaves."""
        return ops.relay(self, u, state, reset)

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One call of torch's kernel."""
        hidden = state[0].unsqueeze(0).contiguous()
        weights, wide = self.weights_as(hidden.dtype), u.to(hidden.dtype)
        y, hidden = torch.gru(wide, hidden, weights, True, 1, 0.0, self.training, False, True)
        return y.to(u.dtype), (hidden[0],)

    def weights(self) -> list[Tensor]:
        """In torch's order."""
        names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
        return [self.get_parameter(name) for name in names]

    def weights_as(self, dtype: torch.dtype) -> list[Tensor]:
        """For what computes in it."""
        return [weight.to(dtype) for weight in self.weights()]


class GRUMixer(RelayMixer):
    """h_t = z_t h_{t-1} + (1 - z_t) tanh(W u_t + r_t U h_{t-1}), r and z of u_t and h_{t-1}.

    Source: Cho et al. 2014 (arXiv:1406.1078), in the form of torch.nn.GRU.
    """

    def make_layer(self, fan_in: int, state: int) -> GRU:
        return GRU(fan_in, state)

    def forget_biases(self, memory_tokens: Tensor) -> dict[int, Tensor]:
        """Of gates r, z, n: z = log(m - 1), so that z = 1 - 1/m."""
        return {1: torch.log(memory_tokens - 1)}


class LoopedGRU(GRU):
    """The same, one torch.gru_cell after another in Python: the baseline of the paper's speed."""

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        hidden, outputs = state[0], []
        weights = self.weights_as(hidden.dtype)
        for step in u.to(hidden.dtype).unbind(1):
            hidden = torch.gru_cell(step, hidden, *weights)
            outputs.append(hidden)
        return torch.stack(outputs, dim=1).to(u.dtype), (hidden,)


class LoopedGRUMixer(GRUMixer):
    """GRUMixer by a loop in Python."""

    def make_layer(self, fan_in: int, state: int) -> GRU:
        return LoopedGRU(fan_in, state)
