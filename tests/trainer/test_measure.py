"""A cell of a comparison: measured in a process of its own, ended by time or memory."""

import os
import signal
import time
from typing import Any

import pytest
import torch

from trainer.comparison import load_comparison
from trainer.config import Config, load_config
from trainer.measure import (
    OUT_OF_MEMORY,
    OUT_OF_TIME,
    STOPPED,
    Cell,
    measure_reading,
    measure_training,
)

ALONE: dict[str, str] = {"OMP_NUM_THREADS": "1"}


def _config(config_file: Any, *overrides: str) -> Config:
    return load_config(config_file, ["evaluate.sequences=0", *overrides])


def _measure(function: Any, config: Config, *arguments: Any, **limits: Any) -> dict[str, Any]:
    seconds = limits.pop("seconds", 60)
    return Cell(function, config, arguments, ALONE, **limits).wait(seconds)


def test_training_is_timed_after_one_step_that_is_not(config_file):
    found = _measure(measure_training, _config(config_file), 3, 1e9)
    assert "failed" not in found, found
    assert len(found["step_seconds"]) == 3
    assert min(found["step_seconds"]) > 0
    assert found["exchange_bytes"] == 0  # one worker exchanges nothing
    assert 0 < found["peak_memory_bytes"] < 2**30 < 4 * found["idle_memory_bytes"]
    assert len(_measure(measure_training, _config(config_file), 3, 0.0)["step_seconds"]) == 1


@pytest.mark.parametrize("mixer", ["attention", "mingru"])
def test_reading_keeps_what_the_mixer_needs(config_file, mixer):
    config = _config(config_file, f"model.mixer={mixer}")
    short, long = (_measure(measure_reading, config, n, 8, 4096) for n in (100, 4000))
    assert short["decode_tokens_per_second"] > 0 < long["prefill_seconds"]
    assert (long["carry_bytes"] > 5 * short["carry_bytes"]) == (mixer == "attention")


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
    assert _measure(_sleep, Config(), seconds=0.5) == {"failed": OUT_OF_TIME}
    assert time.monotonic() - started < 20


def test_what_takes_too_much_is_out_of_memory():
    """By the limit that was set, in this process's own words, or by Linux's signal."""
    limit = {"memory_bytes": 6 << 30}
    assert _measure(_allocate, Config(), 1 << 20, **limit) == {"sum": 2.0**20}
    assert _measure(_allocate, Config(), 40 << 30, **limit) == {"failed": OUT_OF_MEMORY}
    assert _measure(_die, Config(), signal.SIGKILL) == {"failed": OUT_OF_MEMORY}


def test_other_faults_are_told_as_they_are():
    assert "ValueError: what was wrong" in _measure(_fail, Config())["failed"]
    assert "exit status -11" in _measure(_die, Config(), signal.SIGSEGV)["failed"]


def test_stop_ends_a_cell_at_once():
    cell = Cell(_sleep, Config(), (), ALONE)
    cell.stop()
    assert cell.wait(30) == {"failed": STOPPED}


def test_all_cells_see_the_same_tokens_and_parameters(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text(
        """
compare:
  mixers: [attention, minlstm, [mingru, window]]
  lengths: [64, 256, 2048]
  tokens_per_step: 1024
  micro_batch_tokens: 256
model: {layers: 2, width: 64, window: 16}
parallel: {sp: 2}
launch: {workers: 4}
"""
    )
    comparison = load_comparison(path, [])
    for (_, length), cell in comparison.cells.items():
        train = cell.train
        assert train.seq_len == length
        assert train.batch_size * length == max(1024, 2 * length)  # a sequence for each of dp=2
        assert train.micro_batch_size == max(1, 256 // length)
    assert list(comparison.models) == ["attention", "minlstm", "mingru+window"]
