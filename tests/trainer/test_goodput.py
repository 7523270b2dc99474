"""Goodput is counted over restarts; the interval of saves is the best that a simulation finds."""

import math
import random
import time

import pytest

from trainer.config import CheckpointConfig
from trainer.goodput import (
    DAY_SECONDS,
    Costs,
    Goodput,
    SaveSchedule,
    Submission,
    best_interval,
    describe,
    expected_goodput,
    taken,
)
from trainer.run_folder import RunFolder, add_line, truncate_after


def _simulate(costs: Costs, interval: float, days: float, seed: int) -> float:
    """Failure by failure: the share of time in steps that were not lost."""
    moments, now, useful = random.Random(seed), 0.0, 0.0
    end = days * DAY_SECONDS
    fails_at = moments.expovariate(1 / costs.between_failures)
    while now < end:
        done = now + interval + costs.save_seconds
        if done <= fails_at:
            now, useful = done, useful + interval
            continue
        now = fails_at + costs.recovery_seconds
        fails_at += moments.expovariate(1 / costs.between_failures)
        while fails_at < now:  # again, while it recovers
            now = fails_at + costs.recovery_seconds
            fails_at += moments.expovariate(1 / costs.between_failures)
    return useful / now


# 1,000 workers that each fail once in 50 days, as large clusters report; costs as measured here,
# and ten times worse.
THOUSAND = [Costs(0.05, 15, 20), Costs(5, 60, 20), Costs(60, 300, 20), Costs(60, 600, 200)]


@pytest.mark.parametrize("costs", THOUSAND)
def test_the_formula_is_what_a_simulation_gives(costs):
    best = best_interval(costs)
    for interval in (best / 4, best, best * 4):
        simulated = _simulate(costs, interval, 1000, seed=1)
        assert simulated == pytest.approx(expected_goodput(costs, interval), abs=0.004)


@pytest.mark.parametrize("costs", THOUSAND)
def test_no_other_interval_is_better(costs):
    best = best_interval(costs)
    reached = expected_goodput(costs, best)
    others = [expected_goodput(costs, best * 1.02**n) for n in range(-200, 201)]
    assert reached >= max(others) - 1e-4


def test_saving_takes_no_less_than_a_second_between():
    assert best_interval(Costs(1e-9, 1, 1e6)) == 1.0
    assert best_interval(Costs(1000, 1, DAY_SECONDS)) == 1.0  # a failure a second: hopeless


def test_a_save_is_due_by_steps_or_by_time():
    schedule = SaveSchedule(CheckpointConfig(every=10))
    assert [step for step in range(1, 31) if schedule.due(step)] == [10, 20, 30]
    assert SaveSchedule(CheckpointConfig(every=10)).interval_seconds == math.inf
    timed = SaveSchedule(CheckpointConfig(every=10**9, every_seconds=1.0))
    assert not timed.due(1)
    time.sleep(1.1)
    assert timed.due(2)
    timed.saved(0.01)
    assert not timed.due(3)
    chosen = SaveSchedule(CheckpointConfig(failures_per_day=24.0))
    before = chosen.interval_seconds
    for _ in range(20):
        chosen.saved(0.01)  # cheaper than was thought: more often
    assert chosen.interval_seconds == pytest.approx(best_interval(Costs(0.01, 0, 24.0)))
    assert chosen.interval_seconds < before
    assert chosen.take_held_up() == pytest.approx(0.2)
    assert chosen.take_held_up() == 0


def _steps(folder: RunFolder, goodput: Goodput, steps: range, seconds: float) -> None:
    for step in steps:
        counted = goodput.count(seconds, workers=2)
        add_line(
            folder.metrics, {"step": step, "step_seconds": seconds, "save_seconds": 0.25, **counted}
        )


def test_steps_that_were_left_out_are_of_no_use_after_a_restart_either(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    lines = [{"step": 1, "step_seconds": 1.0, "skipped_steps": 0}]
    lines += [{"step": step, "step_seconds": 1.0, "skipped_steps": 1} for step in (2, 3)]
    assert [line["step"] for line in taken(lines)] == [1, 3]
    folder = RunFolder(tmp_path)
    for line in lines:
        add_line(folder.metrics, {**line, "elapsed_seconds": 4.0})
    goodput = Goodput(folder, Submission("second", time.time()), 3, "a machine")
    assert goodput.count(0.0, 1)["goodput"] == pytest.approx(0.5)


def test_a_step_that_another_command_goes_on_with_is_counted_whole(tmp_path, monkeypatch):
    """Its time was somebody's: the goodput is no more than what was useful of it."""
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    folder = RunFolder(tmp_path)
    goodput = Goodput(folder, Submission("second", 1000.0), 0, "a machine")
    goodput.take_up(300.0, saved_at=999.0)
    goodput.take_up(300.0, saved_at=1001.0)  # its own, whose time counts as it is
    clock[0] += 200
    line = goodput.count(400.0, 1)  # of which 100 were this one's
    assert line["elapsed_seconds"] == 500
    assert line["goodput"] == pytest.approx(0.8)


def test_restarts_and_lost_steps_are_counted(tmp_path, monkeypatch):
    """10 steps of a second, 4 lost, back after 20 s; then another day's submission."""
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    folder = RunFolder(tmp_path)
    first = Submission("first", 1000.0)
    goodput = Goodput(folder, first, 0, "a machine")
    for step in range(1, 11):
        clock[0] += 1
        _steps(folder, goodput, range(step, step + 1), 1.0)
    clock[0] += 20  # killed, and back at step 6 with the 7th
    again = Goodput(folder, first, 6, "a machine")
    truncate_after(folder.metrics, 6)
    _steps(folder, again, range(7, 8), 1.0)
    told = describe(folder)
    assert told == {
        "goodput": pytest.approx(7 / 30),
        "elapsed_seconds": 30,
        "save_share": pytest.approx(0.2),
        "restarts": 1,
        "lost_steps": 4,
        "recovery_seconds": 20,
        "worst_recovery_seconds": 20,
    }
    # lost before its first step, when its lines had been dropped: nothing is forgotten
    clock[0] += 2
    Goodput(folder, first, 5, "a machine")
    truncate_after(folder.metrics, 5)
    clock[0] += 3
    third = Goodput(folder, first, 5, "a machine")
    _steps(folder, third, range(6, 8), 1.0)
    told = describe(folder)
    assert told is not None
    assert (told["restarts"], told["lost_steps"]) == (2, 4 + 2)
    assert (told["recovery_seconds"], told["worst_recovery_seconds"]) == (12.5, 20)
    assert not folder.behind.exists()
    clock[0] += DAY_SECONDS  # no machine was held
    later_at = clock[0]
    later = Goodput(folder, Submission("second", later_at), 7, "a machine")
    clock[0] += 1
    _steps(folder, later, range(8, 9), 1.0)
    told = describe(folder)
    assert told is not None
    assert told["elapsed_seconds"] == 36
    assert told["goodput"] == pytest.approx(8 / 36)
    assert told["restarts"] == 2
    clock[0] += 60  # and lost once more
    second = Submission("second", later_at)
    _steps(folder, Goodput(folder, second, 8, "a machine"), range(9, 10), 1.0)
    told = describe(folder)
    assert told is not None
    assert told["recovery_seconds"] == 20  # the median
    assert told["worst_recovery_seconds"] == 60
