"""The scan admits any recurrence: one that is in no table runs everywhere, without an edit."""

import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from models.scan import Inputs, Recurrence, linear_scan, scan
from models.scan.recurrences.linear import Linear
from models.scan.recurrences.mingru import MinGRU
from tests.distributed import run_distributed
from tests.models.scan.cases import make_reset, outputs_and_gradients
from tests.models.scan.own_recurrence import OWN, Readout, own_inputs
from trainer.parallel.carry import CarryExchange
from trainer.parallel.topology import Topology

BATCH, SHARD = 2, 7
by_name = pytest.mark.parametrize("recurrence", OWN, ids=lambda r: r.name)


def _h0(recurrence: Recurrence, inputs: Inputs) -> Tensor:
    shape, dtype = recurrence.state_shape(inputs), recurrence.state_dtype(inputs)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@by_name
@pytest.mark.parametrize("where", ["none", "edges"])
@pytest.mark.parametrize("steps", [1, 23])
def test_chunked_equals_the_definition(recurrence, steps, where):
    inputs = own_inputs(recurrence, BATCH, steps)
    h0, reset = _h0(recurrence, inputs), make_reset(BATCH, steps, where)
    expected = outputs_and_gradients(recurrence, inputs, h0, reset, "reference")
    actual = outputs_and_gradients(recurrence, inputs, h0, reset, "chunked")
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("recurrence", [OWN[0], OWN[2]], ids=lambda r: r.name)
def test_bf16_keeps_fp32_state(recurrence):
    exact = own_inputs(recurrence, BATCH, 23)
    inputs = tuple(x.detach().bfloat16().requires_grad_() for x in exact)
    h0 = torch.randn(recurrence.state_shape(inputs), requires_grad=True)
    expected = outputs_and_gradients(recurrence, inputs, h0, None, "reference")
    actual = outputs_and_gradients(recurrence, inputs, h0, None, "chunked")
    assert actual[1].dtype == torch.float32
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        assert (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()


@by_name
def test_compiles_to_one_graph_before_it_was_ever_scanned(recurrence):
    """And its results lie in memory as the compiler was told: views are made whole."""
    inputs = tuple(x.detach() for x in own_inputs(recurrence, BATCH, 9))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: scan(recurrence, inputs, backend="chunked"), fullgraph=True, backend="eager"
    )
    y, _ = compiled(*inputs)
    assert y.is_contiguous()
    torch.testing.assert_close(y, scan(recurrence, inputs, backend="reference")[0])


def test_a_second_backward_is_refused():
    """It would leave out, in silence, what the first one's gradients depend on."""
    for backend in ("reference", "chunked", "native"):
        kv = torch.randn(1, 5, 4, requires_grad=True)
        y, _ = scan(MinGRU(), (kv,), backend=backend)
        with pytest.raises(RuntimeError, match="Scan has a gradient but no second derivative"):
            torch.autograd.grad(y.square().sum(), kv, create_graph=True)


@by_name
def test_finite_differences_agree(recurrence):
    inputs = own_inputs(recurrence, 1, 5)
    h0 = _h0(recurrence, inputs)
    assert torch.autograd.gradcheck(
        lambda h0, *inputs: scan(recurrence, inputs, h0, backend="chunked"), (h0, *inputs)
    )


def _check_shards(backend: str) -> int:
    """On every rank: shards of a sequence give what the whole gives, and so do its gradients."""
    group = Topology(torch.distributed.get_world_size()).sequence
    mine = slice(group.rank * SHARD, (group.rank + 1) * SHARD)
    for recurrence in OWN:
        for where in ("none", "random"):
            torch.manual_seed(3)
            inputs = own_inputs(recurrence, BATCH, SHARD * group.size)
            h0 = _h0(recurrence, inputs)
            reset = make_reset(BATCH, SHARD * group.size, where)
            y, h_last = scan(recurrence, inputs, h0, reset=reset, backend="reference")
            cotangents = [torch.randn_like(y), torch.randn_like(h_last)]
            want = torch.autograd.grad([y, h_last], [h0, *inputs], cotangents)
            shard = tuple(x.detach()[:, mine].clone().requires_grad_() for x in inputs)
            got_y, got_last = scan(
                recurrence,
                shard,
                h0,
                reset=None if reset is None else reset[:, mine],
                backend=backend,
                exchange=CarryExchange(group),
            )
            cotangents[0] = cotangents[0][:, mine]
            got = torch.autograd.grad([got_y, got_last], [h0, *shard], cotangents)
            expected = [y[:, mine], h_last, want[0], *(g[:, mine] for g in want[1:])]
            for actual, reference in zip([got_y, got_last, *got], expected, strict=True):
                torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-12)
    return len(OWN)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_shards_equal_the_whole(ranks, backend):
    assert run_distributed(_check_shards, ranks, backend) == [len(OWN)] * ranks


def test_it_takes_under_sixty_lines():
    assert len(inspect.getsource(Readout).splitlines()) < 60


def test_auto_falls_back_to_chunked_and_says_so_once():
    recurrence = _Named("only here")
    inputs = own_inputs(recurrence, BATCH, 9)
    with pytest.warns(UserWarning, match="only here runs in plain torch.*no gates in C"):
        first = scan(recurrence, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = scan(recurrence, inputs)
    torch.testing.assert_close(first, again)
    with pytest.raises(ValueError, match="'native' cannot be used: only here has no gates"):
        scan(recurrence, inputs, backend="native")


@dataclass(frozen=True)
class _Named(Readout):
    name: str = ""


@dataclass(frozen=True)
class _Scaled(Readout):
    name = "scaled"
    scale: float = 1.0


def test_two_recurrences_of_one_name_are_refused():
    assert _Scaled(scale=1.0) == _Scaled(scale=1.0)
    with pytest.raises(ValueError, match="two recurrences are named 'scaled'"):
        _Scaled(scale=2.0)


def test_inputs_that_do_not_fit_are_named():
    a, b, _ = own_inputs(Readout(), 1, 3)
    with pytest.raises(ValueError, match="readout scan inputs must be a, b"):
        scan(Readout(), (a, b, torch.zeros(1, 3, 9, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"h0 must be \[B, H\] = \[1, 4\]"):
        linear_scan(torch.rand(1, 2, 4), torch.rand(1, 2, 4), torch.rand(1, 3))


@dataclass(frozen=True)
class _Tripled(MinGRU):
    """minGRU's gates in C++, and an output that kernels know nothing of."""

    name = "tripled"
    own_output = True

    def output(self, inputs: Inputs, h: Tensor) -> Tensor:
        return 3 * h

    def state_gradient(self, inputs: Inputs, grad_y: Tensor) -> Tensor:
        return 3 * grad_y


@dataclass(frozen=True)
class _Miscounted(MinGRU):
    name = "miscounted"
    parts = 3


def test_kernels_refuse_what_they_do_not_know():
    """Gates alone do not make a kernel right: an output of its own would be left out in silence."""
    kv = torch.randn(1, 9, 8)
    with pytest.warns(UserWarning, match="another output than its state"):
        tripled, _ = scan(_Tripled(), (kv,))
    torch.testing.assert_close(tripled, 3 * scan(MinGRU(), (kv,))[0])
    with pytest.raises(ValueError, match="another output than its state"):
        scan(_Tripled(), (kv,), backend="native")
    with pytest.raises(ValueError, match="TENSORS and PARTS differ"):
        scan(_Miscounted(), (torch.randn(1, 9, 6),), backend="native")
    with pytest.raises(ValueError, match="linear scan takes 2 inputs, got 1"):
        scan(Linear(), (kv,))
