"""The exchanges of carries and halos over real processes against one process, in fp64."""

import pytest
import torch
from torch import Tensor

from models.mixer import LocalOps
from models.scan import scan
from tests.distributed import run_distributed
from tests.models.scan.cases import RECURRENCES, make_inputs, make_reset
from trainer.parallel.carry import CarryExchange
from trainer.parallel.sharded import ShardedOps
from trainer.parallel.topology import Topology

pytestmark = pytest.mark.slow

BATCH, WIDTH = 2, 3
SHARD_TOKENS = (1, 7, 64)


def _cotangent(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def _scan_case(name: str, tokens: int, where: str) -> tuple:
    """The whole sequence and its reset, the same on every rank."""
    torch.manual_seed(tokens)
    inputs = make_inputs(RECURRENCES[name], BATCH, tokens, WIDTH, torch.float64)
    h0 = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    return inputs, h0, make_reset(BATCH, tokens, where)


def _check_scan() -> int:
    """On every rank: the two-level scan of the shards equals the scan of the whole."""
    topology = Topology(sp_size=torch.distributed.get_world_size())
    group = topology.sequence
    exchange, checked = CarryExchange(group), 0
    for name, recurrence in RECURRENCES.items():
        for shard in SHARD_TOKENS:
            for where in ("none", "start", "edges", "shard edges"):
                tokens = shard * group.size
                inputs, h0, reset = _scan_case(
                    name, tokens, "none" if where == "shard edges" else where
                )
                if where == "shard edges":
                    reset = torch.zeros(BATCH, tokens, dtype=torch.uint8)
                    reset[0, ::shard] = 1
                    reset[1, shard - 1 :: shard] = 1
                mine = slice(group.rank * shard, (group.rank + 1) * shard)
                h, h_last = scan(recurrence, inputs, h0, reset=reset, backend="reference")
                cot_h, cot_last = _cotangent(h, 1), _cotangent(h_last, 2)
                want = torch.autograd.grad([h, h_last], [h0, *inputs], [cot_h, cot_last])
                local = tuple(x.detach()[:, mine].clone().requires_grad_() for x in inputs)
                local_reset = None if reset is None else reset[:, mine]
                got_h, got_last = scan(recurrence, local, h0, reset=local_reset, exchange=exchange)
                got = torch.autograd.grad(
                    [got_h, got_last], [h0, *local], [cot_h[:, mine], cot_last]
                )
                expected = [h[:, mine], h_last, want[0], *(g[:, mine] for g in want[1:])]
                for actual, reference in zip([got_h, got_last, *got], expected, strict=True):
                    torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-12)
                checked += 1
    return checked


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_scan_over_ranks_equals_one(ranks):
    """Outputs, h_last, and the gradients of every input and of h0, on every rank."""
    cases = len(RECURRENCES) * len(SHARD_TOKENS) * 4
    assert run_distributed(_check_scan, ranks) == [cases] * ranks


def _check_halo() -> int:
    topology = Topology(sp_size=torch.distributed.get_world_size())
    group = topology.sequence
    checked = 0
    for width in (1, 3):
        for shard in (3, 8):
            for where in ("none", "random", "edges"):
                torch.manual_seed(3)
                tokens = shard * group.size
                x = torch.randn(BATCH, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
                carry = torch.randn(BATCH, width, WIDTH, dtype=torch.float64, requires_grad=True)
                reset = make_reset(BATCH, tokens, where)
                mine = slice(group.rank * shard, (group.rank + 1) * shard)
                # One process, shard after shard, is the definition.
                tail, pieces = carry, []
                for rank in range(group.size):
                    part = slice(rank * shard, (rank + 1) * shard)
                    part_reset = None if reset is None else reset[:, part]
                    extended, tail = LocalOps().halo(x[:, part], width, tail, part_reset)
                    pieces.append(extended)
                cot = [_cotangent(piece, rank) for rank, piece in enumerate(pieces)]
                cot_tail = _cotangent(tail, 99)
                want = torch.autograd.grad(
                    [*pieces, tail], [x, carry], [*cot, cot_tail], retain_graph=True
                )
                local = x.detach()[:, mine].clone().requires_grad_()
                local_reset = None if reset is None else reset[:, mine]
                group.meter.take()
                got, got_tail = ShardedOps(group).halo(local, width, carry, local_reset)
                sent = local.new_empty(BATCH, width, WIDTH).nbytes
                if group.size > 1:  # to the right; the last rank's to all
                    assert group.meter.take()[1] == sent
                grads = torch.autograd.grad(
                    [got, got_tail], [local, carry], [cot[group.rank], cot_tail]
                )
                torch.testing.assert_close(got, pieces[group.rank])
                torch.testing.assert_close(got_tail, tail)
                torch.testing.assert_close(grads[0], want[0][:, mine])
                torch.testing.assert_close(grads[1], want[1])
                # with nothing after it: the same but for the tail, which nobody sends
                group.meter.take()
                alone, empty = ShardedOps(group).halo(local, width, carry, local_reset, last=True)
                assert group.meter.take()[1] == (sent if group.rank < group.size - 1 else 0)
                assert empty.shape == (BATCH, 0, WIDTH)
                torch.testing.assert_close(alone, got)
                want = torch.autograd.grad(pieces, [x, carry], cot, allow_unused=True)
                grads = torch.autograd.grad(alone, [local, carry], cot[group.rank])
                torch.testing.assert_close(grads[0], want[0][:, mine])
                torch.testing.assert_close(grads[1], want[1])
                checked += 1
    with pytest.raises(ValueError, match="shorter than its halo"):
        ShardedOps(group).halo(torch.ones(1, 2, 1), 3, torch.ones(1, 3, 1), None)
    return checked


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_halo_over_ranks_equals_one(ranks):
    assert run_distributed(_check_halo, ranks) == [12] * ranks


def _count_bytes() -> tuple[int, int]:
    group = Topology(sp_size=2).sequence
    inputs = make_inputs(RECURRENCES["mingru"], BATCH, 16, WIDTH, torch.float32)
    h, _ = scan(RECURRENCES["mingru"], inputs, exchange=CarryExchange(group))
    forward = group.meter.take()[1]
    h.sum().backward()
    return forward, group.meter.take()[1]


def test_exchange_sends_what_the_formula_says():
    """2 B H of fp64 forward, B H backward, whatever T."""
    assert run_distributed(_count_bytes, 2) == [(2 * BATCH * WIDTH * 8, BATCH * WIDTH * 8)] * 2
