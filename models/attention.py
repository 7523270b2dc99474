"""The Transformer baseline's mixers: full causal attention, and attention in a sliding window."""

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.mixer import Carry, SequenceMixer
from models.softmax_attention import Cache, attend_window, empty_cache


class _SoftmaxMixer(SequenceMixer):
    """y = W_out attention(W_q x, W_k x, W_v x), grouped queries, no biases, rotary positions.

    Source: the attention of Llama 2 (Touvron et al. 2023, arXiv:2307.09288).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.shared_kv_heads
        self.head_width, self.rope_base = config.width // config.heads, config.rope_base
        projected = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = nn.Linear(config.width, projected, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, heads, d], keys and values [B, T, kv heads, d]."""
        parts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_width)).split(parts, dim=2)
        return q, k, v


class AttentionMixer(_SoftmaxMixer):
    """Every token sees all tokens before it; the carry holds their keys and values."""

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        return empty_cache(batch_size, self.kv_heads, self.head_width, device)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        carry = self.init_carry(x.shape[0], x.device) if carry is None else carry
        q, k, v = self._project(x)
        y, carry = self.ops.attend(q, k, v, Cache(*carry), reset, self.rope_base, last)
        return self.out(y.flatten(2)), carry


class WindowMixer(_SoftmaxMixer):
    """Every token sees itself and the `window` - 1 tokens before it, across segments and shards.

    Source: Beltagy et al. 2020 (arXiv:2004.05150), causal and without global tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.halo_width = config.window - 1
        self.kv_width = self.kv_heads * self.head_width

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        """Keys and values of the last `window` - 1 tokens, and a channel that says they are there.

        [B, window - 1, 2 * kv heads * d + 1]. Whoever hides or lacks steps of a halo gives zeros,
        so the last channel, 1 for every real token, tells real keys from none.
        """
        halo = torch.zeros(batch_size, self.halo_width, 2 * self.kv_width + 1, device=device)
        return (halo,)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        (tail,) = carry or self.init_carry(x.shape[0], x.device)
        q, k, v = self._project(x)
        there = k.new_ones(*k.shape[:2], 1)
        steps = torch.cat([k.flatten(2), v.flatten(2), there], dim=-1)
        steps, tail = self.ops.halo(steps, self.halo_width, tail, reset)
        k, v, there = steps.split([self.kv_width, self.kv_width, 1], dim=-1)
        k, v = (y.unflatten(-1, (self.kv_heads, self.head_width)) for y in (k, v))
        visible = there[:, : self.halo_width, 0] > 0.5
        y = attend_window(q, k, v, visible, reset, self.rope_base)
        return self.out(y.flatten(2)), (tail,)
