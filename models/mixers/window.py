"""Attention in a sliding window: linear in T, and a carry of one size."""

import torch
from torch import Tensor

from models.config import ModelConfig
from models.mixer import Carry
from models.mixers.softmax import SoftmaxMixer
from models.softmax_attention import attend_window


class WindowMixer(SoftmaxMixer):
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
        return halo, *self.init_tail(batch_size, device)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        tail, *before = carry or self.init_carry(x.shape[0], x.device)
        u, leaving = self.convolve(x, tuple(before), reset, last)
        q, k, v = self.project(u)
        there = k.new_ones(*k.shape[:2], 1)
        steps = torch.cat([k.flatten(2), v.flatten(2), there], dim=-1)
        steps, tail = self.ops.halo(steps, self.halo_width, tail, reset, last)
        k, v, there = steps.split([self.kv_width, self.kv_width, 1], dim=-1)
        k, v = (y.unflatten(-1, (self.kv_heads, self.head_width)) for y in (k, v))
        visible = there[:, : self.halo_width, 0] > 0.5
        y = attend_window(q, k, v, visible, reset, self.rope_base)
        return self.out(y.flatten(2)), (tail, *leaving)
