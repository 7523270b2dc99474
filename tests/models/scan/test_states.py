"""Recurrences whose states are larger than their output: S4D and Mamba's selective scan."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan import Recurrence, scan
from models.scan.recurrences.mamba import Mamba
from models.scan.recurrences.s4d import S4D
from tests.distributed import run_distributed
from tests.models.scan.cases import STATES, make_reset, outputs_and_gradients, state_inputs
from trainer.parallel.carry import CarryExchange
from trainer.parallel.topology import Topology

BACKENDS = ("chunked", "native")
by_name = pytest.mark.parametrize("name", STATES)
# relative to the largest of a result: roundings of fp32 gates; of bf16 results, of which some sum
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def _h0(recurrence: Recurrence, inputs: tuple[Tensor, ...]) -> Tensor:
    shape, dtype = recurrence.state_shape(inputs), recurrence.state_dtype(inputs)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def _wide(x: Tensor) -> Tensor:
    dtype = torch.complex128 if x.is_complex() else torch.float64
    return x.detach().to(dtype).requires_grad_()


@by_name
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 150, 19, 5), (3, 64, 40, 16), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("where", ["none", "start", "edges", "random"])
def test_equals_the_sequential_loop_in_fp64(name, backend, dtype, sizes, where):
    """Outputs, states and every gradient; sizes that fill no vector or tile."""
    recurrence = STATES[name]
    inputs = state_inputs(recurrence, sizes, dtype)
    h0, reset = _h0(recurrence, inputs), make_reset(*sizes[:2], where)
    wide = tuple(map(_wide, inputs))
    expected = outputs_and_gradients(recurrence, wide, _wide(h0), reset, "reference")
    actual = outputs_and_gradients(recurrence, inputs, h0, reset, backend)
    assert [x.dtype for x in actual[2:]] == [h0.dtype, *(x.dtype for x in inputs)]
    for got, want in zip(actual, expected, strict=True):
        worst = (got.to(want.dtype) - want).abs().max()
        assert worst <= TOLERANCES[dtype] * max(1e-3, want.abs().max())


@by_name
def test_a_tile_is_as_good_as_the_whole(name, monkeypatch):
    """chunked goes in tiles of what its states take: of seven steps, and of all."""
    recurrence = STATES[name]
    inputs = state_inputs(recurrence, (2, 50, 3, 4), torch.float64)
    h0, reset = _h0(recurrence, inputs), make_reset(2, 50, "random")
    whole = outputs_and_gradients(recurrence, inputs, h0, reset, "chunked")
    monkeypatch.setattr("models.scan.chunked.TILE_NUMBERS", 7 * 2 * 3 * 4)
    monkeypatch.setattr("models.scan.chunked.LEAST_TILE", 1)
    tiled = outputs_and_gradients(recurrence, inputs, h0, reset, "chunked")
    for got, want in zip(tiled, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mamba_is_the_authors_formula(backend):
    """`selective_scan_ref` of mamba_ssm, written down again step by step."""
    x, k, b, c, rate, bias = (
        each.detach() for each in state_inputs(Mamba(), (2, 40, 6, 4), torch.float64)
    )
    delta = F.softplus(k + bias)
    h, rows = torch.zeros(2, 6, 4, dtype=torch.float64), []
    for t in range(40):
        decay = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], rate))
        h = decay * h + torch.einsum("bd,bn,bd->bdn", delta[:, t], b[:, t], x[:, t])
        rows.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    y, last = scan(Mamba(), (x, k, b, c, rate, bias), backend=backend)
    torch.testing.assert_close(y, torch.stack(rows, dim=1))
    torch.testing.assert_close(last, h)


@pytest.mark.parametrize("backend", BACKENDS)
def test_s4d_is_the_convolution_with_its_kernel(backend):
    """y = K * x, K_l = 2 Re sum_n weight exp(rate l): section 3.3 of the paper."""
    x, rate, weight = (each.detach() for each in state_inputs(S4D(), (2, 90, 5, 4), torch.float64))
    powers = torch.exp(rate.unsqueeze(-1) * torch.arange(90))
    kernel = 2 * (weight.unsqueeze(-1) * powers).sum(1).real  # [D, T]
    both = torch.fft.rfft(x.mT, 180) * torch.fft.rfft(kernel, 180)
    y, _ = scan(S4D(), (x, rate, weight), backend=backend)
    torch.testing.assert_close(y, torch.fft.irfft(both, 180)[..., :90].mT)


@pytest.mark.parametrize("memory", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("steps", [1 << 16, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_mamba_holds_long_memories(memory, steps):
    """A constant input into steady gates, in fp32: the state is (1 - a^T) / (1 - a), to 1e-6."""
    dt = torch.tensor([1 / memory], dtype=torch.float64)
    bias = (dt + torch.log(-torch.expm1(-dt))).float()
    x, ones = torch.ones(1, steps, 1), torch.ones(1, steps, 1)
    exact_dt = F.softplus(bias.double())
    decay = torch.exp(-exact_dt)
    want = exact_dt * -torch.expm1(-exact_dt * steps) / -torch.expm1(-exact_dt)
    inputs = x, torch.zeros_like(x), ones, ones, -torch.ones(1, 1), bias
    y, last = scan(Mamba(), inputs, backend="native")
    error = (last.double().flatten() - want).abs() / want
    assert error.item() < 1e-6 + 2**-24 * min(1.0, steps / memory) * 4
    assert decay < 1
    torch.testing.assert_close(y[0, -1], last[0, :, 0])


@by_name
def test_no_state_of_every_step_is_in_memory(name):
    """What is kept for the backward is far less than [B, T, D, N]."""
    sizes = 1, 4096, 64, 16
    inputs = state_inputs(STATES[name], sizes, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scan(STATES[name], inputs, backend="native")
    assert sum(x.numel() for x in kept) < math.prod(sizes) / 2


def _check_shards(backend: str, shard: int) -> int:
    """On every rank: shards of a sequence give what the whole gives, and so do its gradients."""
    topology = Topology(torch.distributed.get_world_size())
    group = topology.sequence
    mine, checked = slice(group.rank * shard, (group.rank + 1) * shard), 0
    for recurrence in STATES.values():
        for where in ("none", "random"):
            torch.manual_seed(3)
            inputs = state_inputs(recurrence, (2, shard * group.size, 5, 3), torch.float64)
            h0, count = _h0(recurrence, inputs), len(inputs) - recurrence.weights
            reset = make_reset(2, shard * group.size, where)
            y, h_last = scan(recurrence, inputs, h0, reset=reset, backend="reference")
            cotangents = [torch.randn_like(y), torch.randn_like(h_last)]
            want = torch.autograd.grad([y, h_last], [h0, *inputs], cotangents)
            part = [x.detach()[:, mine].clone().requires_grad_() for x in inputs[:count]]
            local = (*part, *inputs[count:])
            got_y, got_last = scan(
                recurrence,
                local,
                h0,
                reset=None if reset is None else reset[:, mine],
                backend=backend,
                exchange=CarryExchange(group),
            )
            cotangents[0] = cotangents[0][:, mine]
            got = list(torch.autograd.grad([got_y, got_last], [h0, *local], cotangents))
            for grad in got[1 + count :]:  # weights serve all shards
                torch.distributed.all_reduce(
                    torch.view_as_real(grad) if grad.is_complex() else grad
                )
            stepped = [g[:, mine] for g in want[1 : 1 + count]]
            expected = [y[:, mine], h_last, want[0], *stepped, *want[1 + count :]]
            for actual, reference in zip([got_y, got_last, *got], expected, strict=True):
                torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-12)
            checked += 1
    topology.destroy()  # its threads would stay in processes that serve other tests
    return checked


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_equal_the_whole(ranks, backend):
    assert run_distributed(_check_shards, ranks, backend, 70) == [4] * ranks


def test_inputs_that_do_not_fit_are_named():
    x, rate, weight = state_inputs(S4D(), (1, 3, 4, 2), torch.float32)
    with pytest.raises(ValueError, match=r"s4d scan inputs must be x .* complex; got"):
        scan(S4D(), (x, rate.real, weight))
    x, k, b, c, a, bias = state_inputs(Mamba(), (1, 3, 4, 2), torch.float32)
    with pytest.raises(ValueError, match=r"bias must be \[D\], got \[3\]"):
        scan(Mamba(), (x, k, b, c, a, bias[:3]))
    with pytest.raises(ValueError, match="inputs must be x, k"):
        scan(Mamba(), (x, k, b, c[:, :2], a, bias))
    with pytest.raises(ValueError, match="alike"):
        scan(Mamba(), (x, k, b.double(), c, a, bias))
