"""Generation: the same text however the prompt is read, and a carry that does not grow."""

import pytest
import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixers import MIXERS
from trainer.generate import Sampling, generate


def tiny(mixer: str) -> LanguageModel:
    torch.manual_seed(1)
    config = ModelConfig(mixer=mixer, layers=2, width=16, vocab_size=40, window=9)
    return LanguageModel(config).eval()


@pytest.mark.parametrize("mixer", MIXERS)
def test_prompt_in_segments_equals_prompt_at_once_and_full_prefill(mixer):
    model = tiny(mixer)
    prompt = torch.randint(0, 40, (50,)).tolist()
    greedy = Sampling(temperature=0.0)
    whole = list(generate(model, prompt, 12, greedy, segment_tokens=100))
    assert list(generate(model, prompt, 12, greedy, segment_tokens=1)) == whole
    assert list(generate(model, prompt, 12, greedy, segment_tokens=7)) == whole
    text = list(prompt)  # the definition: the whole text again for every token
    for token in whole:
        logits, _ = model(torch.tensor([text]))
        assert int(logits[0, -1].argmax()) == token
        text.append(token)


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "window"])
def test_carry_has_one_size_whatever_was_read(mixer):
    model = tiny(mixer)

    def size(tokens: int) -> int:
        _, carry = model(torch.zeros(1, tokens, dtype=torch.int64))
        return sum(x.numel() for layer in carry for x in layer)

    assert size(1) == size(100) == size(3000)


def test_seed_decides_the_sample():
    model = tiny("mingru")
    first = list(generate(model, [1, 2, 3], 30, Sampling(seed=5)))
    assert first == list(generate(model, [1, 2, 3], 30, Sampling(seed=5)))
    assert first != list(generate(model, [1, 2, 3], 30, Sampling(seed=6)))
    assert list(generate(model, [1], 9, Sampling(top_k=1))) == list(
        generate(model, [1], 9, Sampling(temperature=0.0))
    )


def test_only_likely_and_known_tokens_are_drawn():
    """Of four with chances 0.5, 0.25, 0.15, 0.1."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**chosen: object) -> set[int]:
        sampling = Sampling(**chosen)
        return {int(sampling.draw(logits, generator)) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_p=0.7) == {0, 1}
    assert drawn(top_p=0.4) == {0}
    assert drawn(top_k=3, top_p=0.99) == {0, 1, 2}
    assert drawn(known=torch.tensor([False, True, False, True])) == {1, 3}
    assert drawn(known=torch.tensor([False, True, False, True]), temperature=0.0) == {1}
    assert drawn(temperature=1e-30) == {0}


def test_no_more_than_top_k_are_drawn_among_equals():
    generator = torch.Generator().manual_seed(0)
    drawn = {int(Sampling(top_k=2).draw(torch.zeros(5), generator)) for _ in range(100)}
    assert len(drawn) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(bad, temperature):
    with pytest.raises(ValueError, match="not finite"):
        Sampling(temperature).draw(torch.tensor([0.0, bad]), torch.Generator())


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "the prompt is empty"), ([40], "has token 40"), ([3, -1], "has token -1")],
)
def test_bad_prompts_are_told(prompt, said):
    with pytest.raises(ValueError, match=said):
        next(generate(tiny("mingru"), prompt, 1, Sampling()))


def test_a_prompt_is_never_whole_in_memory():
    """Of an endless one no more is taken than a segment beyond what is read."""
    taken, read = [0], [0]

    def endless():
        while True:
            taken[0] += 1
            yield 1

    def on_read(tokens: int) -> None:
        assert taken[0] - read[0] == 64
        read[0] = tokens
        if tokens == 640:
            raise StopIteration("enough")

    with pytest.raises(RuntimeError, match="StopIteration"):
        next(generate(tiny("mingru"), endless(), 1, Sampling(), 64, on_read))
