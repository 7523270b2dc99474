"""Parameters and floating-point operations of a model, from its configuration.

Parameters and matrices are counted on the modules themselves, built without memory behind them;
what moves along the sequence is declared with each mixer (models/mixers).
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from models.block import Block
from models.config import ModelConfig
from models.mixers import MIXERS

WITH_MATRICES = (nn.Linear, nn.RNNBase)  # each weight [M, N] of theirs is a product per token


def parameters(config: ModelConfig) -> int:
    """Number of trainable numbers of `LanguageModel(config)`, exactly."""
    ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.width + config.width
    return ends + sum(
        count * sum(p.numel() for p in block.parameters()) for block, count in _blocks(config)
    )


def matrix_flops_per_token(config: ModelConfig) -> int:
    """Products with weights in one forward pass per token, a multiply-add as two."""
    matrices = config.width * config.vocab_size
    for block, count in _blocks(config):
        layers = (module for module in block.modules() if isinstance(module, WITH_MATRICES))
        weights = (p for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2)
        matrices += count * sum(weight.numel() for weight in weights)
    return 2 * matrices


def mixing_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """What moves along the sequence in one forward pass, the mean over `seq_len` tokens.

    Attention counts the tokens that a query may see and no others, whatever a kernel computes
    besides; a recurrence its gates, state and convolution.
    """
    return sum(MIXERS[name].mixing_flops(config, seq_len) for name in config.layer_mixers())


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """One forward pass per token of a sequence of `seq_len` tokens."""
    return matrix_flops_per_token(config) + mixing_flops_per_token(config, seq_len)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward: the backward costs two forwards, as for any matrix product.

    What a kernel computes again in its backward is not counted, as is the custom for MFU.
    """
    return 3 * forward_flops_per_token(config, seq_len)


def _blocks(config: ModelConfig) -> Iterator[tuple[Block, int]]:
    """One block for each mixer of the stack, and how many layers have it."""
    with torch.device("meta"):
        for name, count in Counter(config.layer_mixers()).items():
            yield Block(config, name), count
