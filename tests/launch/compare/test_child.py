"""A measurement in a process of its own, ended by time or memory."""

import os
import signal
import time
from typing import Any

import pytest
import torch

from launch.compare.child import OUT_OF_MEMORY, OUT_OF_TIME, STOPPED, Call, Child, Failed
from trainer.config import Config, load_config
from trainer.measure import ReadingCost, TrainingCost, measure_reading, measure_training

pytestmark = pytest.mark.slow

ALONE: dict[str, str] = {"OMP_NUM_THREADS": "1"}


def _config(config_file: Any, *overrides: str) -> Config:
    return load_config(config_file, ["evaluate.sequences=0", *overrides])


def _measure(function: Any, config: Config, *arguments: Any, **limits: Any) -> Any:
    name = f"{function.__module__}:{function.__name__}"
    return Child(Call(name, config, arguments, **limits), ALONE).wait()


def test_training_is_timed_after_one_step_that_is_not(config_file):
    cost = _measure(measure_training, _config(config_file), 3, 1e9)
    assert isinstance(cost, TrainingCost), cost
    assert len(cost.step_seconds) == 3
    assert min(cost.step_seconds) > 0
    assert cost.exchange_bytes == 0  # one worker exchanges nothing
    assert 0 < cost.peak_memory_bytes < 2**30 < 4 * cost.idle_memory_bytes
    assert len(_measure(measure_training, _config(config_file), 3, 0.0).step_seconds) == 1


@pytest.mark.parametrize("mixer", ["attention", "mingru"])
def test_reading_keeps_what_the_mixer_needs(config_file, mixer):
    config = _config(config_file, f"model.mixer={mixer}", "launch.workers=2", "parallel.sp=2")
    short, long = (_measure(measure_reading, config, n, 8, 4096) for n in (100, 4000))
    assert isinstance(short, ReadingCost), short
    assert short.decode_tokens_per_second > 0 < long.prefill_seconds
    assert (long.carry_bytes > 5 * short.carry_bytes) == (mixer == "attention")


def _sleep(config: Config) -> dict[str, Any]:
    time.sleep(60)
    return {}


def _die(config: Config, how: int) -> dict[str, Any]:
    os.kill(os.getpid(), how)
    return {}


def _allocate(config: Config, size: int) -> dict[str, Any]:
    return {"sum": float(torch.ones(size, dtype=torch.uint8).sum())}


def _fail(config: Config) -> dict[str, Any]:
    raise ValueError("what was wrong")


def test_what_takes_too_long_is_out_of_time():
    started = time.monotonic()
    assert _measure(_sleep, Config(), seconds=0.5) == Failed(OUT_OF_TIME)
    assert time.monotonic() - started < 20


def test_what_takes_too_much_is_out_of_memory():
    """By the limit that was set, in this process's own words, or by Linux's signal."""
    limit = {"memory_bytes": 6 << 30}
    assert _measure(_allocate, Config(), 1 << 20, **limit) == {"sum": 2.0**20}
    assert _measure(_allocate, Config(), 7 << 30, **limit) == Failed(OUT_OF_MEMORY)
    assert _measure(_die, Config(), signal.SIGKILL) == Failed(OUT_OF_MEMORY)


def test_other_faults_are_told_as_they_are():
    assert "ValueError: what was wrong" in _measure(_fail, Config()).why
    assert "exit status -11" in _measure(_die, Config(), signal.SIGSEGV).why


def test_stop_ends_it_at_once():
    child = Child(Call(f"{__name__}:_sleep", Config(), seconds=30), ALONE)
    child.stop()
    assert child.wait() == Failed(STOPPED)
