"""Parameters and floating-point operations of a model, from its configuration.

Parameters and matrices are counted on the modules themselves, built without memory behind them;
what moves along the sequence is declared with each mixer (models/mixers).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models.block import Block
from models.config import TOKENS_OF_FRAME, ModelConfig
from models.mixers import MIXERS

WITH_MATRICES = (nn.Linear, nn.RNNBase)  # each weight [M, N] of theirs is a product per token


def parameters(config: ModelConfig) -> int:
    """Number of trainable numbers of `build_model(config)`, exactly."""
    if config.of_frames:
        read = config.action_width + 1 + config.observation_width + TOKENS_OF_FRAME  # with biases
        ends = read + config.action_width
    else:
        ends = (1 if config.tie_embeddings else 2) * config.vocab_size
    return (ends + 1) * config.width + sum(
        count * sum(p.numel() for p in block.parameters()) for block, count in _blocks(config)
    )


def matrix_flops_per_token(config: ModelConfig) -> int:
    """Products with weights in one forward pass per token, a multiply-add as two.

    A decision model's token is a frame.
    """
    if config.of_frames:
        ends = 2 * config.action_width + 1 + config.observation_width
    else:
        ends = config.vocab_size
    matrices = config.width * ends
    for block, count in _blocks(config):
        layers = (module for module in block.modules() if isinstance(module, WITH_MATRICES))
        weights = (p for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2)
        matrices += count * config.tokens_of_input * sum(weight.numel() for weight in weights)
    return 2 * matrices


def mixing_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """What moves along the sequence in one forward pass, the mean over `seq_len` tokens.

    Attention counts the tokens that a query may see and no others, whatever a kernel computes
    besides, but where documents end (`data.reset_state`) it does not know; a recurrence its gates,
    state and convolution.
    """
    tokens = config.tokens_of_input
    mixers = (MIXERS[name] for name in config.layer_mixers())
    return tokens * sum(mixer.mixing_flops(config, tokens * seq_len) for mixer in mixers)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """One forward pass per token of a sequence of `seq_len` tokens."""
    return matrix_flops_per_token(config) + mixing_flops_per_token(config, seq_len)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward: the backward costs two forwards, as for any matrix product.

    What a kernel computes again in its backward is not counted, as is the custom for MFU.
    """
    return 3 * forward_flops_per_token(config, seq_len)


class _Undrawn(TorchFunctionMode):
    """Draws no values: there is no memory for them, and torch would import its compiler (1.5 s).

    What mixers compute of their initial values they compute on the CPU, for the same reason.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _blocks(config: ModelConfig) -> Iterator[tuple[Block, int]]:
    """One block for each mixer of the stack, and how many layers have it."""
    with torch.device("meta"), _Undrawn():
        for name, count in Counter(config.layer_mixers()).items():
            yield Block(config, name), count
