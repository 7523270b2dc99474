"""The choice of a backend, and its functions as torch operators."""

import pytest
import torch

from models.scan import backend, scan
from tests.models.scan.cases import RECURRENCES, make_inputs, make_reset


@pytest.mark.parametrize("which", ["native", "chunked"])
@pytest.mark.parametrize("name", ["linear", "minlstm"])
def test_operators_keep_their_promises(name, which):
    """Schema, aliasing, and the shapes and dtypes that the compiler is told."""
    inputs = [x.detach() for x in make_inputs(RECURRENCES[name], 2, 10, 3, torch.bfloat16)]
    h_in, grad_h = torch.randn(2, 3), torch.randn(2, 10, 3, dtype=torch.bfloat16)
    reset = make_reset(2, 10, "edges")
    ops, how = torch.ops.longhaul, f"{which}/{name}"
    span = ops.scan_summarize(inputs, reset, how)
    h, _ = ops.scan_forward(inputs, reset, h_in, [], how)
    flow = ops.scan_summarize_backward(inputs, reset, grad_h, how)
    gradients = (inputs, reset, [h, h_in], [grad_h, torch.randn(2, 3)])
    for op, arguments in (
        (ops.scan_summarize, (inputs, reset)),
        (ops.scan_forward, (inputs, reset, h_in, [])),
        (ops.scan_forward, (inputs, reset, h_in, span)),
        (ops.scan_summarize_backward, (inputs, reset, grad_h)),
        (ops.scan_backward, (*gradients, [])),
        (ops.scan_backward, (*gradients, flow)),
    ):
        torch.library.opcheck(
            op.default, (*arguments, how), test_utils=("test_schema", "test_faketensor")
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
    case = RECURRENCES["linear"], "cpu", torch.float32
    assert backend.choose_backend("auto", *case) == "native"
    monkeypatch.setattr(backend.load("native"), "fault", lambda *_: "no compiler")
    backend._choose.cache_clear()
    try:
        with pytest.warns(UserWarning, match="many times slower: no compiler"):
            assert backend.choose_backend("auto", *case) == "chunked"
        with pytest.raises(ValueError, match="'native' cannot be used: no compiler"):
            backend.choose_backend("native", *case)
    finally:
        backend._choose.cache_clear()
