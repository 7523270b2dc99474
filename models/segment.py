"""What a segment is: steps, one at least, and resets, set where a document starts afresh."""

import torch
from torch import Tensor


def reset_fault(reset: Tensor, batch: int, steps: int) -> str | None:
    """What is wrong with a mask [B, T]; whatever is not zero in it is a reset."""
    if reset.shape != (batch, steps):
        return f"reset must be [B, T] = {[batch, steps]}, got {tuple(reset.shape)}"
    if reset.dtype not in (torch.bool, torch.uint8):
        return f"reset must be bool or uint8, got {reset.dtype}: give `mask != 0`"
    return None


def check_segment(x: Tensor, reset: Tensor | None) -> None:
    """Raises ValueError where x [B, T, ...] has no step, or reset is no mask of its steps."""
    if not x.shape[1]:
        raise ValueError(f"a segment needs at least one step, got [B, T, ...] = {list(x.shape)}")
    if reset is not None and (fault := reset_fault(reset, x.shape[0], x.shape[1])):
        raise ValueError(fault)
