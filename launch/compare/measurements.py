"""What a cell of a comparison can be measured for. One entry each; its figures are in page.py."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from launch.compare.file import CompareConfig
from trainer.config import Config
from trainer.measure import ReadingCost, TrainingCost

Cost = TrainingCost | ReadingCost


@dataclass(frozen=True)
class Measurement:
    """A function that runs in a process of its own, on all workers or `alone` on the first."""

    function: str  # module:name
    cost: type[Cost]
    arguments: Callable[[CompareConfig, int], tuple[Any, ...]]  # from settings and length
    shown: Callable[[Any, Config], str]  # a cost and its configuration, in a few words
    alone: bool = False


def _rate(cost: TrainingCost, config: Config) -> str:
    tokens = config.train.batch_size * config.train.seq_len
    return f"{tokens / median(cost.step_seconds):,.0f} tokens/s"


MEASUREMENTS = {
    "training": Measurement(
        "trainer.measure:measure_training",
        TrainingCost,
        arguments=lambda settings, length: (settings.steps, settings.seconds),
        shown=_rate,
    ),
    "reading": Measurement(
        "trainer.measure:measure_reading",
        ReadingCost,
        arguments=lambda settings, length: (
            length,
            settings.decode_tokens,
            settings.prefill_segment,
        ),
        shown=lambda cost, _: (
            f"prefill {cost.prefill_seconds:.2f} s, decode "
            f"{cost.decode_tokens_per_second:,.0f} tokens/s"
        ),
        alone=True,
    ),
}
