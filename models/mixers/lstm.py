"""LSTM: torch's own layer, whose gates see the hidden state, so that it is no scan but a relay."""

import torch
from torch import Tensor, nn

from models.mixers.recurrent import RelayMixer, TorchCell
from models.relay import State


class LSTM(TorchCell, nn.LSTM):  # type: ignore[misc]  # it is called with other arguments
    """torch.nn.LSTM(fan_in, H), one layer, batch first."""

    def __init__(self, fan_in: int, state_width: int) -> None:
        super().__init__(fan_in, state_width, batch_first=True)

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One call of torch's kernel."""
        both = [each.unsqueeze(0).contiguous() for each in state]
        weights, wide = self.weights_as(both[0].dtype), u.to(both[0].dtype)
        y, hidden, cell = torch.lstm(wide, both, weights, True, 1, 0.0, self.training, False, True)
        return y.to(u.dtype), (hidden[0], cell[0])


class LSTMMixer(RelayMixer):
    """c_t = f_t c_{t-1} + i_t tanh(g_t), h_t = o_t tanh(c_t), all gates of u_t and h_{t-1}.

    Source: Hochreiter & Schmidhuber 1997, in the form of torch.nn.LSTM.
    """

    states = 2  # hidden and cell

    def make_layer(self, fan_in: int, state: int) -> LSTM:
        return LSTM(fan_in, state)

    def forget_biases(self, memory_tokens: Tensor) -> dict[int, Tensor]:
        """Of gates i, f, g, o: f = log(m - 1) and i = -f, so that f = 1 - 1/m and i = 1/m."""
        forget = torch.log(memory_tokens - 1)
        return {0: -forget, 1: forget}


class LoopedLSTM(LSTM):
    """The same, one torch.lstm_cell after another in Python: the baseline of the paper's speed."""

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        both, outputs = tuple(state), []
        weights = self.weights_as(both[0].dtype)
        for step in u.to(both[0].dtype).unbind(1):
            both = torch.lstm_cell(step, both, *weights)
            outputs.append(both[0])
        return torch.stack(outputs, dim=1).to(u.dtype), both


class LoopedLSTMMixer(LSTMMixer):
    """LSTMMixer by a loop in Python."""

    def make_layer(self, fan_in: int, state: int) -> LSTM:
        return LoopedLSTM(fan_in, state)
