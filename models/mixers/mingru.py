"""minGRU: one update gate that sees the input only, so that the recurrence is a scan."""

import torch
from torch import Tensor

from models.config import ModelConfig
from models.mixers.recurrent import ScanMixer
from models.scan import Recurrence
from models.scan.recurrences.mingru import MinGRU


class MinGRUMixer(ScanMixer):
    """h_t = (1 - z_t) h_{t-1} + z_t g(v_t), z = sigmoid(k).

    Source: Feng et al. 2024 (arXiv:2410.01201), section 3.1.
    """

    def choose_recurrence(self, config: ModelConfig) -> Recurrence:
        return MinGRU()

    def forget_bias(self, memory_tokens: Tensor) -> Tensor:
        """k = -log(m - 1), so that 1 - z = 1 - 1/m; candidates start at zero."""
        k = -torch.log(memory_tokens - 1)
        return torch.cat([k, torch.zeros_like(k)])
