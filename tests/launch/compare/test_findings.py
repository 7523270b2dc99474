"""A comparison in words: what its sentences say is what its figures are."""

import math
from dataclasses import replace
from pathlib import Path

from launch.compare.findings import _crossing, _held_out_at, _machines, _verdict
from launch.compare.results import Point, TrainingRecord, best_runs

ROOT = Path(__file__).parents[3]


def test_crossing_is_told_as_it_is():
    def said(*ratios):
        return _crossing(("x", "attention"), "trains faster than", "its speed", list(ratios))

    assert "from about 200 tokens on" in said((100, 0.5), (400, 2.0))
    assert "only up to about 200 tokens" in said((100, 2.0), (400, 0.5))
    assert "at every length measured" in said((100, 1.5), (400, 2.0))
    assert "cross at about 200 and 800" in said((100, 2.0), (400, 0.5), (1600, 2.0))
    assert "at no length measured" in said((100, 0.5), (400, 0.9))
    assert "measured together at no length" in said()
    assert "attention at every length measured: 1.50 times its speed at 100 tokens." in said(
        (100, 1.5)
    )
    less = _crossing(
        ("x", "attention"), "trains in less memory than", "its memory", [(1, 2.0), (2, 4.0)]
    )
    assert "0.50 times its memory at 1 tokens, 0.25 times at 2" in less


def _record(rate: float, seed: int, loss: float) -> TrainingRecord:
    points = [Point(64, 2.0, loss + 1), Point(128, 4.0, loss)]
    return TrainingRecord(rate, seed, [64, 128], [2.0, 4.0], [3.0, loss], points, {"loss": loss})


def test_a_loss_that_is_no_number_is_no_best():
    runs = [_record(1e-4, 0, math.nan), _record(1e-3, 0, 2.0)]
    assert [run.learning_rate for run in best_runs(runs)] == [1e-3]


def test_the_order_is_that_of_the_medians_that_the_table_shows():
    """Of two seeds too: one lucky run of a mixer does not stand for both."""
    lucky = [_record(1e-3, 0, 1.0), _record(1e-3, 1, 3.0)]
    steady = [_record(1e-3, 0, 1.5), _record(1e-3, 1, 1.6)]
    first, second = _verdict("text", {"lucky": lucky, "steady": steady})
    assert "the median of 2 seeds, best first: steady 1.550, lucky 2.000." in first
    assert "best first: steady 1.550, lucky 2.000 (" in second


def test_other_machines_are_named():
    run = replace(_record(1e-3, 0, 1.0), hardware=["a fast one"])
    (said,) = _machines("text", "a slow one", {"mingru": [run]})
    assert "trained on a fast one, cells were measured on a slow one" in said
    assert not [*_machines("text", "a fast one", {"mingru": [run]})]


def test_held_out_at_a_time_lies_between_evaluations():
    points = [Point(0, 2, 4.0), Point(0, 4, 2.0)]
    run = TrainingRecord(1e-3, 0, [], [], [], points, {})
    assert [_held_out_at(run, t) for t in (1, 2, 3, 4, 9)] == [None, 4, 3, 2, 2]
    lost = replace(run, held_out=[*points, Point(0, 6, math.inf), Point(0, 8, math.inf)])
    assert [_held_out_at(lost, t) for t in (4, 5, 6, 7, 9)] == [2, *[math.inf] * 4]
