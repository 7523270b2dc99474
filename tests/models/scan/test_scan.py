"""Every backend against the sequential loop in fp64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models.scan import (
    Inputs,
    Problem,
    Recurrence,
    linear_scan,
    mingru_scan,
    minlstm_scan,
    native,
    reference,
    scan,
)
from models.scan.backend import choose_backend
from models.scan.recurrences.mingru import MinGRU
from models.scan.recurrences.mingru.log_space import mingru_log_space
from models.scan.recurrences.minlstm import MinLSTM
from tests.models.scan.cases import (
    NATIVE,
    ON_CPU,
    RECURRENCES,
    make_inputs,
    make_reset,
    outputs_and_gradients,
)

FORGETTING = ["mingru", "minlstm", "minlstm-unnormalized"]  # no decay of theirs is above one


@pytest.mark.parametrize("where", ["none", "start", "edges", "random"])
@pytest.mark.parametrize("shift", [0, 8, -8])
@pytest.mark.parametrize("steps", [1, 63, 1000])
@pytest.mark.parametrize(("name", "backend"), ON_CPU)
def test_fp64_equals_definition(name, steps, shift, where, backend):
    recurrence = RECURRENCES[name]
    inputs = make_inputs(recurrence, 2, steps, 5, torch.float64, shift)
    h0 = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    reset = make_reset(2, steps, where)
    expected = outputs_and_gradients(recurrence, inputs, h0, reset, "reference")
    actual = outputs_and_gradients(recurrence, inputs, h0, reset, backend)
    for got, want in zip(actual, expected, strict=True):
        # fp64 rounding over 1000 steps, on values of order one to a hundred
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("where", ["none", "edges"])
@pytest.mark.parametrize(("name", "backend"), ON_CPU)
def test_gradcheck(name, where, backend):
    """Finite differences: no derivation of ours takes part."""
    recurrence = RECURRENCES[name]
    inputs = make_inputs(recurrence, 2, 7, 2, torch.float64)
    h0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    reset = make_reset(2, 7, where)
    assert torch.autograd.gradcheck(
        lambda h0, *inputs: scan(recurrence, inputs, h0, reset=reset, backend=backend),
        (h0, *inputs),
    )


@pytest.mark.parametrize(
    # the inputs' own rounding, 2^-9 for bf16 and 2^-24 for fp32, times the few roundings of a step
    ("dtype", "tolerance"),
    [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize(("name", "backend"), ON_CPU)
def test_low_precision_keeps_fp32_state(name, dtype, tolerance, backend):
    recurrence = RECURRENCES[name]
    inputs = make_inputs(recurrence, 2, 1000, 5, dtype, shift=4)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    h0 = torch.randn(2, 5, requires_grad=True)
    exact_h0 = h0.detach().double().requires_grad_()
    actual = outputs_and_gradients(recurrence, inputs, h0, None, backend)
    expected = outputs_and_gradients(recurrence, exact, exact_h0, None, "reference")
    assert [x.dtype for x in actual] == [
        dtype,
        torch.float32,
        torch.float32,
        *([dtype] * len(inputs)),
    ]
    for got, want in zip(actual, expected, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "backend"), [case for case in ON_CPU if "lstm" in case[0] or "gru" in case[0]]
)
def test_saturated_gates_stay_finite(name, dtype, backend):
    """Preactivations far beyond exp's range: no 0/0, no inf - inf, in values or gradients."""
    recurrence = RECURRENCES[name]
    inputs = tuple(
        (x.detach() * 1000).requires_grad_() for x in make_inputs(recurrence, 1, 64, 8, dtype)
    )
    h0 = torch.zeros(1, 8, dtype=dtype, requires_grad=True)
    for x in outputs_and_gradients(recurrence, inputs, h0, None, backend):
        assert x.isfinite().all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NATIVE)
