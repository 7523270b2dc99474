"""Models as a library: resets clear whatever stood there; frozen parts; states from elsewhere."""

import ast
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixers import MIXERS
from models.scan import linear_scan
from tests.models.scan.cases import ON_CPU, RECURRENCES, make_inputs
from trainer.loss import summed_cross_entropy

ROOT = Path(__file__).parents[2]
HYBRID = ["mingru", "window", "attention"]


def model_of(mixer, **changes) -> LanguageModel:
    shape = {"layers": 3 if isinstance(mixer, list) else 1, "width": 16, "vocab_size": 50}
    return LanguageModel(ModelConfig(mixer=mixer, window=7, **shape | changes))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "backend"), [*ON_CPU, ("mingru", "reference")])
def test_a_reset_of_a_scan_clears_what_is_not_finite(name, backend, bad):
    from models.scan import scan

    recurrence = RECURRENCES[name]
    inputs = [x.detach().clone() for x in make_inputs(recurrence, 2, 40, 20, torch.float32)]
    reset = torch.zeros(2, 40, dtype=torch.uint8)
    reset[:, 17] = 1
    clean, last = scan(recurrence, tuple(inputs), reset=reset, backend=backend)
    h0 = torch.full((2, 20), bad)
    for x in inputs:
        x[:, 5:9] = bad
    h, h_last = scan(recurrence, tuple(inputs), h0, reset=reset, backend=backend)
    assert not h[:, :17].isfinite().all()
    assert torch.equal(h[:, 17:], clean[:, 17:])
    torch.testing.assert_close(h_last, last)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "backend"), ON_CPU)
def test_a_reset_stops_a_gradient_that_is_not_finite(name, backend, bad):
    from models.scan import scan

    inputs = make_inputs(RECURRENCES[name], 2, 40, 20, torch.float32)
    h0 = torch.randn(2, 20, requires_grad=True)
    reset = torch.zeros(2, 40, dtype=torch.uint8)
    reset[:, 17] = 1
    h, _ = scan(RECURRENCES[name], inputs, h0, reset=reset, backend=backend)
    grad = torch.randn_like(h)
    clean = torch.autograd.grad(h, [h0, *inputs], grad, retain_graph=True)
    grad[:, 17:20] = bad
    got = torch.autograd.grad(h, [h0, *inputs], grad)
    torch.testing.assert_close(got[0], clean[0])
    for ours, theirs in zip(got[1:], clean[1:], strict=True):
        assert not ours[:, 17:].isfinite().all()
        torch.testing.assert_close(ours[:, :17], theirs[:, :17])


@pytest.mark.parametrize("cut", [0, 3, 12, 20, 27])
@pytest.mark.parametrize("mixer", [*MIXERS, HYBRID], ids=str)
def test_a_reset_of_a_model_clears_what_is_not_finite(mixer, cut):
    """Halos, convolutions, windows, caches: whole, and in segments that end anywhere."""
    model = model_of(mixer)
    tokens = torch.randint(1, 50, (2, 40))
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[0, 20] = reset[1, 13] = reset[1, 26] = True
    with torch.no_grad():
        whole, _ = model(tokens, reset=reset)
        model.embed.weight[0] = float("inf")
        spoiled = tokens.clone()
        spoiled[0, 4] = spoiled[1, 5] = spoiled[1, 15] = 0
        first, carry = (
            model(spoiled[:, :cut], reset=reset[:, :cut]) if cut else (whole[:, :0], None)
        )
        second, _ = model(spoiled[:, cut:], carry, reset=reset[:, cut:])
    logits = torch.cat([first, second], dim=1)
    assert not logits[0, :20].isfinite().all()
    torch.testing.assert_close(logits[0, 20:], whole[0, 20:])
    torch.testing.assert_close(logits[1, 26:], whole[1, 26:])
    assert not logits[1, 13:26].isfinite().all()


@pytest.mark.parametrize("mixer", [*MIXERS, HYBRID], ids=str)
def test_a_reset_is_a_mask_whatever_its_ones_are(mixer):
    model = model_of(mixer)
    tokens = torch.randint(0, 50, (2, 30))
    mask = torch.rand(2, 30) < 0.2
    want, _ = model(tokens, reset=mask)
    for same in (mask.to(torch.uint8), mask.to(torch.uint8) * 200):
        assert torch.equal(model(tokens, reset=same)[0], want)
    for wrong in (mask.float() / 2, mask.int(), mask[:, :-1], mask[:1]):
        with pytest.raises(ValueError, match="reset must be"):
            model(tokens, reset=wrong)


