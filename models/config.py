"""The shape of a language model. Importing this file imports no torch, so a check is instant."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.mixers import MIXERS, Fault

MOST_PARAMETERS = 2e12
WIDEST = 100_000  # times the width


@dataclass
class ModelConfig:
    """A stack of `layers` blocks, each norm -> mixer -> norm -> MLP, on a stream `width` wide."""

    mixer: Any = "mingru"  # a name of MIXERS, or a list of names that repeats over the layers
    layers: int = 4
    width: int = 128  # D
    vocab_size: int = 256
    expansion: float = 1.0  # H = expansion * D, the state's width
    conv_width: int = 4  # taps of the causal convolution before the recurrence; 0 turns it off
    gate: bool = True  # multiply the state by SiLU of a second projection
    mlp_ratio: float = 8 / 3  # SwiGLU's hidden width over D; 0 turns the MLP off
    normalize_gates: bool = True  # minLSTM: f / (f + i), the paper's length-independent form
    memory_tokens: float = 1024.0  # longest mean memory, in tokens, at initialisation
    heads: int = 4  # of attention and window, each width / heads wide
    kv_heads: int | None = None  # heads of keys and values, shared in groups; None: as many
    rope_base: float = 10000.0  # rotary positions; raise it for contexts beyond some 8K tokens
    window: int = 1024  # tokens that a query of the window mixer sees, itself included
    tie_embeddings: bool = False  # the head reads with the embedding's matrix
    dropout: float = 0.0  # of the embedding and of what each half of a block adds
    norm_eps: float = 1e-6

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
    def halo_width(self) -> int:
        """Tokens before a shard that any layer must see by a halo."""
        return max(MIXERS[name].halo(self) for name in self.layer_mixers())

    def layer_mixers(self) -> list[str]:
        """The mixer's name for every layer, first to last."""
        names = [self.mixer] if isinstance(self.mixer, str) else list(self.mixer)
        return [names[layer % len(names)] for layer in range(self.layers)]

    def faults(self) -> list[Fault]:
        """What a user got wrong: (field, what is wrong and what to do) pairs; empty when valid."""
        faults = list(self._general_faults())
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
        if not all(0 <= x <= WIDEST for x in (self.expansion, self.mlp_ratio)):
            return None  # told elsewhere
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
        for field in ("layers", "width", "vocab_size"):
            if getattr(self, field) < 1:
                yield field, f"{getattr(self, field)} is not positive"
        if fault := self._too_large():
            largest = max(("layers", "width", "vocab_size"), key=lambda name: getattr(self, name))
            yield largest, fault
        if not 0 < self.expansion <= WIDEST:
            yield "expansion", f"{self.expansion} is not positive, or above {WIDEST:,}"
        if self.conv_width < 0 or self.conv_width == 1:
            yield "conv_width", f"{self.conv_width} is not 0 (off) or at least 2"
        if not 0 <= self.mlp_ratio <= WIDEST:
            yield "mlp_ratio", f"{self.mlp_ratio} is not from 0, which turns it off, to {WIDEST:,}"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"{self.dropout} is not in [0, 1)"
        if self.memory_tokens < 2:
            yield "memory_tokens", f"{self.memory_tokens} is below 2 tokens"
