"""Full causal attention: the Transformer baseline's mixer."""

import torch
from torch import Tensor

from models.cache import Cache
from models.mixer import Carry
from models.mixers.softmax import SoftmaxMixer


class AttentionMixer(SoftmaxMixer):
    """Every token sees all tokens before it; the carry holds their keys and values."""

    def init_carry(self, batch_size: int, device: torch.device) -> Carry:
        return *self.init_tail(batch_size, device), *Cache.empty(batch_size).flat

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        *,
        reset: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Carry]:
        carry = self.init_carry(x.shape[0], x.device) if carry is None else carry
        tails = 0 if self.conv is None else 1
        cache = Cache.of(carry[tails:])
        u, tail = self.convolve(x, carry[:tails], reset, last)
        y, leaving = self.ops.attend(self.project(u), cache, reset, self.rope_base, last)
        return self.out(y.flatten(2)), () if leaving is None else (*tail, *leaving.flat)
