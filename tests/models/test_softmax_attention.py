"""Attention against its definition: softmax over a whole square of scores, masked, in fp64."""

import pytest
import torch
from torch import Tensor

from models.softmax_attention import QKV, attend, attend_window, empty_cache, rotate
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
@pytest.mark.parametrize("steps", [1, 33, 70])
def test_a_token_sees_all_of_its_document_before_it(steps, where):
    q, k, v = leaves = _leaves(steps, steps)
    reset = make_reset(BATCH, steps, where)
    document = _documents(reset, steps)
    seen = (document[:, :, None] == document[:, None]).tril()
    cache = empty_cache(BATCH, KV_HEADS, WIDTH, torch.device("cpu"))
    got, _ = attend(QKV(q, k, v), cache, reset, BASE)
    _check(got, _dense(q, k, v, seen), leaves)
