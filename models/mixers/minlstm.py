"""minLSTM: forget and input gates that see the input only, so that the recurrence is a scan."""

import torch
from torch import Tensor

from models.config import ModelConfig
from models.mixers.recurrent import ScanMixer
from models.scan import Recurrence
from models.scan.recurrences.minlstm import MinLSTM


class MinLSTMMixer(ScanMixer):
    """h_t = f_t h_{t-1} + i_t g(v_t), with f + i = 1 unless `normalize_gates` is off.

    Source: Feng et al. 2024 (arXiv:2410.01201), section 3.2.
    """

    def choose_recurrence(self, config: ModelConfig) -> Recurrence:
        return MinLSTM(config.normalize_gates)

    def forget_bias(self, memory_tokens: Tensor) -> Tensor:
        """f = log(m - 1), i = -f: f = 1 - 1/m and i = 1/m, normalised or not."""
        f = torch.log(memory_tokens - 1)
        return torch.cat([f, -f, torch.zeros_like(f)])
