"""Whose turn it is: shares to within one sequence, always, and a function of n alone."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.mixture import Mixture


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 5000))
def test_each_source_has_its_share_to_within_one_sequence(parts, n):
    """Of the first n: a count that is nowhere a sequence or more from the exact share."""
    mixture = Mixture.of({str(k): part for k, part in enumerate(parts)})
    taken = np.bincount([mixture.source(i)[0] for i in range(n)], minlength=len(parts))
    assert mixture.counts(n) == taken.tolist()
    for part, count in zip(parts, taken.tolist(), strict=True):
        assert abs(count - Fraction(n * part, sum(parts))) < 1


@given(st.lists(st.integers(1, 1000).map(lambda x: x / 100), min_size=1, max_size=5))
def test_sequences_of_a_source_follow_each_other(weights):
    """The i-th turn of a source is its i-th sequence, over periods too."""
    mixture = Mixture.of({str(k): weight for k, weight in enumerate(weights)})
    seen = [0] * len(weights)
    for n in range(300):
        source, index = mixture.source(n)
        assert index == seen[source]
        seen[source] += 1
    shares = [weight / sum(weights) for weight in weights]
    assert np.allclose(np.array(mixture.parts) / mixture.period, shares)


def test_decimals_are_taken_as_they_are_written():
    assert Mixture.of({"a": 0.7, "b": 0.3}).parts == (7, 3)
    assert Mixture.of({"a": 1, "b": 1.5, "c": 2.5}).parts == (2, 3, 5)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 1, "b": 0}, "weight 0 of b is not positive"),
        ({"a": float("nan")}, "is not positive"),
        ({"a": 1, "b": 1e-9}, "round them"),
        ({}, "no source"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        Mixture.of(weights)


def test_a_fingerprint_knows_order_and_weights():
    mixture = Mixture.of({"a": 1, "b": 2})
    assert Mixture.of({"a": 5}).fingerprint(["x"]) == "x"
    told = {
        mixture.fingerprint(["x", "y"]),
        mixture.fingerprint(["y", "x"]),
        Mixture.of({"a": 2, "b": 1}).fingerprint(["x", "y"]),
    }
    assert len(told) == 3
    assert mixture.fingerprint(["x", "y"]) == Mixture.of({"p": 2, "q": 4}).fingerprint(["x", "y"])
