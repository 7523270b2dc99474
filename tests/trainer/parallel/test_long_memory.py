"""Memories longer than the sequence, over 1 to 8 ranks: sharded equals whole, to 1e-6."""

import pytest
import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from tests.distributed import run_distributed
from tests.models.scan.long_memory import LONG, bound, exact_results, long_inputs, results
from trainer.parallel.carry import CarryExchange
from trainer.parallel.sharded import parallelize
from trainer.parallel.topology import Topology

pytestmark = pytest.mark.slow

STEPS = 3 << 16
TEXT = 1 << 20


def _check_scans(steps: int, memories: list[float]) -> float:
    """On every rank: the largest error of its shard, over what is allowed."""
    group = Topology(torch.distributed.get_world_size()).sequence
    mine = slice(group.rank * steps // group.size, (group.rank + 1) * steps // group.size)
    worst = 0.0
    for name in LONG:
        for memory in memories:
            inputs = long_inputs(name, memory, steps, 16, width=2)
            shard = tuple(x.detach()[:, mine].clone().requires_grad_() for x in inputs)
            exact = exact_results(name, inputs, steps).shard(mine)
            got = results(name, shard, steps, exchange=CarryExchange(group))
            errors = got.errors(exact)
            worst = max(worst, *(error / bound(memory, steps) for error in errors.values()))
    return worst


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_sharded_scans_are_exact(ranks):
    assert max(run_distributed(_check_scans, ranks, STEPS, [300.0, 1e5, 1e7])) < 1


def _check_model(period: int) -> tuple[float, float]:
    """On every rank: how far logits are from fp64's, sharded and whole; of the largest logit.

    A text of a million tokens that repeats, in a model that remembers a million.
    """
    topology = Topology(torch.distributed.get_world_size())
    config = ModelConfig(
        layers=2, width=16, vocab_size=17, conv_width=4, mlp_ratio=1, memory_tokens=1e6
    )
    tokens = torch.randint(0, 17, (1, period)).repeat(1, TEXT // period)
    rank = topology.sequence.rank
    mine = slice(rank * TEXT // topology.sp_size, (rank + 1) * TEXT // topology.sp_size)

    def logits(dtype: torch.dtype, sharded: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = LanguageModel(config).to(dtype)
        if sharded:
            parallelize(model, topology)
            return model(tokens[:, mine], last=True)[0].double()
        return model(tokens, last=True)[0][:, mine].double()

    with torch.no_grad():
        exact = logits(torch.float64, sharded=False)
        errors = [(logits(torch.float32, s) - exact).abs().max() for s in (True, False)]
    return float(errors[0] / exact.abs().max()), float(errors[1] / exact.abs().max())


@pytest.mark.parametrize("period", [1, 16])
def test_a_model_of_a_million_tokens_memory_is_exact(period):
    for errors in run_distributed(_check_model, 2, period):
        assert max(errors) < 1e-5
