"""Attention against its definition: softmax over a whole square of scores, masked, in fp64."""

import pytest
import torch
from torch import Tensor

from models.cache import Cache
from models.softmax_attention import QKV, attend, attend_window, rotate
from tests.models.scan.cases import make_reset

BATCH, HEADS, KV_HEADS, WIDTH, BASE = 2, 4, 2, 6, 100.0


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [B, T, ...] are the last T of the positions of k, v [B, S, ...]; seen [B, T, S] bool."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    q, k = rotate(q, k.shape[1] - q.shape[1], BASE), rotate(k, 0, BASE)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * WIDTH**-0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _leaves(steps: int, keys: int) -> list[Tensor]:
    shapes = [(steps, HEADS), (keys, KV_HEADS), (keys, KV_HEADS)]
    return [
        torch.randn(BATCH, t, n, WIDTH, dtype=torch.float64, requires_grad=True) for t, n in shapes
    ]


def _documents(reset: Tensor | None, steps: int) -> Tensor:
    """The number of each token's document, [B, T]; 0 goes on from before."""
    return torch.zeros(BATCH, steps).long() if reset is None else reset.cumsum(1)


def _check(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    pairs = [torch.autograd.grad(y, leaves, cotangent) for y in (got, want)]
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("where", ["none", "random"])
@pytest.mark.parametrize("window", [2, 7, 32, 90])
@pytest.mark.parametrize("steps", [1, 31, 32, 33, 70])
def test_a_token_sees_itself_and_the_window_before_it_and_no_other(steps, window, where):
    """Of the halo only what is there, and of nothing before a document's start."""
    halo = window - 1
    q, k, v = leaves = _leaves(steps, halo + steps)
    reset = make_reset(BATCH, steps, where)
    visible = torch.rand(BATCH, halo) < 0.7
    row, key = torch.arange(steps)[:, None] + halo, torch.arange(halo + steps)
    band = (key <= row) & (row - key < window)
    document = _documents(reset, steps)
    owner = torch.cat([torch.where(visible, 0, -1), document], dim=1)
    seen = band & (document[:, :, None] == owner[:, None])
    got = attend_window(q, k, v, visible, reset, BASE)
    _check(got, _dense(q, k, v, seen), leaves)


@pytest.mark.parametrize("where", ["none", "random"])
@pytest.mark.parametrize("cuts", [[1], [33], [70], [1, 30, 2], [9, 1, 1, 40], [33] * 3], ids=str)
def test_a_token_sees_all_of_its_document_before_it(cuts, where):
    """However it is cut into segments, with gradients to what was cached in each."""
    q, k, v = leaves = _leaves(sum(cuts), sum(cuts))
    reset = make_reset(BATCH, sum(cuts), where)
    document = _documents(reset, sum(cuts))
    seen = (document[:, :, None] == document[:, None]).tril()
    cache, parts, begin = Cache.empty(BATCH), [], 0
    for steps in cuts:
        part = slice(begin, begin + steps)
        cut = None if reset is None else reset[:, part]
        y, cache = attend(QKV(q[:, part], k[:, part], v[:, part]), cache, cut, BASE)
        parts.append(y)
        begin += steps
    _check(torch.cat(parts, dim=1), _dense(q, k, v, seen), leaves)
    assert len(cache.pieces) == 2 * len(cuts)


@pytest.mark.parametrize("where", ["none", "random"])
@torch.inference_mode()
def test_decoded_tokens_see_what_was_read_in_segments(where):
    """One by one behind segments, between them, and beside another continuation of the same."""
    cuts = [20, 13, *[1] * 5, 3, 3, 100, *[1] * 4, 3]
    q, k, v = (x.detach() for x in _leaves(sum(cuts), sum(cuts)))
    reset = make_reset(BATCH, 33, where)
    document = _documents(reset, 33) if reset is not None else torch.zeros(BATCH, 33).long()
    document = torch.cat([document, document[:, -1:].expand(-1, sum(cuts) - 33)], dim=1)
    seen = (document[:, :, None] == document[:, None]).tril()
    cache, parts, begin = Cache.empty(BATCH), [], 0
    for steps in cuts:
        part = slice(begin, begin + steps)
        cut = None if reset is None or begin >= 33 else reset[:, part]
        segment = QKV(q[:, part], k[:, part], v[:, part])
        if begin >= 33:
            attend(QKV(segment.q, -segment.k, -segment.v), cache, cut, BASE)  # writes first
        y, cache = attend(segment, cache, cut, BASE)
        parts.append(y)
        begin += steps
    torch.testing.assert_close(torch.cat(parts, dim=1), _dense(q, k, v, seen))
    assert len(cache.pieces) == 2


def test_what_was_decoded_is_gone_on_from_with_gradients():
    """Though another continuation writes behind it, and it was made for inference."""
    q, k, v = (x.detach() for x in _leaves(12, 12))
    parts = [QKV(*(x[:, at] for x in (q, k, v))) for at in (slice(0, 8), slice(8, 9), slice(9, 12))]
    with torch.inference_mode():
        _, cache = attend(parts[0], Cache.empty(BATCH), None, BASE)
        _, cache = attend(parts[1], cache, None, BASE)
    leaves = [x.clone().requires_grad_() for x in parts[2]]
    y, _ = attend(QKV(*leaves), cache, None, BASE)
    with torch.inference_mode():
        attend(parts[1], cache, None, BASE)
    y.sum().backward()
    want = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, _ = attend(QKV(*want), Cache.empty(BATCH), None, BASE)
    whole[:, 9:].sum().backward()
    torch.testing.assert_close(y, whole[:, 9:])
    for leaf, reference in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad[:, 9:])


@torch.inference_mode()
def test_infinity_in_an_earlier_document_is_not_seen():
    q, k, v = (x.detach() for x in _leaves(12, 12))
    v[:, 2] = float("inf")
    reset = torch.zeros(BATCH, 10, dtype=torch.uint8)
    reset[:, 6] = 1
    _, cache = attend(QKV(q[:, :10], k[:, :10], v[:, :10]), Cache.empty(BATCH), reset, BASE)
    for at in (10, 11):
        y, cache = attend(QKV(*(x[:, at : at + 1] for x in (q, k, v))), cache, None, BASE)
        assert y.isfinite().all()
