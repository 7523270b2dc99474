"""The learning rate against figures worked out by hand, and what weight decay reaches."""

import pytest
import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from trainer.config import OptimConfig
from trainer.optim import build_optimizer, learning_rate

# 1e-3, four steps of warm-up, then a cosine over the sixteen that are left, down to a tenth
CONFIG = OptimConfig(learning_rate=1e-3, warmup_steps=4, final_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 2.5e-4),
        (1, 5.0e-4),
        (3, 1.0e-3),
        (4, 1.0e-3),
        (8, 8.681980515339464e-4),  # 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
        (12, 5.5e-4),
        (16, 2.318019484660536e-4),
        (20, 1.0e-4),
        (1000, 1.0e-4),
    ],
)
def test_rate_of_a_step(step, rate):
    assert learning_rate(step, 20, CONFIG) == pytest.approx(rate, rel=1e-12)


def test_without_warm_up_the_first_rate_is_the_highest():
    config = OptimConfig(learning_rate=2.0, warmup_steps=0, final_ratio=0.0)
    rates = [learning_rate(step, 4, config) for step in range(5)]
    assert rates == pytest.approx(
        [2.0, 1.7071067811865475, 1.0, 0.2928932188134524, 0.0], abs=1e-15
    )


def test_only_matrices_decay():
    model = LanguageModel(ModelConfig(mixer=["mingru", "attention"], layers=2, width=16))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    decayed = {name for name, p in model.named_parameters() if decays[id(p)] == 0.3}
    assert decayed == {
        "head.weight",
        *(f"blocks.0.mixer.{name}.weight" for name in ("gate", "out")),
        *(f"blocks.1.mixer.{name}.weight" for name in ("qkv", "out")),
        *(f"blocks.{i}.mlp.{name}.weight" for i in (0, 1) for name in ("gate_and_in", "out")),
    }
    assert {decays[id(p)] for p in model.parameters()} == {0.0, 0.3}


def test_a_step_is_adamw():
    """One number, two steps, by hand."""
    weight = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        weight.weight.fill_(2.0)
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.99, eps=0.0)
    optimizer = build_optimizer(weight, config)
    for gradient, expected in ((1.0, 1.8), (3.0, 1.8 * 0.95 - 0.1 * 2.0526315789 / 2.2416517)):
        weight.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        # m: 0.1, 0.39 over 0.1, 0.19; v: 0.01, 0.0999 over 0.01, 0.0199
        assert weight.weight.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("eps", "least", "most"), [(1e-8, 0.0, 0.01), (None, 0.3, 1.1)])
def test_a_gate_that_hardly_opens_is_learned_below_its_gradient(eps, least, most):
    """With a memory of 1e8 tokens it opens by 1e-8; Adam's usual eps would leave it so."""
    torch.manual_seed(0)
    config = ModelConfig(mixer="mingru", layers=1, width=16, vocab_size=16, memory_tokens=1e8)
    model = LanguageModel(config)
    gates = model.get_submodule("blocks.0.mixer.preactivations").get_parameter("weight")
    before = gates.detach().clone()
    settings = OptimConfig(learning_rate=1e-3, eps=eps)
    optimizer = build_optimizer(model, settings, config.memory_tokens)
    tokens = torch.randint(16, (4, 33))
    logits, _ = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    longest = (gates - before)[config.state_width - 1].abs().median() / 1e-3
    assert least <= longest <= most


@pytest.mark.parametrize(("memory", "eps"), [(1024, 1e-8), (1e4, 1e-8), (1e6, 1e-12)])
def test_eps_lies_below_the_gradients_of_the_longest_memory(memory, eps):
    optimizer = build_optimizer(torch.nn.Linear(1, 1), OptimConfig(), memory)
    assert [group["eps"] for group in optimizer.param_groups] == [pytest.approx(eps)] * 2
