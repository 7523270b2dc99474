"""Parameters and floating-point operations of a model, from its shape alone."""

from models.config import ModelConfig
from models.scan import RECURRENCES

# Gates and h = a * h + b, per channel and token.
_GATE_FLOPS = {"mingru": 12, "minlstm": 20}


def parameters(config: ModelConfig) -> int:
    """Number of trainable numbers of `LanguageModel(config)`, exactly."""
    width = config.width
    total = (1 if config.tie_embeddings else 2) * config.vocab_size * width + width
    for mixer in config.layer_mixers():
        total += width + _mixer_matrices(config, mixer)  # norm first
        if mixer in RECURRENCES:
            total += RECURRENCES[mixer].parts * config.state_width
            if config.conv_width:
                total += (config.conv_width + 1) * width
        if config.mlp_width:
            total += width + 3 * width * config.mlp_width
    return total


def matrix_flops_per_token(config: ModelConfig) -> int:
    """Products with weights in one forward pass per token, a multiply-add as two."""
    matrices = config.width * config.vocab_size
    for mixer in config.layer_mixers():
        matrices += _mixer_matrices(config, mixer) + 3 * config.width * config.mlp_width
    return 2 * matrices


def mixing_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """What moves along the sequence in one forward pass, the mean over `seq_len` tokens.

    Attention counts the scores and the weighted values of the tokens that a query may see and no
    others, whatever a kernel computes besides; a recurrence its gates, state and convolution.
    """
    total = 0.0
    for mixer in config.layer_mixers():
        if mixer in RECURRENCES:
            total += _GATE_FLOPS[mixer] * config.state_width
            total += 2 * config.conv_width * config.width
        else:
            window = seq_len if mixer == "attention" else min(config.window, seq_len)
            visible = window - window * (window - 1) / (2 * seq_len)
            total += 4 * visible * config.width
    return total


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """One forward pass per token of a sequence of `seq_len` tokens."""
    return matrix_flops_per_token(config) + mixing_flops_per_token(config, seq_len)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward: the backward costs two forwards, as for any matrix product.

    What a kernel computes again in its backward is not counted, as is the custom for MFU.
    """
    return 3 * forward_flops_per_token(config, seq_len)


def _mixer_matrices(config: ModelConfig, mixer: str) -> int:
    """Numbers in the matrices of a mixer."""
    width, state = config.width, config.state_width
    if mixer in RECURRENCES:
        return (RECURRENCES[mixer].parts + 1 + bool(config.gate)) * width * state
    return 2 * width * (width + width // config.heads * config.shared_kv_heads)
