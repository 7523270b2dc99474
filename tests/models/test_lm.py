"""The language model: causal, streamable, its parameters counted exactly."""

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.flops import parameters
from models.lm import LanguageModel
from models.mixers import MIXERS
from models.scan import Problem
from models.scan.backend import summarize

VARIANTS = [
    {},
    {"conv_width": 0},
    {"gate": False},
    {"mlp_ratio": 0.0},
    {"expansion": 2.0, "conv_width": 2},
    {"normalize_gates": False},
    {"kv_heads": 2, "window": 2, "tie_embeddings": True},
    {"kv_heads": 1, "heads": 8, "window": 100, "rope_base": 500.0},
    {"attention_conv": 3, "state_size": 3, "s4d_init": "inv"},
]
RECURRENT = ("mingru", "minlstm")
HYBRIDS = (["mingru", "minlstm"], ["mingru", "window", "attention"])


def small(mixer: object, **changes: object) -> ModelConfig:
    shape = {"layers": 3, "width": 16, "vocab_size": 50, "window": 9}
    return ModelConfig(**{"mixer": mixer, **shape, **changes})


def tokens_and_reset(steps: int = 40) -> tuple[Tensor, Tensor]:
    reset = torch.zeros(2, steps, dtype=torch.uint8)
    reset[0, [0, 7, 8, 21]] = 1
    reset[1, 39] = 1
    return torch.randint(0, 50, (2, steps)), reset


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("mixer", [*MIXERS, *HYBRIDS], ids=str)
def test_parameters_are_counted_exactly(mixer, changes):
    config = small(mixer, **changes)
    assert parameters(config) == sum(p.numel() for p in LanguageModel(config).parameters())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("mixer", [*MIXERS, *HYBRIDS], ids=str)
def test_streamed_in_pieces_equals_whole(mixer, changes):
    """Segments of any length, single tokens too, with resets: decoding equals prefill."""
    model = LanguageModel(small(mixer, **changes)).double()
    tokens, reset = tokens_and_reset()
    whole, _ = model(tokens, reset=reset)
    torch.testing.assert_close(model(tokens, reset=reset, last=True)[0], whole)
    carry, pieces, begin = None, [], 0
    for length in (1, 1, 5, 2, 13, 1, 17):
        part = slice(begin, begin + length)
        logits, carry = model(tokens[:, part], carry, reset=reset[:, part])
        pieces.append(logits)
        begin += length
    assert begin == 40
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("mixer", [*MIXERS, *HYBRIDS], ids=str)
def test_a_carry_alone_is_that_beside_an_answer(mixer):
    """To the bit, over two segments; what only the answer needs does not run."""
    model, ran = LanguageModel(small(mixer)), []
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    if model.blocks[-1].mlp is not None:
        model.blocks[-1].mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    tokens = torch.randint(model.config.vocab_size, (2, 30))
    carry = expected = None
    for part in tokens.split(17, dim=1):
        ran.clear()
        nothing, carry = model(part, carry, readout=None)
        assert nothing is None
        assert not ran
        _, expected = model(part, expected)
    for layer, want in zip(carry, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer, want, strict=True))


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_the_future(mixer):
    """A non-causal convolution once gave a reimplementation a loss of 0.003."""
    model = LanguageModel(small(mixer))
    tokens, _ = tokens_and_reset()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 50
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


@pytest.mark.parametrize("mixer", MIXERS)
def test_reset_hides_everything_before_it(mixer):
    """A document reads as if it stood alone, from its first token on, and not one later."""
    model = LanguageModel(small(mixer)).double()
    tokens, _ = tokens_and_reset()
    reset = torch.zeros(2, 40, dtype=torch.uint8)
    reset[:, 15] = 1
    together, _ = model(tokens, reset=reset)
    alone, _ = model(tokens[:, 15:])
    torch.testing.assert_close(together[:, 15:], alone)
    without, _ = model(tokens)
    torch.testing.assert_close(together[:, :15], without[:, :15])


@pytest.mark.parametrize("mixer", [*MIXERS, *HYBRIDS], ids=str)
def test_every_token_in_turn_equals_whole_without_gradients(mixer):
    """Decoding as generation does it: caches grow in place, and a text may go on in two ways."""
    model = LanguageModel(small(mixer)).double()
    tokens, _ = tokens_and_reset(150)
    other = (tokens + 1) % 50
    other[:, :100] = tokens[:, :100]
    with torch.inference_mode():
        expected, expected_other = model(tokens)[0], model(other)[0]
        logits, carry = model(tokens[:, :70])
        pieces = [logits]
        for t in range(70, 150):
            if t == 100:
                fork = carry
            logits, carry = model(tokens[:, t : t + 1], carry)
            pieces.append(logits)
        for t in range(100, 150):
            logits, fork = model(other[:, t : t + 1], fork)
            torch.testing.assert_close(logits[:, 0], expected_other[:, t])
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_initial_memory_is_what_was_asked(mixer):
    """At a zero input the slowest channel keeps 1 - 1/m with m near memory_tokens."""
    model = LanguageModel(small(mixer, memory_tokens=1000.0, expansion=4.0))
    layer = model.blocks[0].mixer
    a, _ = layer.recurrence.gates((layer.preactivations.bias[None, None],))
    assert a.max().item() == pytest.approx(1 - 1 / 1000, abs=2e-4)
    assert a.min().item() == pytest.approx(1 - 1 / 2, abs=0.05)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_a_memory_of_a_hundred_million_tokens_means_what_it_says(mixer):
    """Every channel forgets, by 1/m of what it holds at a step, as the scan itself has it."""
    model = LanguageModel(small(mixer, memory_tokens=1e8, expansion=4.0))
    layer = model.blocks[0].mixer
    asked = 2 * 5e7 ** ((torch.arange(layer.state_width) + 0.5) / layer.state_width)
    preactivations = layer.preactivations.bias.detach()[None, None]
    for backend in ("native", "chunked"):
        span = summarize(backend, Problem(layer.recurrence, (preactivations,)))
        torch.testing.assert_close(1 / (1 - span.decay[0]), asked.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_initial_loss_is_log_of_the_vocabulary(tied):
    model = LanguageModel(small("mingru", tie_embeddings=tied))
    tokens, _ = tokens_and_reset()
    logits, _ = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)