def test_native_threads_share_one_row(name, dtype, batch, threads):
    """More threads than rows: time is dealt out in tiles, one waiting for another's state."""
    recurrence = RECURRENCES[name]
    width = 53  # at least a vector for each thread, and no multiple of one
    inputs = make_inputs(recurrence, batch, 9001, width, dtype, shift=3)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    h0 = torch.randn(batch, width, dtype=state, requires_grad=True)
    reset = make_reset(batch, 9001, "edges")
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 3e-2}[dtype]
    threads(1)
    expected = outputs_and_gradients(recurrence, inputs, h0, reset, "native")
    spans = summaries(recurrence, inputs, expected[0], reset)
    threads(3)
    actual = outputs_and_gradients(recurrence, inputs, h0, reset, "native")
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(summaries(recurrence, inputs, expected[0], reset), spans, strict=True):
        assert torch.equal(got, want)
    chunked = outputs_and_gradients(recurrence, inputs, h0, reset, "chunked")
    for got, want in zip(actual, chunked, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def summaries(
    recurrence: Recurrence, inputs: Inputs, grad_h: Tensor, reset: Tensor | None
) -> list[Tensor]:
    problem = Problem(recurrence, inputs, reset)
    forward = native.summarize(problem)
    backward = native.summarize_backward(problem, grad_h)
    return [forward.decay, forward.state, backward.decay, backward.state]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_spans_of_what_was_forgotten(name, dtype, threads):
    """A span is that of all steps, although it reads the first ones only where they still count."""
    recurrence, width = RECURRENCES[name], 40
    inputs = make_inputs(recurrence, 2, 2000, width, dtype, shift=-1)
    remembers = {"linear": 0.999, "linear-complement": 1e-3, "mingru": -9.0}
    inputs[0].data[:, :, 7] = remembers.get(name, 9.0)  # minLSTM's forget gate
    if recurrence.parts == 3:
        inputs[0].data[:, :, width + 7] = -9  # and its input gate
    grad_h = torch.randn(2, 2000, width).to(dtype)
    wide = Problem(recurrence, tuple(x.detach().double() for x in inputs))
    definition = [reference.summarize(wide), reference.summarize_backward(wide, grad_h.double())]
    threads(1)
    for at, found in enumerate(summaries(recurrence, inputs, grad_h, None)):
        exact = definition[at // 2]
        want = exact.decay if at % 2 == 0 else exact.state
        torch.testing.assert_close(found, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORGETTING)
def test_what_was_forgotten_is_not_read(name):
    recurrence, width = RECURRENCES[name], 40
    inputs = make_inputs(recurrence, 1, 2000, width, torch.float32, shift=-1)
    grad_h = torch.randn(1, 2000, width)
    inputs[0].data[:, :100] = torch.nan
    assert native.summarize(Problem(recurrence, inputs)).state.isfinite().all()
    assert native.summarize_backward(Problem(recurrence, inputs), grad_h).state.isnan().all()
    inputs[0].data[:, :100], inputs[0].data[:, -100:] = 0, torch.nan
    assert native.summarize(Problem(recurrence, inputs)).state.isnan().all()
    assert native.summarize_backward(Problem(recurrence, inputs), grad_h).state.isfinite().all()


@pytest.mark.parametrize("name", FORGETTING)
@pytest.mark.parametrize("at", [5, 1000, 1995])
def test_nothing_enters_through_a_reset_that_is_not_read(name, at):
    recurrence = RECURRENCES[name]
    inputs = make_inputs(recurrence, 2, 2000, 20, torch.float32)
    reset = torch.zeros(2, 2000, dtype=torch.bool)
    reset[1, at] = True
    for decay in summaries(recurrence, inputs, torch.randn(2, 2000, 20), reset)[::2]:
        assert (decay[0] != 0).all()
        assert (decay[1] == 0).all()


def test_what_was_forgotten_comes_back_where_decays_may_be_above_one():
    a = torch.full((1, 500, 3), 2.0)
    a[:, :150] = a[:, -150:] = 0.5  # from either end 2^-150 first, then 2^50
    problem = Problem(RECURRENCES["linear"], (a, torch.ones_like(a)))
    wide = Problem(problem.recurrence, tuple(x.double() for x in problem.inputs))
    for grad_h in (None, torch.ones_like(a)):
        if grad_h is None:
            span, want = native.summarize(problem), reference.summarize(wide)
        else:
            span = native.summarize_backward(problem, grad_h)
            want = reference.summarize_backward(wide, grad_h.double())
        assert (span.decay == want.decay).all()
        assert (want.state[0] > 2.0**49).all()
        torch.testing.assert_close(span.state, want.state, rtol=1e-6, atol=0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_closed_lstm_gates_keep_their_ratio(backend):
    """f / (f + i) depends on f - i alone once both are all but zero."""
    fiv = torch.tensor([-90.0, -91.0, 0.5]).expand(1, 4, 3).contiguous()
    h, _ = minlstm_scan(fiv, backend=backend)
    shifted = torch.tensor([-20.0, -21.0, 0.5]).expand(1, 4, 3).contiguous()
    torch.testing.assert_close(h, minlstm_scan(shifted, backend="reference")[0])


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_fp64_is_fp64_where_a_gate_is_all_but_closed(backend):
    """torch's softplus(x) is x from 20 on, which is 2e-9 of it too little."""
    fiv = torch.tensor([[[0.0, -20.5, 0.5], [0.3, -21.0, 1.0]]], dtype=torch.float64)
    expected, _ = minlstm_scan(fiv, backend="reference")
    torch.testing.assert_close(minlstm_scan(fiv, backend=backend)[0], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("name", "backend"), ON_CPU)
def test_nan_is_not_hidden(name, backend):
    recurrence = RECURRENCES[name]
    inputs = tuple(x.detach().clone() for x in make_inputs(recurrence, 1, 40, 20, torch.float32))
    for x in inputs:  # every bit of the payload set, as a GPU writes it
        x[0, 7, :] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    h, _ = scan(recurrence, inputs, backend=backend)
    assert h[0, :7].isfinite().all()
    assert h[0, 7:].isnan().all()


def test_a_device_without_fp64_is_told():
    with pytest.raises(ValueError, match="no scan runs here: it computes in fp64"):
        choose_backend("auto", MinGRU(), "mps", torch.float32)


def test_public_scans_agree_with_their_formulas():
    kv, fiv = torch.randn(2, 9, 6), torch.randn(2, 9, 9)
    a, b = MinGRU().define((kv,))
    torch.testing.assert_close(mingru_scan(kv)[0], linear_scan(a, b)[0])
    for normalize in (True, False):
        a, b = MinLSTM(normalize).define((fiv,))
        h, _ = minlstm_scan(fiv, normalize=normalize)
        torch.testing.assert_close(h, linear_scan(a, b)[0])


def test_paper_log_space_form_agrees_on_short_sequences():
    kv = torch.randn(2, 50, 6, dtype=torch.float64)
    h0 = torch.rand(2, 3, dtype=torch.float64) + 0.1
    for got, want in zip(mingru_log_space(kv, h0), mingru_scan(kv, h0), strict=True):
        torch.testing.assert_close(got, want)


def test_streamed_state_is_not_passed_through_g():
    """A scan cut in two gives the same states: known to be wrong in a popular reimplementation."""
    kv = torch.randn(2, 20, 6)
    whole, last = mingru_scan(kv)
    first, middle = mingru_scan(kv[:, :9])
    second, end = mingru_scan(kv[:, 9:], middle)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_scan(torch.rand(2, 3, 4), torch.rand(2, 3, 5)), "alike"),
        (lambda: mingru_scan(torch.rand(2, 3, 5)), "2 does not divide"),
        (lambda: minlstm_scan(torch.rand(2, 0, 6)), "T = 0"),
        (lambda: mingru_scan(torch.rand(2, 3, 0)), "H = 0"),
        (lambda: mingru_scan(torch.rand(2, 3, 4), torch.rand(2, 2, device="meta")), "one device"),
        (lambda: mingru_scan(torch.rand(2, 3, 4), torch.rand(2, 3)), r"h0 must be .*\[2, 2\]"),
        (lambda: mingru_scan(torch.rand(2, 3, 4), reset=torch.ones(2, 2)), "reset must be"),
        (lambda: mingru_scan(torch.ones(2, 3, 4, dtype=torch.int64)), "must be float"),
        (lambda: linear_scan(torch.rand(2, 3, 4), torch.ones(2, 3, 4).long()), "must be float"),
        (lambda: linear_scan(torch.rand(2, 3, 4), torch.rand(2, 3, 4) * 1j), "must be float"),
        (lambda: mingru_scan(torch.rand(2, 3, 4) * 1j), "real state"),
        (lambda: mingru_scan(torch.rand(2, 3, 4), torch.rand(2, 2) * 1j), "real state"),
        (lambda: mingru_scan(torch.rand(2, 3, 4), backend="fast"), "'fast' is not known"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
