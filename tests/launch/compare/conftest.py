"""A small comparison, and workers that measure nothing."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.compare import run
from launch.compare.child import Call, Failed
from launch.compare.measurements import Cost
from trainer.measure import ReadingCost, TrainingCost

ROOT = Path(__file__).parents[3]


@pytest.fixture
def comparison_file(tmp_path: Path, dataset: Path) -> Path:
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"""
compare:
  dir: {tmp_path / "out"}
  mixers: [attention, mingru, [mingru, window]]
  lengths: [64, 128, 256]
  tokens_per_step: 256
  micro_batch_tokens: 128
  repetitions: 2
  steps: 2
  seconds: 0.1
  decode_tokens: 4
  tasks:
    text: [train.steps=4, train.seq_len=64, train.batch_size=2]
data: {{path: {dataset}}}
model: {{layers: 2, width: 32, heads: 2, window: 16}}
parallel: {{sp: 2}}
evaluate: {{sequences: 2, every: 2}}
launch: {{workers: 2}}
"""
    )
    return path


class FakeGang:
    """Attention slows down with length and fails at 256; the others take one time a token."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int]] = []

    def hardware(self) -> str:
        return "a machine of the test"

    def measure(self, call: Call, alone: bool) -> list[Cost | Failed]:
        train, attention = call.config.train, call.config.model.mixer == "attention"
        length, kind = train.seq_len, _kind(call)
        self.calls.append((kind, call.config.model.mixer, length))
        if attention and length == 256:
            return [Failed("stopped"), Failed("out of memory")]
        per_token = length * 1e-4 if attention else 1e-2
        if kind == "reading":
            assert alone
            return [ReadingCost(1.0, 1 / per_token, 2048, 2**30, 0)]
        tokens = train.batch_size * length
        steps = [tokens * per_token * f for f in (1, 3, 1)]
        return [TrainingCost(steps, 0.1, 64, n * 2**30, 0, None, 1e9) for n in (1, 2)]


def _kind(call: Call) -> str:
    return call.function.rpartition("_")[2]


@pytest.fixture
def gang(monkeypatch) -> FakeGang:
    fake = FakeGang()

    @contextmanager
    def cell_gang(config, should_stop):
        yield fake

    monkeypatch.setattr(run, "cell_gang", cell_gang)
    return fake
