"""Parameters and floating-point operations of a model, from its shape alone."""

from models.config import ModelConfig
from models.scan import RECURRENCES

_GATE_FLOPS = {"mingru": 12, "minlstm": 20}  # gates and h = a * h + b, per channel and token


def parameters(config: ModelConfig) -> int:
    """Number of trainable numbers of `LanguageModel(config)`, exactly."""
    width, state = config.width, config.state_width
    total = 2 * config.vocab_size * width + width
    for mixer in config.layer_mixers():
        parts = RECURRENCES[mixer].parts
        total += width  # norm
        total += parts * state * (width + 1) + state * width
        if config.conv_width:
            total += (config.conv_width + 1) * width
        if config.gate:
            total += state * width
        if config.mlp_width:
            total += width + 3 * width * config.mlp_width
    return total


def forward_flops_per_token(config: ModelConfig) -> int:
    """Multiplications and additions of one forward pass per token, a multiply-add as two."""
    width, state = config.width, config.state_width
    total = 2 * width * config.vocab_size
    for mixer in config.layer_mixers():
        matrices = (RECURRENCES[mixer].parts + 1 + bool(config.gate)) * width * state
        matrices += 3 * width * config.mlp_width
        total += 2 * matrices + 2 * config.conv_width * width + _GATE_FLOPS[mixer] * state
    return total


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward: the backward costs two forwards, as for any matrix product."""
    return 3 * forward_flops_per_token(config)
