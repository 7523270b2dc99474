"""Models of equal size: the solver against the exact count of parameters."""

import pytest

from models.config import ModelConfig
from models.flops import parameters
from models.lm import LanguageModel
from models.match import match_parameters
from models.mixers import MIXERS

HYBRID = ["mingru", "mingru", "window"]


@pytest.mark.parametrize("by", ["width", "layers"])
@pytest.mark.parametrize("mixer", [*MIXERS, HYBRID], ids=str)
def test_parameters_agree_within_two_percent(mixer, by):
    start = {"width": {"layers": 6, "width": 400}, "layers": {"layers": 30, "width": 96}}[by]
    config = ModelConfig(mixer=mixer, heads=4, kv_heads=1, **start)
    solved = match_parameters(config, 1_000_000, by)
    exact = sum(p.numel() for p in LanguageModel(solved).parameters())
    assert exact == parameters(solved)
    assert abs(exact - 1_000_000) <= 20_000
    assert not solved.faults()
    kept, solved_for = ("layers", "width") if by == "width" else ("width", "layers")
    assert getattr(solved, kept) == getattr(config, kept)
    assert getattr(solved, solved_for) != getattr(config, solved_for)
    assert solved.mlp_ratio == pytest.approx(config.mlp_ratio, rel=0.35)


def test_without_an_mlp_the_width_alone_must_fit():
    solved = match_parameters(ModelConfig(mlp_ratio=0.0, width=64), 2_000_000)
    assert solved.mlp_width == 0
    assert parameters(solved) == pytest.approx(2_000_000, rel=0.02)


def test_a_size_that_does_not_exist_is_told():
    with pytest.raises(ValueError, match="choose another number of parameters"):
        match_parameters(ModelConfig(mlp_ratio=0.0, vocab_size=100_000), 1_000)
