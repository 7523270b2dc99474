"""A wish to stop, by a person, a machine or a clock, and with which status a command ends."""

import argparse
import os
import signal
import time
from typing import Any

import pytest

from launch.__main__ import main
from launch.gang import LaunchError
from launch.stop import PREEMPTED, StopWatch
from launch.verbs import train as verb
from trainer.config import Config


@pytest.mark.parametrize(
    ("number", "preempted"),
    [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)],
)
def test_a_person_stops_and_a_machine_preempts(number, preempted, capsys):
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        watch = StopWatch("stopping")
        assert not watch()
        os.kill(os.getpid(), number)
        assert watch()
        assert watch.preempted == preempted
        assert "stopping" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for wish, handler in kept.items():
            signal.signal(wish, handler)


def test_a_stop_is_heard_though_nobody_reads(monkeypatch):
    """`| tee log` ends by the same Ctrl-C."""

    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("builtins.print", closed)
    watch = StopWatch("stopping")
    watch._ask(signal.SIGINT, None)
    assert watch()


def test_time_is_a_limit_too(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    watch = StopWatch("stopping", max_seconds=1.0)
    assert not watch()
    time.sleep(1.1)
    assert watch()
    assert watch.preempted
    assert "run.max_seconds have passed" in capsys.readouterr().out
    watch._ask(signal.SIGTERM, None)  # the scheduler's first: it goes on to save
    with pytest.raises(KeyboardInterrupt):
        watch._ask(signal.SIGTERM, None)


@pytest.mark.parametrize("preempted", [True, False])
def test_train_exits_with_75_where_a_machine_preempts(config_file, monkeypatch, capsys, preempted):
    """And as a run that ended where a person asked; the wish is heard, and the time limit known."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    limits: list[float] = []

    def run_job(config: Config, on_event: Any, should_stop: StopWatch) -> bool:
        limits.append(should_stop._deadline - time.monotonic())
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM if preempted else signal.SIGINT)
        return not should_stop()

    monkeypatch.setattr("launch.verbs.train.run_job", run_job)
    command = argparse.Namespace(config=str(config_file), overrides=["run.max_seconds=60"])
    try:
        assert verb.run(command) == (PREEMPTED if preempted else 0)
    finally:
        for wish, handler in kept.items():
            signal.signal(wish, handler)
    assert "stopped in good order" in capsys.readouterr().out
    assert 50 < limits[0] <= 60


@pytest.mark.parametrize("preempted", [True, False])
def test_a_stop_that_saved_nothing_is_no_stop_in_good_order(
    config_file, monkeypatch, capsys, preempted
):
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run_job(*_: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM if preempted else signal.SIGINT)
        raise LaunchError("out of memory: not started again, as it was asked to stop")

    monkeypatch.setattr("launch.verbs.train.run_job", run_job)
    try:
        assert main(["train", str(config_file)]) == (PREEMPTED if preempted else 1)
    finally:
        for wish, handler in kept.items():
            signal.signal(wish, handler)
    said = capsys.readouterr()
    assert "stopped in good order" not in said.out
    assert "error: out of memory: not started again" in said.err
