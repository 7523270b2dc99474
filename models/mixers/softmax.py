"""The layer around softmax attention: grouped queries, rotary positions, no biases."""

from torch import Tensor

from models.config import ModelConfig
from models.layers import Linear
from models.mixer import SequenceMixer
from models.softmax_attention import QKV


class SoftmaxMixer(SequenceMixer):
    """y = W_out attention(W_q x, W_k x, W_v x), grouped queries, no biases, rotary positions.

    Source: the attention of Llama 2 (Touvron et al. 2023, arXiv:2307.09288).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.shared_kv_heads
        self.head_width, self.rope_base = config.width // config.heads, config.rope_base
        projected = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(config.width, projected)
        self.out = Linear(config.width, config.width, scale=config.residual_scale)

    def project(self, x: Tensor) -> QKV:
        """Queries, keys and values of x [B, T, D], without positions."""
        parts = [self.heads, self.kv_heads, self.kv_heads]
        return QKV(*self.qkv(x).unflatten(-1, (-1, self.head_width)).split(parts, dim=2))
