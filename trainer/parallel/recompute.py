"""Activation checkpointing: a block's activations are computed again in its backward.

What crossed the sequence is not: spans and the results of exchanges are small, a few [B, H] per
layer (on a GPU the maps of chunks besides, at most a sixteenth of h) or a window's halo, and are
kept. So these exchanges do not run twice. Full attention's all-to-all does: what it brings is as
large as what is not to be kept.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from models.stack import Stack
from trainer.parallel import sequence_group  # noqa: F401  defines the operators named here

_OPERATORS = torch.ops.longhaul
KEPT = (
    _OPERATORS.scan_summarize.default,
    _OPERATORS.all_gather.default,
    _OPERATORS.broadcast.default,
    _OPERATORS.shift.default,
)


def recompute_blocks(model: Stack) -> None:
    """Keep only the input of each block, and what KEPT names; call it before DeepSpeed wraps it."""
    model.call_block = _call


def _call(block: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return block(*args, **kwargs)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
