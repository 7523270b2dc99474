"""Full causal attention: the Transformer baseline's mixer."""

import torch
from torch import Tensor

from models.mixer import Carry
from models.mixers.softmax import SoftmaxMixer
from models.softmax_attention import Cache, empty_cache


class AttentionMixer(SoftmaxMixer):
    """Every token sees all tokens before it; the carry holds their keys and values."""

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        cache = empty_cache(batch_size, self.kv_heads, self.head_width, device)
        return *cache, *self.init_tail(batch_size, device)

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        carry = self.init_carry(x.shape[0], x.device) if carry is None else carry
        cache, tail = carry[: len(Cache._fields)], carry[len(Cache._fields) :]
        u, tail = self.convolve(x, tail, reset, last)
        y, cache = self.ops.attend(self.project(u), Cache(*cache), reset, self.rope_base, last)
        return self.out(y.flatten(2)), () if last else (*cache, *tail)
