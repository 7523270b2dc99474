"""The shape of a language model. Importing this file imports no torch, so a check is instant."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.bounds import Fault, bound_faults, bounded, not_negative, one_of, positive
from models.mixers import MIXERS

MOST_PARAMETERS = 2e12
WIDEST = 100_000  # times the width
LONGEST_MEMORY = 1e8  # tokens
TOKENS_OF_FRAME = 3  # of a decision model: action, return to go, observation


@dataclass
class ModelConfig:
    """A stack of `layers` blocks, each norm -> mixer -> norm -> MLP, on a stream `width` wide."""

    # a name of MIXERS, or a list of names that repeats over the layers
    mixer: Any = bounded("mingru", kind=str | list[str])
    layers: int = positive(4)
    width: int = positive(128)  # D
    vocab_size: int = positive(256)  # where it is not set, as many as the data have
    # numbers of an observation and of an action of a decision model (models/decision.py), where
    # they are not set as the data have them; 0: a language model
    observation_width: int = not_negative(0, most=WIDEST)
    action_width: int = not_negative(0, most=WIDEST)
    expansion: float = positive(1.0, most=WIDEST)  # H = expansion * D, the state's width
    # taps of the causal convolution before the recurrence, 2 or more; 0 turns it off, but mamba's,
    # which then has 4
    conv_width: int = not_negative(4)
    # multiply the state by SiLU of a second projection; mamba always does
    gate: bool = True
    mlp_ratio: float = not_negative(8 / 3, most=WIDEST)  # SwiGLU's hidden width over D; 0: no MLP
    normalize_gates: bool = True  # minLSTM: f / (f + i), the paper's length-independent form
    # longest mean memory, in tokens, at initialisation; weights in bf16 have it to 6 %
    memory_tokens: float = bounded(1024.0, least=2, most=LONGEST_MEMORY)
    # states of a channel; null: as published, 16 of mamba and 32 complex ones of s4d
    state_size: int | None = positive(None, most=4096)
    s4d_init: str = one_of("lin", "lin", "inv")  # of s4d's frequencies: S4D-Lin or S4D-Inv
    # taps of such a convolution before queries, keys and values of attention and window; 0: none
    attention_conv: int = not_negative(0)
    heads: int = positive(4)  # of attention and window, each width / heads wide
    # heads of keys and values, shared in groups; null: as many
    kv_heads: int | None = positive(None)
    # of rotary positions; raise it for contexts beyond some 8K tokens
    rope_base: float = bounded(10000.0, above=1)
    # tokens that a query of the window mixer sees, itself included
    window: int = bounded(1024, least=2)
    tie_embeddings: bool = False  # the head reads with the embedding's matrix
    dropout: float = not_negative(0.0, below=1)  # of the embedding and what half a block adds
    norm_eps: float = not_negative(1e-6)

    @property
    def state_width(self) -> int:
        """H, a multiple of 8 so that a row fills whole vector registers."""
        return max(8, round(self.expansion * self.width / 8) * 8)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP, a multiple of 8; 0 without one."""
        return round(self.mlp_ratio * self.width / 8) * 8

    @property
    def shared_kv_heads(self) -> int:
        """Heads of keys and values, each shared by heads / kv heads queries."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def residual_scale(self) -> float:
        """What writes to the residual starts so much smaller: its variance then does not grow."""
        return (2 * self.layers) ** -0.5

    @property
    def of_frames(self) -> bool:
        """Whether it is a decision model."""
        return self.action_width > 0

    @property
    def tokens_of_input(self) -> int:
        """How many tokens the blocks see for one that comes in."""
        return TOKENS_OF_FRAME if self.of_frames else 1

    @property
    def halo_width(self) -> int:
        """Tokens before a shard that any layer must see by a halo."""
        return max(MIXERS[name].halo(self) for name in self.layer_mixers())

    def layer_mixers(self) -> list[str]:
        """The mixer's name for every layer, first to last."""
        names = [self.mixer] if isinstance(self.mixer, str) else list(self.mixer)
        return [names[layer % len(names)] for layer in range(self.layers)]

    def faults(self) -> list[Fault]:
        """What a user got wrong: (field, what is wrong and what to do) pairs; empty when valid."""
        faults = list(bound_faults(self)) or list(self._general_faults())
        if not faults:
            for name in dict.fromkeys(self.layer_mixers()):
                faults += MIXERS[name].faults(self)
        return list(dict.fromkeys(faults))

    def sp_faults(self, sp: int) -> list[Fault]:
        """What keeps a valid model from being sharded over `sp` ranks."""
        entries = (MIXERS[name] for name in dict.fromkeys(self.layer_mixers()))
        return list(
            dict.fromkeys(fault for entry in entries for fault in entry.sp_faults(self, sp))
        )

    def _too_large(self) -> str | None:
        """Before anything is built: what no machine holds, with the memory that it would take."""
        matrices = 3 * self.state_width + 3 * self.mlp_width
        numbers = self.width * (self.layers * matrices + 2 * self.vocab_size)
        if numbers <= MOST_PARAMETERS:
            return None
        return (
            f"{self.layers:,} layers of width {self.width:,} with {self.vocab_size:,} tokens are "
            f"about {numbers:.1e} parameters, {numbers * 16 / 2**40:,.0f} TiB with gradients and "
            f"optimizer: lower model.layers, model.width or model.vocab_size"
        )

    def _general_faults(self) -> Iterator[Fault]:
        names = [self.mixer] if isinstance(self.mixer, str) else self.mixer
        if not isinstance(names, (list, tuple)) or not names:
            yield "mixer", f"{self.mixer!r} is neither a name nor a list of names"
        else:
            for name in names:
                if not isinstance(name, str) or name not in MIXERS:
                    yield "mixer", f"{name!r} is not one of {', '.join(MIXERS)}"
            if len(names) > max(1, self.layers):
                yield (
                    "mixer",
                    f"a list of {len(names)} for {self.layers} layers: some would not be",
                )
        if bool(self.observation_width) != bool(self.action_width):
            lacking = "observation_width" if self.action_width else "action_width"
            yield lacking, "0 is a language model's, whose other width is 0 too: set both or none"
        if self.of_frames and self.tie_embeddings:
            yield "tie_embeddings", "a decision model's head and embedding differ: set it to false"
        if fault := self._too_large():
            largest = max(("layers", "width", "vocab_size"), key=lambda name: getattr(self, name))
            yield largest, fault
        for name in ("conv_width", "attention_conv"):
            if getattr(self, name) == 1:
                yield name, "1 is not 0 (off) or at least 2"
