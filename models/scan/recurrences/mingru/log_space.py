"""minGRU as the paper computes it in parallel, kept as its definition and for comparison."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mingru_log_space(kv: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """minGRU by cumulative sums of logarithms.

    Its rounding error grows with T (1e-1 at a million tokens in fp32) and it needs h0 and
    candidates to be positive. kv [B, T, 2H], h0 [B, H] > 0 or None. Returns h [B, T, H], h_last
    [B, H]. Source: Feng et al. 2024 (arXiv:2410.01201), appendix B.2.1 (Heinsen's scan).
    """
    k, v = kv.chunk(2, dim=-1)
    log_a = -F.softplus(k)
    log_g = torch.where(v >= 0, (F.relu(v) + 0.5).log(), -F.softplus(-v))
    log_b = -F.softplus(-k) + log_g
    if h0 is not None:
        log_b = torch.cat([h0.log().unsqueeze(1), log_b], dim=1)
        log_a = F.pad(log_a, (0, 0, 1, 0))
    log_decay = log_a.cumsum(dim=1)
    h = (log_decay + torch.logcumsumexp(log_b - log_decay, dim=1)).exp()[:, -k.shape[1] :]
    return h, h[:, -1]
