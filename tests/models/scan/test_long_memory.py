"""Memories of up to ten million tokens, exact: every backend, forward and backward, one device."""

import importlib

import numpy as np
import pytest
import torch

from models.scan import RECURRENCES, Problem, mingru_scan
from models.scan import backend as backends
from models.scan.recurrences.mingru import MinGRU
from models.scan.recurrences.minlstm import MinLSTM
from tests.models.scan.cases import NATIVE, TRITON
from tests.models.scan.long_memory import (
    LONG,
    bound,
    closed_form,
    exact_results,
    long_inputs,
    results,
)

MEMORIES = [2.5, 1e3, 1e5, 1e7]


@pytest.mark.parametrize("memory", MEMORIES)
def test_fp64_is_the_closed_form(memory):
    """What the rest is compared with."""
    steps = 1 << 16
    exact = exact_results("mingru", long_inputs("mingru", memory, steps), steps)
    h, grad_h0 = closed_form(memory, steps)
    torch.testing.assert_close(exact.values["h"][0, :, 0], h, rtol=1e-9, atol=0)
    torch.testing.assert_close(exact.values["dh0"][0, 0], grad_h0, rtol=1e-9, atol=0)


@pytest.mark.parametrize("period", [1, 16])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", [*LONG, "linear", "minlstm-unnormalized"])
def test_native_is_exact(name, memory, period):
    if name == "minlstm-unnormalized":
        inputs = long_inputs("minlstm", memory, 1 << 16, period)
    else:
        inputs = long_inputs(name, memory, 1 << 16, period)
    errors = results(name, inputs, 1 << 16, "native").errors(exact_results(name, inputs, 1 << 16))
    assert max(errors.values()) < bound(memory, 1 << 16), errors


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", [*LONG, "linear"])
def test_chunked_is_exact(name, memory):
    steps = 1 << 14
    inputs = long_inputs(name, memory, steps, 16)
    errors = results(name, inputs, steps, "chunked").errors(exact_results(name, inputs, steps))
    assert max(errors.values()) < bound(memory, steps), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LONG if name in TRITON])
def test_triton_is_exact(name, monkeypatch):
    """Chunks of chunks: their maps lack little to one, and keep it."""
    pytest.importorskip("triton")
    triton = importlib.import_module("models.scan.triton")
    monkeypatch.setattr(triton, "CHUNKS", (8,))
    steps, memory = 150, 1e6
    inputs = long_inputs(name, memory, steps, 1, width=8)
    errors = results(name, inputs, steps, "triton").errors(exact_results(name, inputs, steps))
    assert max(errors.values()) < bound(memory, steps), errors


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1e5, 1e7])
@pytest.mark.parametrize("name", LONG)
def test_four_million_steps(name, memory):
    steps = 1 << 22
    inputs = long_inputs(name, memory, steps, 16, width=2)
    errors = results(name, inputs, steps, "native").errors(exact_results(name, inputs, steps))
    assert max(errors.values()) < bound(memory, steps), errors


def test_a_plain_sum_would_fail_all_of_this():
    """h = a * h + b in fp32, as every other scan has it: the bound tells it from ours."""
    memory, steps = 1e5, 1 << 16
    (kv,) = long_inputs("mingru", memory, steps)
    a, b = (x[0, 0, 0].item() for x in MinGRU().gates((kv.detach(),)))
    h, a, b = np.float32(0.25), np.float32(a), np.float32(b)
    for _ in range(steps):
        h = a * h + b
    exact = closed_form(memory, steps)[0][-1].item()
    assert abs(h - exact) / exact > 100 * bound(memory, steps)
    assert abs(mingru_scan(kv, torch.tensor([[0.25] * 4]))[1][0, 0].item() / exact - 1) < 1e-6


@pytest.mark.parametrize("name", NATIVE)
def test_bf16_inputs_add_nothing_beyond_their_own_rounding(name):
    """The state is as exact as for fp32: of the very numbers that bf16 rounds to."""
    steps = 1 << 16
    known = "minlstm" if name == "minlstm-unnormalized" else name
    inputs = tuple(x.detach().bfloat16() for x in long_inputs(known, 1e3, steps, 16))
    got = results(name, tuple(x.requires_grad_() for x in inputs), steps, "native")
    want = exact_results(name, inputs, steps)
    errors = got.errors(want)
    assert max(errors["h_last"], errors["dh0"]) < bound(1e3, steps), errors
    assert errors["h"] < 1.01 * 2**-8  # rounded once
    assert max(errors.values()) < 3 * 2**-8, errors  # h, a difference of it, the gradient


@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("name", ["mingru", "minlstm", "minlstm-unnormalized"])
def test_gates_are_exact_over_the_whole_range(name, backend):
    """Decay and its complement against fp64, for preactivations of which fp32 knows the sigmoid.

    Native clamps them: a gate is then at least 2e-36 where it should be less, and of minLSTM's two
    shares the smaller at least 5e-28 where both gates are closed.
    """
    grid = torch.linspace(-100, 100, 4001)
    parts = RECURRENCES[name].parts
    zeros = torch.zeros_like(grid)
    x = torch.stack([grid, *[zeros] * (parts - 1)]).reshape(1, 1, -1)
    other = torch.stack([zeros + 3, grid, *[zeros] * (parts - 2)]).reshape(1, 1, -1)
    both = torch.stack([grid, grid - 90, *[zeros] * (parts - 2)]).reshape(1, 1, -1)
    cases = [(x, 2e-36), (other, 2e-36), (both, 5e-28)] if parts == 3 else [(x, 2e-36)]
    for preactivations, floor in cases:
        wide = preactivations.double()
        recurrence = MinGRU() if name == "mingru" else MinLSTM(name == "minlstm")
        a, b = recurrence.gates((wide,))
        inputs = (preactivations,)

        span = backends.summarize(backend, Problem(recurrence, inputs))
        for got, want in ((span.decay, a[:, 0]), (span.state, b[:, 0])):
            assert ((got - want).abs() <= 6e-7 * want + floor).all()
