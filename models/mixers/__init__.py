"""The mixers: what is known of each without building it. The only list of their names.

Free of torch, so that a configuration is checked in an instant. A mixer is its file and its line in
`MIXERS`; parameters and the cost of its matrices are read off the module itself (models/flops.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.bounds import Fault

if TYPE_CHECKING:
    from models.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """A mixer that sees no step but through `scan`; a subclass says what else it needs."""

    path: str  # module:class of its SequenceMixer
    mixing_flops_per_channel: float = 0.0  # and token: gates and h = a * h + b

    def halo(self, config: ModelConfig) -> int:
        """Tokens before a shard that it must see."""
        return 0

    def faults(self, config: ModelConfig) -> Iterator[Fault]:
        """What is wrong with a configuration, of which the general fields are valid."""
        yield from ()

    def sp_faults(self, config: ModelConfig, sp: int) -> Iterator[Fault]:
        """What keeps it from being sharded over `sp` ranks."""
        yield from ()

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> float:
        """What moves along the sequence in one forward, per token, the mean over `seq_len`."""
        return self.mixing_flops_per_channel * config.state_width

    def width_step(self, config: ModelConfig) -> int:
        """Widths that it can have are multiples of this: kernels want vectors of 8 numbers."""
        return 8


class Recurrent(Entry):
    """A recurrence behind a causal convolution."""

    def taps(self, config: ModelConfig) -> int:
        """Of the convolution."""
        return config.conv_width

    def halo(self, config: ModelConfig) -> int:
        return max(0, self.taps(config) - 1)

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> float:
        return super().mixing_flops(config, seq_len) + 2 * self.taps(config) * config.width


class Softmax(Entry):
    """Softmax attention to all tokens before; exchanged by heads."""

    def faults(self, config: ModelConfig) -> Iterator[Fault]:
        if config.width % (2 * config.heads):
            yield (
                "heads",
                f"{config.heads} does not cut width {config.width} into heads of an even width: "
                f"make width a multiple of twice the heads",
            )
            return
        if config.heads % config.shared_kv_heads:
            yield (
                "kv_heads",
                f"{config.kv_heads} does not divide heads {config.heads}: use a divisor",
            )

    def sp_faults(self, config: ModelConfig, sp: int) -> Iterator[Fault]:
        if config.heads % sp:
            yield (
                "heads",
                f"{config.heads} heads of attention cannot be dealt to parallel.sp {sp} ranks: "
                f"use a multiple of {sp} heads, or an sp that divides them",
            )

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> float:
        """The scores and weighted values of the tokens that a query may see, and of no others."""
        seen = self.sees(config, seq_len)
        pairs = seen - seen * (seen - 1) / (2 * seq_len)
        return (4 * pairs + 2 * config.attention_conv) * config.width

    def halo(self, config: ModelConfig) -> int:
        return max(0, config.attention_conv - 1)

    def sees(self, config: ModelConfig, seq_len: int) -> int:
        """Tokens that the last query of a sequence sees."""
        return seq_len

    def width_step(self, config: ModelConfig) -> int:
        return 8 * config.heads


class Window(Softmax):
    """Softmax attention to a window of tokens; exchanged by a halo."""

    def halo(self, config: ModelConfig) -> int:
        return max(config.window - 1, super().halo(config))

    def sp_faults(self, config: ModelConfig, sp: int) -> Iterator[Fault]:
        yield from ()

    def sees(self, config: ModelConfig, seq_len: int) -> int:
        return min(config.window, seq_len)


@dataclass(frozen=True)
class StateSpace(Recurrent):
    """Several states a channel, behind a causal convolution."""

    flops_per_state: float = 0.0  # of each channel and token
    states: int = 16  # where the configuration does not say

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> float:
        states = self.flops_per_state * (config.state_size or self.states)
        return super().mixing_flops(config, seq_len) + states * config.state_width


class Selective(StateSpace):
    """Whose convolution is its own, over the state's channels."""

    def taps(self, config: ModelConfig) -> int:
        return config.conv_width or MAMBA_TAPS

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> float:
        conv = 2 * self.taps(config) * (config.state_width - config.width)
        return super().mixing_flops(config, seq_len) + conv


MAMBA_STATES, S4D_STATES = 16, 32  # as published; S4D's are complex and stand for twice as many
MAMBA_TAPS = 4  # as published

MIXERS: dict[str, Entry] = {
    "mingru": Recurrent("models.mixers.mingru:MinGRUMixer", 12),
    "minlstm": Recurrent("models.mixers.minlstm:MinLSTMMixer", 20),
    "gru": Recurrent("models.mixers.gru:GRUMixer", 14),
    "lstm": Recurrent("models.mixers.lstm:LSTMMixer", 17),
    "gru_loop": Recurrent("models.mixers.gru:LoopedGRUMixer", 14),
    "lstm_loop": Recurrent("models.mixers.lstm:LoopedLSTMMixer", 17),
    "s4d": StateSpace("models.mixers.s4d:S4DMixer", 2, 12, S4D_STATES),
    "mamba": Selective("models.mixers.mamba:MambaMixer", 8, 8, MAMBA_STATES),
    "attention": Softmax("models.mixers.attention:AttentionMixer"),
    "window": Window("models.mixers.window:WindowMixer"),
}
