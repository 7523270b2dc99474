"""AdamW, what it decays, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from trainer.config import OptimConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, memory_tokens: float = 1
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, never on recurrence gates, norms or embeddings."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keep = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
        keep = keep or name.startswith("embed.") or ".conv." in name
        (plain if keep else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps_for(memory_tokens),
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then a cosine to final_ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    ratio = config.final_ratio + (1 - config.final_ratio) * cosine
    return config.learning_rate * ratio
