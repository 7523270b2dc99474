"""What a reset is: a mask over steps, set where a document starts and nothing before is seen."""

import torch
from torch import Tensor


def reset_fault(reset: Tensor, batch: int, steps: int) -> str | None:
    """What is wrong with a mask [B, T]; whatever is not zero in it is a reset."""
    if reset.shape != (batch, steps):
        return f"reset must be [B, T] = {[batch, steps]}, got {tuple(reset.shape)}"
    if reset.dtype not in (torch.bool, torch.uint8):
        return f"reset must be bool or uint8, got {reset.dtype}: give `mask != 0`"
    return None


def check_reset(reset: Tensor | None, x: Tensor) -> None:
    """Raises ValueError where it is no mask of the steps of x [B, T, ...]."""
    if reset is not None and (fault := reset_fault(reset, x.shape[0], x.shape[1])):
        raise ValueError(fault)
