"""The scan as torch operators: what the compiler and activation checkpointing rely on."""

import pytest
import torch

from models.scan import operators, scan
from models.scan.recurrence import RECURRENCES
from tests.models.scan.cases import make_inputs, make_reset


@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("name", ["linear", "minlstm"])
def test_operators_keep_their_promises(name, backend):
    """Schema, aliasing, and the shapes and dtypes that the compiler is told."""
    inputs = [x.detach() for x in make_inputs(RECURRENCES[name], 2, 10, 3, torch.bfloat16)]
    h_in, grad_h = torch.randn(2, 3), torch.randn(2, 10, 3, dtype=torch.bfloat16)
    reset = make_reset(2, 10, "edges")
    ops = torch.ops.longhaul
    names = (name, backend)
    span = list(ops.scan_summarize(inputs, reset, *names))
    h, _ = ops.scan_forward(inputs, h_in, reset, [], *names)
    flow = list(ops.scan_summarize_backward(inputs, grad_h, reset, *names))
    gradients = (inputs, h, h_in, grad_h, torch.randn(2, 3), reset)
    for op, arguments in (
        (ops.scan_summarize, (inputs, reset)),
        (ops.scan_forward, (inputs, h_in, reset, [])),
        (ops.scan_forward, (inputs, h_in, reset, span)),
        (ops.scan_summarize_backward, (inputs, grad_h, reset)),
        (ops.scan_backward, (*gradients, [])),
        (ops.scan_backward, (*gradients, flow)),
    ):
        torch.library.opcheck(
            op.default, (*arguments, *names), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("name", RECURRENCES)
def test_compiles_to_one_graph(name):
    """No graph break, forward and backward, and the same numbers as eager."""
    recurrence = RECURRENCES[name]
    inputs = make_inputs(recurrence, 2, 20, 3, torch.float32)
    h0 = torch.randn(2, 3, requires_grad=True)
    reset = make_reset(2, 20, "edges")

    def loss(h0: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        h, h_last = scan(recurrence, tuple(x * 2 for x in inputs), h0, reset=reset)
        return (h.square().sum() + h_last.sum()).sigmoid()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(h0, *inputs), loss(h0, *inputs)
    torch.testing.assert_close(got, want)
    leaves = (h0, *inputs)
    for actual, expected in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_auto_takes_the_fastest_and_tells_a_missing_one(monkeypatch):
    inputs = (torch.ones(1, 2, 4),)
    assert operators.choose_backend("auto", inputs) == "native"
    monkeypatch.setattr(operators._module("native"), "unavailable", lambda: "no compiler")
    operators._choose.cache_clear()
    try:
        with pytest.warns(UserWarning, match="many times slower: no compiler"):
            assert operators.choose_backend("auto", inputs) == "chunked"
        with pytest.raises(ValueError, match="'native' cannot be used: no compiler"):
            operators.choose_backend("native", inputs)
    finally:
        operators._choose.cache_clear()
