"""GRU: torch's own layer, whose gates see the hidden state, so that it is no scan but a relay."""

import torch
from torch import Tensor, nn

from models.mixers.recurrent import RelayMixer, TorchCell
from models.relay import State


class GRU(TorchCell, nn.GRU):  # type: ignore[misc]  # it is called with other arguments
    """torch.nn.GRU(fan_in, H), one layer, batch first."""

    def __init__(self, fan_in: int, state_width: int) -> None:
        super().__init__(fan_in, state_width, batch_first=True)

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One call of torch's kernel."""
        hidden = state[0].unsqueeze(0).contiguous()
        weights, wide = self.weights_as(hidden.dtype), u.to(hidden.dtype)
        y, hidden = torch.gru(wide, hidden, weights, True, 1, 0.0, self.training, False, True)
        return y.to(u.dtype), (hidden[0],)


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
