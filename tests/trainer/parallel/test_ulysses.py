"""Attention over real processes against one process, in fp64: by all-to-all, windows by halo."""

import pytest
import torch
from torch import Tensor

from models.cache import Cache
from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixer import LocalOps
from models.mixers import MIXERS
from models.softmax_attention import QKV
from tests.distributed import run_distributed
from tests.models.scan.cases import make_reset
from trainer.parallel.sharded import ShardedOps, parallelize
from trainer.parallel.topology import Topology

pytestmark = pytest.mark.slow

BATCH, SHARD, WIDTH, BASE = 2, 6, 4, 100.0
HEADS = (
    (12, 12),
    (12, 1),
    (12, 4),
    (12, 6),
)  # kv heads fewer than, not dividing, dividing the ranks


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _check_attend() -> int:
    """On every rank: outputs of two segments and all gradients equal one process's."""
    group = Topology(sp_size=torch.distributed.get_world_size()).sequence
    local, sharded, checked = LocalOps(), ShardedOps(group), 0
    tokens = SHARD * group.size
    mine = slice(group.rank * SHARD, (group.rank + 1) * SHARD)
    for heads, kv_heads in HEADS:
        for where in ("none", "random"):
            torch.manual_seed(heads + kv_heads)
            segments = [
                [_leaf(BATCH, tokens, n, WIDTH) for n in (heads, kv_heads, kv_heads)] for _ in "ab"
            ]
            resets = [make_reset(BATCH, tokens, where) for _ in "ab"]
            cache, shard_cache = Cache.empty(BATCH), Cache.empty(BATCH)
            pairs, got_grads, outputs, shard_outputs, shards = [], [], [], [], []
            for qkv, reset in zip(segments, resets, strict=True):
                part = [x.detach()[:, mine].clone().requires_grad_() for x in qkv]
                part_reset = None if reset is None else reset[:, mine]
                # nothing is kept where nothing follows
                again, nothing = sharded.attend(QKV(*part), shard_cache, part_reset, BASE, True)
                assert nothing is None
                y, cache = local.attend(QKV(*qkv), cache, reset, BASE, False)
                got, shard_cache = sharded.attend(QKV(*part), shard_cache, part_reset, BASE, False)
                assert shard_cache.pieces[-1].numel() <= cache.pieces[-1].numel()
                pairs += [(got, y[:, mine]), (again, got)]
                pairs += list(zip(shard_cache[:2], cache[:2], strict=True))
                outputs.append(y)
                shard_outputs.append(got)
                shards.append(part)
            cots = [torch.randn_like(y) for y in outputs]
            want = torch.autograd.grad(outputs, [x for each in segments for x in each], cots)
            got_grads = torch.autograd.grad(
                shard_outputs, [x for each in shards for x in each], [cot[:, mine] for cot in cots]
            )
            pairs += [(g, w[:, mine]) for g, w in zip(got_grads, want, strict=True)]
            for actual, reference in pairs:
                torch.testing.assert_close(actual, reference)
            checked += 1
    return checked


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_attention_over_ranks_equals_one(ranks):
    assert run_distributed(_check_attend, ranks) == [len(HEADS) * 2] * ranks


def _check_model(mixer: object, shard: int) -> float:
    """On every rank: logits and gradients of a sharded model equal those of the whole, in fp64."""
    topology = Topology(sp_size=torch.distributed.get_world_size())
    tokens = torch.randint(11, (BATCH, shard * topology.sp_size))
    reset = make_reset(BATCH, tokens.shape[1], "random")
    config = ModelConfig(
        mixer=mixer, layers=3, width=16, vocab_size=11, kv_heads=2, window=7, expansion=1.5
    )
    torch.manual_seed(1)
    model = LanguageModel(config).double()
    logits, carry = model(tokens, reset=reset)
    cotangent = torch.randn_like(logits)
    want = torch.autograd.grad(logits, list(model.parameters()), cotangent)
    parallelize(model, topology)
    mine = slice(topology.sp_rank * shard, (topology.sp_rank + 1) * shard)
    got_logits, got_carry = model(tokens[:, mine], reset=reset[:, mine])
    torch.testing.assert_close(got_logits, logits[:, mine])
    for layer, got_layer in zip(carry, got_carry, strict=True):
        for state, got_state in zip(layer, got_layer, strict=True):
            if state.shape != got_state.shape:  # a cache's piece, of which each rank has its heads
                heads = topology.sequence.all_gather(got_state).movedim(0, 1).flatten(1, 2)
                got_state = heads[:, :: heads.shape[1] // state.shape[1]]
            torch.testing.assert_close(got_state, state)
    got = torch.autograd.grad(got_logits, list(model.parameters()), cotangent[:, mine])
    for actual, expected in zip(got, want, strict=True):
        total = actual.clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total, expected)
    return float(logits.abs().max())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "mixer",
    [*MIXERS, ["mingru", "minlstm", "window"], ["window", "attention"]],
    ids=str,
)
def test_sharded_model_equals_whole(mixer, ranks):
    """A shard of six tokens is as long as the window's halo: the next rank sees no further."""
    assert len(set(run_distributed(_check_model, ranks, mixer, 6))) == 1


def _count_bytes(kv_heads: int) -> tuple[int, int]:
    group = Topology(sp_size=2).sequence
    shapes = [(1, 8, n, WIDTH) for n in (4, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, requires_grad=True) for shape in shapes]
    cache = Cache.empty(1)
    y, _ = ShardedOps(group).attend(QKV(*qkv), cache, None, BASE, True)
    forward = group.meter.take()[1]
    y.sum().backward()
    return forward, group.meter.take()[1]


@pytest.mark.parametrize(("kv_heads", "sent_heads"), [(4, 4), (2, 2), (1, 2)])
def test_exchange_sends_what_the_formula_says(kv_heads, sent_heads):
    """(P - 1) / P * T * (2 heads + 2 kv heads) * d, both ways; one kv head goes to both ranks."""
    sent = 8 * (2 * 4 + 2 * sent_heads) * WIDTH * 4 // 2
    assert run_distributed(_count_bytes, 2, kv_heads) == [(sent, sent)] * 2


def _refused() -> None:
    group = Topology(sp_size=2).sequence
    qkv = [torch.randn(1, 4, 3, WIDTH) for _ in range(3)]
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        ShardedOps(group).attend(QKV(*qkv), Cache.empty(1), None, BASE, True)


def test_heads_that_ranks_do_not_divide_are_refused():
    run_distributed(_refused, 2)