@pytest.mark.parametrize("tile", [4, 100])
def test_frozen_parts_cost_no_gradient_and_change_none(tile):
    """The head alone, all but the head, one layer."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 50, (2, 2, 9))

    def gradients(trained: str, readout) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = model_of(HYBRID)
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.startswith(trained) != trained.startswith("!"))
            if trained.startswith("!"):
                weight.requires_grad_(not name.startswith(trained[1:]))
        loss, _ = model(tokens, readout=readout, last=True)
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    fused = partial(summed_cross_entropy, labels=labels, tile=tile)

    def plain(hidden, weight):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")

    for trained in ("head", "!head", "blocks.1", "embed"):
        got, want = gradients(trained, fused), gradients(trained, plain)
        assert got.keys() == want.keys()
        assert got
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", [*MIXERS, HYBRID], ids=str)
def test_a_carry_of_inference_mode_serves_outside(mixer):
    model = model_of(mixer)
    tokens = torch.randint(0, 50, (2, 30))
    with torch.no_grad():
        want, _ = model(tokens)
    with torch.inference_mode():
        _, carry = model(tokens[:, :10])
        _, carry = model(tokens[:, 10:11], carry)
    logits, _ = model(tokens[:, 11:], carry)
    torch.testing.assert_close(logits, want[:, 11:])
    logits.sum().backward()
    with torch.no_grad():
        for at in range(11, 30):
            step, carry = model(tokens[:, at : at + 1], carry)
            torch.testing.assert_close(step[:, 0], want[:, at])


def test_no_backward_by_hand_is_differentiated_twice():
    """The loss refuses; so does every torch.autograd.Function there is."""
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    loss = summed_cross_entropy(hidden, torch.randn(9, 8), torch.randint(0, 9, (1, 5)), 2)
    with pytest.raises(RuntimeError, match="SummedCrossEntropy has a gradient but no second"):
        torch.autograd.grad(loss**2, hidden, create_graph=True)
    found = 0
    for path in [*(ROOT / "models").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(b) == "torch.autograd.Function" for b in node.bases
            ):
                (backward,) = (f for f in node.body if getattr(f, "name", "") == "backward")
                assert "once" in [ast.unparse(d) for d in backward.decorator_list], (
                    path,
                    node.name,
                )
                found += 1
    assert found >= 5


def test_linear_scan_takes_the_complement():
    """Beside bf16 too; of an a near one nothing is lost."""
    c, b = torch.full((1, 1000, 4), 1e-6), torch.ones(1, 1000, 4)
    h, _ = linear_scan(None, b, one_minus_a=c)
    exact = -torch.expm1(1000 * torch.log1p(-c[0, 0].double())) / c[0, 0].double()
    torch.testing.assert_close(h[0, -1].double(), exact, rtol=2e-7, atol=0)
    narrow, last = linear_scan(None, b.bfloat16(), one_minus_a=c)
    assert (narrow.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(last[0].double(), exact, rtol=2e-7, atol=0)
    for a, given in ((c, c), (None, None)):
        with pytest.raises(ValueError, match="either a or one_minus_a"):
            linear_scan(a, b, one_minus_a=given)


@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
def test_a_decay_of_zero_is_no_reset_to_its_gradient(backend):
    """A ReLU of a gate: the state before it counts for a's gradient, wherever resets are."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 6, 3, dtype=torch.float64)
    a[:, 2] = 0
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 4] = True
    leaf = a.clone().requires_grad_()
    h, _ = linear_scan(leaf, b, reset=reset, backend=backend)
    h.sum().backward()
    state, total, own = torch.zeros(1, 3, dtype=torch.float64), 0, a.clone().requires_grad_()
    for t in range(6):
        state = own[:, t] * (state * (t != 4)) + b[:, t]
        total = total + state.sum()
    total.backward()
    torch.testing.assert_close(leaf.grad, own.grad)


def test_a_window_of_short_documents_is_one_product():
    """What autograd keeps does not grow with the documents, nor with what a mask's ones are."""
    model, kept = model_of("window", width=64), []

    def bytes_kept(every: int, one: int) -> int:
        kept.clear()
        tokens, reset = torch.zeros(1, 256, dtype=torch.int64), torch.zeros(1, 256)
        reset[0, ::every] = one
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.nbytes) or x, lambda x: x
        ):
            model(tokens, reset=reset.to(torch.uint8))
        return sum(kept)

    assert bytes_kept(4, 255) <= 1.1 * bytes_kept(128, 1)
