"""The tiled loss against torch's, and its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data import IGNORED
from trainer.loss import scored_cross_entropy, summed_cross_entropy, token_scores


class LargestTensor(TorchDispatchMode):
    """Watches every operation, backward ones too, for the largest tensor that it returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("tile", [1, 7, 30, 1000])
def test_equals_cross_entropy_of_all_logits(tile):
    hidden = torch.randn(2, 15, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 15))
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    actual = summed_cross_entropy(hidden, weight, labels, tile)
    torch.testing.assert_close(actual, expected)
    want = torch.autograd.grad(3 * expected, [hidden, weight])
    got = torch.autograd.grad(3 * actual, [hidden, weight])
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)
    each, right = token_scores(hidden, weight, labels, tile)
    assert each.shape == right.shape == labels.shape
    assert torch.equal(right > 0, (hidden @ weight.T).argmax(-1) == labels)
    assert float(each.sum()) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("scored", [0, 1, 9])
def test_only_scored_labels_count(scored):
    """Labels that are ignored change neither the sum nor a gradient; there may be none left."""
    hidden = torch.randn(2, 15, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.full((2, 15), IGNORED)
    where = torch.randperm(30)[:scored]
    labels.view(-1)[where] = torch.randint(0, 11, (scored,))
    logits = (hidden @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    actual = scored_cross_entropy(hidden, weight, labels, 4)
    torch.testing.assert_close(actual, expected)
    want = torch.autograd.grad(expected, [hidden, weight])
    got = torch.autograd.grad(actual, [hidden, weight])
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)
    losses, right = token_scores(hidden, weight, labels, 4)
    assert float(losses.sum()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert not right[labels < 0].any()


def test_bf16_is_summed_in_fp32():
    """4,096 losses near 5 would be rounded to a multiple of 128 in bf16."""
    hidden = torch.randn(1, 4096, 8).bfloat16().requires_grad_()
    weight = torch.randn(200, 8).bfloat16().requires_grad_()
    labels = torch.randint(0, 200, (1, 4096))
    loss = summed_cross_entropy(hidden, weight, labels, 100)
    logits = (hidden @ weight.T).float().flatten(0, 1)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(
        float(F.cross_entropy(logits, labels.flatten(), reduction="sum").detach()), rel=1e-5
    )
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_logits_of_a_long_sequence_never_exist():
    """No tensor that is allocated is as large as one [T, V]."""
    steps, vocabulary, tile = 4096, 512, 128
    hidden = torch.randn(1, steps, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, steps))
    with LargestTensor() as largest:
        summed_cross_entropy(hidden, weight, labels, tile).backward()
    assert largest.numel == tile * vocabulary
