"""The layer around softmax attention: grouped queries, rotary positions, no biases."""

import torch
from torch import Tensor

from models.config import ModelConfig
from models.layers import CausalConv, Linear
from models.mixer import Carry, SequenceMixer
from models.softmax_attention import QKV


class SoftmaxMixer(SequenceMixer):
    """y = W_out attention(W_q x, W_k x, W_v x), grouped queries, no biases, rotary positions.

    With `attention_conv` x is conv(x): what recurrences have before them.

    Source: the attention of Llama 2 (Touvron et al. 2023, arXiv:2307.09288).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.shared_kv_heads
        self.head_width, self.rope_base = config.width // config.heads, config.rope_base
        self.width, taps = config.width, config.attention_conv
        self.conv_halo = max(0, taps - 1)
        self.conv = CausalConv(config.width, taps) if taps else None
        projected = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(config.width, projected)
        self.out = Linear(config.width, config.width, scale=config.residual_scale)

    def init_tail(self, batch_size: int, device: torch.device) -> Carry:
        """The convolution's halo [B, taps - 1, D], of whoever has one."""
        if self.conv is None:
            return ()
        return (torch.zeros(batch_size, self.conv_halo, self.width, device=device),)

    def convolve(
        self, x: Tensor, tail: Carry, reset: Tensor | None, last: bool
    ) -> tuple[Tensor, Carry]:
        """conv(x), and the halo that leaves; x where there is no convolution."""
        if self.conv is None:
            return x, ()
        extended, leaving = self.ops.halo(x, self.conv_halo, tail[0], reset, last)
        return self.conv(extended, reset), (leaving,)

    def project(self, x: Tensor) -> QKV:
        """Queries, keys and values of x [B, T, D], without positions."""
        parts = [self.heads, self.kv_heads, self.kv_heads]
        return QKV(*self.qkv(x).unflatten(-1, (-1, self.head_width)).split(parts, dim=2))
