"""Activation checkpointing: the same gradients, blocks run twice, small exchanges once."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import ModelConfig
from models.lm import LanguageModel
from models.scan import scan
from tests.distributed import run_distributed
from tests.models.scan.cases import RECURRENCES, make_inputs
from tests.trainer.runs import figures, train_here
from trainer.parallel import recompute
from trainer.parallel.carry import CarryExchange
from trainer.parallel.recompute import KEPT, recompute_blocks
from trainer.parallel.sharded import parallelize
from trainer.parallel.topology import Topology

pytestmark = pytest.mark.slow


class CountOperators(TorchDispatchMode):
    """How often each of our operators runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "longhaul":
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _one_step(mixer: str, recompute: bool) -> tuple[list[Tensor], Counter[str], int]:
    """Gradients, operator calls and bytes sent by forward and backward of a sharded model."""
    torch.manual_seed(0)
    topology = Topology(sp_size=2)
    config = ModelConfig(vocab_size=11, width=8, layers=3, mixer=mixer, window=5, kv_heads=1)
    model = LanguageModel(config)
    parallelize(model, topology)
    if recompute:
        recompute_blocks(model)
    tokens = torch.randint(11, (2, 32))[:, topology.rank * 16 :][:, :16]
    counter = CountOperators()
    with counter:
        logits, _ = model(tokens)
        logits.square().sum().backward()
    sent = topology.sequence.meter.take()[1]
    return [p.grad for p in model.parameters()], counter.counts, sent


def _check(mixer: str) -> None:
    plain, once, sent = _one_step(mixer, recompute=False)
    again, twice, sent_again = _one_step(mixer, recompute=True)
    for got, want in zip(again, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert sent_again == sent > 0
    layers = 3
    if mixer in RECURRENCES:
        assert once["longhaul::scan_forward"] == layers
        assert twice["longhaul::scan_forward"] == 2 * layers
    kept = [operator.name() for operator in KEPT if once[operator.name()]]
    assert kept
    for operator in kept:
        assert once[operator] == twice[operator], operator


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "window", "gru", "lstm", "s4d", "mamba"])
def test_exchanges_run_once(mixer):
    run_distributed(_check, 2, mixer)


def _check_attention() -> None:
    plain, once, sent = _one_step("attention", recompute=False)
    again, twice, sent_again = _one_step("attention", recompute=True)
    for got, want in zip(again, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    layers, name = 3, "longhaul::all_to_all"
    assert once[name] == 4 * layers  # heads to ranks and back, both ways
    assert twice[name] == 6 * layers
    # half of: 2 sequences of 16 tokens, 4 heads there and back, 2 copies of a head of k and of v
    assert sent_again - sent == layers * 2 * 16 * (4 + 4 + 2 + 2) * 2 * 4 // 2


def test_what_attention_exchanges_is_exchanged_again():
    """It is as large as what is not to be kept; the gradients are the same."""
    run_distributed(_check_attention, 2)


def _train_each(config_file, stage: int) -> dict:
    """On every rank: the figures of runs that differ in what they keep and compile.

    Each does what it was asked: an option that did nothing would be equal too.
    """
    runs, done = {}, Counter[str]()
    for owner, name in ((recompute, "_call"), (torch.nn.Module, "compile")):
        _count(owner, name, done)
    for option in ("none", "recompute", "compile", "recompute compile"):
        overrides = [
            "parallel.sp=2",
            "evaluate.sequences=0",
            f"deepspeed.zero_stage={stage}",
            f"train.recompute={'recompute' in option}",
            f"train.compile={'compile' in option}",
            f"run.dir={config_file.parent / option.replace(' ', '-')}",
        ]
        done.clear()
        runs[option] = figures(train_here(config_file, overrides))
        assert {name for name in done} == {
            made
            for asked, made in (("recompute", "_call"), ("compile", "compile"))
            if asked in option
        }
    return runs


def _count(owner: Any, name: str, done: Counter[str]) -> None:
    """How often that is called; in this process alone, which serves no other test."""
    inner = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        done[name] += 1
        return inner(*args, **kwargs)

    setattr(owner, name, counted)


@pytest.mark.parametrize("stage", [0, 3])
def test_training_is_the_same(config_file, stage):
    runs = run_distributed(_train_each, 2, config_file, stage, timeout=120, fresh=True)[0]
    plain = torch.tensor(runs.pop("none"))
    assert len(plain) == 5
    for option, run in runs.items():
        torch.testing.assert_close(torch.tensor(run), plain, rtol=1e-5, atol=0, msg=option)


def _compile() -> None:
    group = Topology(sp_size=2).sequence
    for name, recurrence in RECURRENCES.items():
        inputs = make_inputs(recurrence, 2, 16, 3, torch.float32)
        h0 = torch.randn(2, 3, requires_grad=True)

        def loss(h0: Tensor, *inputs: Tensor, recurrence: Any = recurrence) -> Tensor:
            h, h_last = scan(recurrence, inputs, h0, exchange=CarryExchange(group))
            return h.square().sum() + h_last.sum()

        leaves = (h0, *inputs)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got, want = compiled(*leaves), loss(*leaves)
        torch.testing.assert_close(got, want, msg=name)
        for actual, expected in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
        ):
            torch.testing.assert_close(actual, expected, msg=name)


def test_the_sharded_scan_compiles_to_one_graph():
    run_distributed(_compile, 2)
