"""Carries, as somebody's own code meets them: what they cost, what is no carry, mixed precision."""

import pytest
import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixer import build_mixer
from models.mixers import MIXERS

SMALL = ModelConfig(layers=1, width=16, vocab_size=50, window=9, attention_conv=4)
HYBRID = ModelConfig(mixer=["mingru", "window", "attention"], layers=3, width=16, vocab_size=50)


@pytest.mark.parametrize("name", MIXERS)
def test_a_segment_without_a_step_is_refused(name):
    """At the beginning or later: torch's attention would end the process."""
    mixer = build_mixer(name, SMALL)
    _, carry = mixer(torch.randn(2, 5, 16))
    for entering in (None, carry):
        with pytest.raises(ValueError, match="at least one step"):
            mixer(torch.randn(2, 0, 16), entering)


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "attention"])
def test_a_carry_keeps_nothing_else_alive(name):
    """Of attention it grows; all others' are of one size, and no view of a segment's tensors."""
    _, carry = build_mixer(name, SMALL)(torch.randn(2, 300, 16))
    for state in carry:
        assert state.untyped_storage().nbytes() <= 2 * max(1, state.numel()) * state.itemsize


@pytest.mark.parametrize("name", MIXERS)
def test_a_carry_of_the_last_segment_is_not_gone_on_from(name):
    x = torch.randn(2, 20, 16)
    mixer = build_mixer(name, SMALL)
    _, ended = mixer(x, last=True)
    with pytest.raises(ValueError, match="cannot be gone on from"):
        mixer(x, ended)
    model = LanguageModel(HYBRID)
    tokens = torch.randint(50, (2, 20))
    _, ended = model(tokens, last=True)
    with pytest.raises(ValueError, match="of 0 layers, the model has 3"):
        model(tokens, ended)


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_is_not_rounded_under_autocast(name):
    """A memory of thousands of steps gains in each less than bf16 can tell."""
    config = ModelConfig(layers=1, width=16, window=9, memory_tokens=10_000)
    mixer = build_mixer(name, config)
    x = torch.randn(2, 2000, 16)
    with torch.no_grad():
        wide, _ = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, carry = mixer(x)
    assert (y.float() - wide).abs().max() < 0.03 * wide.abs().max()
    if name not in ("attention", "window"):
        assert carry[0].dtype == torch.float32


def test_a_model_goes_on_in_another_dtype():
    """In the middle of decoding, where attention has written a token into its piece."""
    model = LanguageModel(HYBRID)
    tokens = torch.randint(50, (1, 12))
    with torch.inference_mode():
        _, carry = model(tokens[:, :10])
        _, carry = model(tokens[:, 10:11], carry)
        wide, _ = model(tokens[:, 11:], carry)
        narrow, _ = model.bfloat16()(tokens[:, 11:], carry)
    torch.testing.assert_close(narrow.float(), wide, atol=0.02, rtol=0.1)


def test_a_configuration_with_faults_makes_no_model():
    with pytest.raises(ValueError, match=r"ModelConfig.mixer: 'minGRU' is not one of mingru"):
        LanguageModel(ModelConfig(mixer="minGRU"))
