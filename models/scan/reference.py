"""The scans as sequential loops: the definition of correct, in whatever precision they are given.

Nothing here is fast. Every other backend is tested against these functions in fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t, one step after another.

    a, b [B, T, H]; h0 [B, H] or None for zeros; reset [B, T], nonzero where the state is cleared
    before the step (a_t = 0). Returns h [B, T, H] and h_last [B, H]; differentiable by autograd.
    """
    if reset is not None:
        a = a * (reset == 0).unsqueeze(-1)
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0.to(b.dtype)
    steps = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        steps.append(h)
    return torch.stack(steps, dim=1), h


def candidate(v: Tensor) -> Tensor:
    """g(v) = v + 0.5 for v >= 0, sigmoid(v) below: positive and continuous.

    Source: Feng et al. 2024 (arXiv:2410.01201), appendix B.
    """
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


def mingru_gates(kv: Tensor) -> tuple[Tensor, Tensor]:
    """a = 1 - sigmoid(k), b = sigmoid(k) * g(v). kv [B, T, 2H] -> a, b [B, T, H].

    Source: Feng et al. 2024 (arXiv:2410.01201), section 3.1.
    """
    k, v = kv.chunk(2, dim=-1)
    return torch.sigmoid(-k), torch.sigmoid(k) * candidate(v)


def minlstm_gates(fiv: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """a = f', b = i' * g(v), where f' = f / (f + i) and i' = i / (f + i) if `normalize`.

    fiv [B, T, 3H] holds the preactivations of the forget gate, the input gate and the candidate;
    returns a, b [B, T, H]. Source: Feng et al. 2024 (arXiv:2410.01201), section 3.2.
    """
    f, i, v = fiv.chunk(3, dim=-1)
    f, i = torch.sigmoid(f), torch.sigmoid(i)
    if normalize:
        f, i = f / (f + i), i / (f + i)
    return f, i * candidate(v)


def mingru_log_space(kv: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """minGRU as the paper computes it in parallel: cumulative sums of logarithms.

    Kept as the paper's definition and for comparison: its rounding error grows with T (1e-1 at a
    million tokens in fp32) and it needs h0 and candidates to be positive.
    kv [B, T, 2H], h0 [B, H] > 0 or None. Returns h [B, T, H], h_last [B, H].
    Source: Feng et al. 2024 (arXiv:2410.01201), appendix B.2.1 (Heinsen's scan).
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
