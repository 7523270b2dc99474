"""Decision models: every mixer reads frames as it reads tokens, and sees no later one."""

from dataclasses import replace

import pytest
import torch

from models.build import build_model
from models.config import ModelConfig
from models.decision import DecisionModel
from models.flops import forward_flops_per_token, parameters
from models.mixers import MIXERS

SMALL = ModelConfig(layers=2, width=16, window=9, observation_width=5, action_width=3)
NUMBERS = 3 + 1 + 5


def _model(mixer: str) -> DecisionModel:
    model = build_model(replace(SMALL, mixer=mixer))
    assert isinstance(model, DecisionModel)
    return model.eval()


@pytest.mark.parametrize("mixer", MIXERS)
def test_frames_one_by_one_are_all_at_once(mixer):
    """What acts in an environment is what was trained."""
    model, frames = _model(mixer), torch.randn(2, 12, NUMBERS)
    whole, _ = model(frames)
    assert whole.shape == (2, 12, 3)
    assert whole.abs().max() <= 1
    carry, parts = None, []
    for frame in frames.split(1, dim=1):
        actions, carry = model(frame, carry)
        parts.append(actions)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.inference_mode()
def test_an_episode_that_is_played_has_a_carry_of_as_many_tensors_throughout(mixer):
    """In inference mode: a frame of three tokens is no piece of its own."""
    model, frames = _model(mixer), torch.randn(2, 12, NUMBERS)
    whole, _ = model(frames)
    carry, parts, counts = None, [], set()
    for frame in frames.split(1, dim=1):
        actions, carry = model(frame, carry)
        parts.append(actions)
        counts.add(sum(len(layer) for layer in carry))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert len(counts) == 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_action_sees_its_frame_and_none_after_it(mixer):
    model = _model(mixer)
    frames = torch.randn(1, 8, NUMBERS, requires_grad=True)
    actions, _ = model(frames)
    (seen,) = torch.autograd.grad(actions[0, 4].sum(), frames)
    assert (seen[0, 4].abs() > 0).all()  # each number of it
    assert seen[0, :4].abs().sum() > 0
    assert not seen[0, 5:].any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_episode_begins_anew(mixer):
    model, frames = _model(mixer), torch.randn(1, 10, NUMBERS)
    reset = torch.zeros(1, 10, dtype=torch.uint8)
    reset[0, 6] = 1
    both, _ = model(frames, reset=reset)
    alone, _ = model(frames[:, 6:])
    torch.testing.assert_close(both[:, 6:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_its_parameters_are_counted(mixer):
    config = replace(SMALL, mixer=mixer)
    assert parameters(config) == sum(p.numel() for p in _model(mixer).parameters())


def test_a_frame_costs_three_tokens_and_its_ends():
    frames, tokens = SMALL, replace(SMALL, observation_width=0, action_width=0)
    ends = 2 * 16 * (NUMBERS + 3) - 3 * 2 * 16 * tokens.vocab_size
    costs = forward_flops_per_token(frames, 10), forward_flops_per_token(tokens, 30)
    assert costs[0] == 3 * costs[1] + ends


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"observation_width": 0}, "observation_width"),
        ({"action_width": 0}, "action_width"),
        ({"tie_embeddings": True}, "tie_embeddings"),
    ],
)
def test_what_is_no_decision_model_is_told(changes, field):
    assert [name for name, _ in replace(SMALL, **changes).faults()] == [field]
