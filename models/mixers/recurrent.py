"""The layer around a recurrence: convolution -> recurrence -> gate -> projection."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import CausalConv, Linear
from models.mixer import Carry, SequenceMixer, SequenceOps
from models.relay import Cell, State
from models.scan import Recurrence


class RecurrentMixer(SequenceMixer):
    """y = W_out (h * silu(W_gate x)), h a recurrence over conv(x).

    Convolution and gate are each optional. A subclass brings its recurrence.
    Source: Feng et al. 2024 (arXiv:2410.01201) with the gated block of Griffin (De et al. 2024,
    arXiv:2402.19427, section 2).
    """

    states = 1  # tensors [B, H] that the recurrence carries

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, state = config.width, config.state_width
        self.width, self.state_width, self.memory_tokens = width, state, config.memory_tokens
        self.halo_width = max(0, config.conv_width - 1)
        self.conv = CausalConv(width, config.conv_width) if config.conv_width else None
        self.add_recurrence(config)
        self.gate = Linear(width, state) if config.gate else None
        self.out = Linear(state, width, scale=config.residual_scale)

    def add_recurrence(self, config: ModelConfig) -> None:
        """Make what `recur` needs; initial values are drawn in the order of the layers."""
        raise NotImplementedError

    def recur(self, u: Tensor, state: Carry, reset: Tensor | None) -> tuple[Tensor, Carry]:
        """h [B, T, H] over u [B, T, D], and the state that leaves."""
        raise NotImplementedError

    def memories(self) -> Tensor:
        """Mean memories of the channels [H], spread evenly in log time from 2 tokens on.

        Source: chrono initialisation, Tallec & Ollivier 2018 (arXiv:1804.11188).
        """
        channels = (torch.arange(self.state_width, device="cpu") + 0.5) / self.state_width
        return 2 * (self.memory_tokens / 2) ** channels

    def init_state(self, batch_size: int, device: torch.device) -> Carry:
        """Zeros, `states` times [B, H] fp32."""
        shape = batch_size, self.state_width
        return tuple(torch.zeros(shape, device=device) for _ in range(self.states))

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        """(the recurrence's state, the convolution's halo [B, conv_width - 1, D])."""
        halo = torch.zeros(batch_size, self.halo_width, self.width, device=device)
        return *self.init_state(batch_size, device), halo

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        *state, tail = carry or self.init_carry(x.shape[0], x.device)
        u = x
        if self.conv is not None:
            u, tail = self.ops.halo(x, self.halo_width, tail, reset, last)
            u = self.conv(u, reset)
        h, leaving = self.recur(u, tuple(state), reset)
        if self.gate is not None:
            h = h * F.silu(self.gate(x))
        return self.out(h), (*leaving, tail)


class ScanMixer(RecurrentMixer):
    """h = scan(W u + bias): gates that see the inputs only.

    A subclass names its recurrence and the bias with which that forgets.
    """

    def add_recurrence(self, config: ModelConfig) -> None:
        self.recurrence = self.choose_recurrence(config)
        parts = self.recurrence.parts
        self.preactivations = Linear(self.width, parts * self.state_width, bias=True)
        # A decayed gate forgets its time scale; candidates share the gates' tensor, so that the
        # scan reads one input and returns one gradient.
        self.preactivations.weight.no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Memories spread up to `memory_tokens`; the layers within have drawn their own values."""
        self.preactivations.bias.copy_(self.forget_bias(self.memories()))

    def choose_recurrence(self, config: ModelConfig) -> Recurrence:
        """The one that the configuration asks for."""
        raise NotImplementedError

    def forget_bias(self, memory_tokens: Tensor) -> Tensor:
        """Bias [parts * H] with which channel i forgets over memory_tokens[i] tokens ([H])."""
        raise NotImplementedError

    def recur(self, u: Tensor, state: Carry, reset: Tensor | None) -> tuple[Tensor, Carry]:
        h, leaving = self.ops.scan(self.recurrence, (self.preactivations(u),), state[0], reset)
        return h, (leaving,)


class TorchCell(nn.Module):
    """A layer of torch's, one layer and one direction, as a `models.relay.Cell`; it brings `run`.

    Called like a mixer's part, so that whoever gathers weights by module finds them in use.
    """

    def forward(
        self, u: Tensor, state: State, reset: Tensor | None, ops: SequenceOps
    ) -> tuple[Tensor, State]:
        """h [B, T, H] of u [B, T, D], and the state that leaves."""
        with torch.autocast(u.device.type, enabled=False):  # it would round the state at every step
            return ops.relay(cast(Cell, self), u, state, reset)

    def weights(self) -> list[Tensor]:
        """In torch's order."""
        names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
        return [self.get_parameter(name) for name in names]

    def weights_as(self, dtype: torch.dtype) -> list[Tensor]:
        """For what computes in it."""
        return [weight.to(dtype) for weight in self.weights()]


class RelayMixer(RecurrentMixer):
    """h = a layer of torch's over u, of one layer and one direction; its state dict is theirs."""

    def add_recurrence(self, config: ModelConfig) -> None:
        self.rnn = self.make_layer(self.width, self.state_width)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight"):  # a decayed gate forgets its time scale
                weight.no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates' biases by `memory_tokens`, as of the other recurrences; the rest is torch's."""
        gates = {name: p.view(-1, self.state_width) for name, p in self.rnn.named_parameters()}
        for gate, bias in self.forget_biases(self.memories()).items():
            gates["bias_ih_l0"][gate], gates["bias_hh_l0"][gate] = bias, 0.0

    def make_layer(self, fan_in: int, state: int) -> nn.RNNBase:
        """The layer, called with (u, state, reset, ops)."""
        raise NotImplementedError

    def forget_biases(self, memory_tokens: Tensor) -> dict[int, Tensor]:
        """By a gate's place in torch's order, the bias with which channels so forget ([H])."""
        raise NotImplementedError

    def recur(self, u: Tensor, state: Carry, reset: Tensor | None) -> tuple[Tensor, Carry]:
        return self.rnn(u, state, reset, self.ops)
