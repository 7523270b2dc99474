"""Formulas for parameters and FLOPs against what torch counts, and the pairs that a mask allows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.config import ModelConfig
from models.flops import (
    forward_flops_per_token,
    matrix_flops_per_token,
    mixing_flops_per_token,
    training_flops_per_token,
)
from models.lm import LanguageModel
from models.mixers import MIXERS

STEPS, WINDOW = 512, 48
ONE_BY_ONE = ("gru", "lstm", "gru_loop", "lstm_loop")  # counted step by step, which takes its time
SHAPES = [{}, {"kv_heads": 2, "mlp_ratio": 4.0}, {"gate": False, "expansion": 2.0, "layers": 3}]


def _config(mixer: object, **changes: object) -> ModelConfig:
    shape = {"layers": 2, "width": 64, "vocab_size": 100, "window": WINDOW}
    return ModelConfig(**{"mixer": mixer, **shape, **changes})


def _counted(config: ModelConfig) -> tuple[float, float, float]:
    """torch's count per token: products with weights, attention, and all of the backward."""
    model = LanguageModel(config)
    steps = 64 if config.mixer in ONE_BY_ONE else STEPS
    with torch.backends.mkldnn.flags(enabled=False):  # its LSTM is one operator, not counted
        with FlopCounterMode(display=False) as forward:
            logits, _ = model(torch.randint(100, (1, steps)), last=True)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    by_name = {str(op): n / steps for op, n in forward.get_flop_counts()["Global"].items()}
    attention = sum(n for name, n in by_name.items() if "attention" in name)
    return sum(by_name.values()) - attention, attention, backward.get_total_flops() / steps


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("mixer", [*MIXERS, ["mingru", "attention"]], ids=str)
def test_formula_equals_torchs_counter(mixer, changes):
    """To 1 %. torch counts the whole square of scores, the half above its diagonal too."""
    config = _config(mixer, **changes)
    matrices, attention, backward = _counted(config)
    assert matrix_flops_per_token(config) == pytest.approx(matrices, rel=0.01)
    if mixer != "window":
        square = config.layer_mixers().count("attention") * 4 * STEPS * config.width
        assert attention == pytest.approx(square, rel=0.01)
    # two products for each of the forward's; attention makes its scores once more
    assert backward == pytest.approx(2 * matrices + 2.5 * attention, rel=0.01)


@pytest.mark.parametrize(("mixer", "window"), [("attention", STEPS), ("window", WINDOW)])
def test_attention_counts_the_pairs_that_may_see_each_other(mixer, window):
    config = _config(mixer)
    pairs = torch.ones(STEPS, STEPS).tril().triu(1 - window).sum().item()
    expected = config.layers * pairs * 4 * config.width / STEPS
    assert mixing_flops_per_token(config, STEPS) == pytest.approx(expected, rel=1e-6)


def test_window_computes_less_than_twice_what_it_needs():
    """Blocks of half a window see one and a half, whatever T is."""
    config = _config("window")
    _, attention, _ = _counted(config)
    assert attention < 1.7 * mixing_flops_per_token(config, STEPS)


def test_training_is_three_forwards():
    config = _config("minlstm")
    assert training_flops_per_token(config, 64) == 3 * forward_flops_per_token(config, 64)
