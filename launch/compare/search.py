"""Which trainings a task takes: learning rates until the best lies among others, then seeds.

Pure: `attempt` trains, and says what was held out at the end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from launch.compare.file import Trainings
from trainer.config import Config

# (mixer, run) -> held-out loss, infinite where the run was lost
Attempt = Callable[[str, Config], float]
Pace = Callable[[Config], float]  # a finished run -> seconds of a step


@dataclass
class Search:
    """The trainings of one task, mixer by mixer; every mixer has had a turn before the next."""

    trainings: dict[str, Trainings]
    attempt: Attempt
    ran: dict[str, list[Config]] = field(default_factory=dict)
    losses: dict[str, dict[float, float]] = field(default_factory=dict)  # by learning rate

    def run(self, more_rates: int) -> None:
        """All rates with one seed, more where the best is at an edge; other seeds at the best."""
        for rates in zip(*(each.rates for each in self.trainings.values()), strict=True):
            for label, rate in zip(self.trainings, rates, strict=True):
                self._try(label, rate)
        for _ in range(more_rates):
            for label, tried in self.losses.items():
                if (rate := beyond(tried)) is not None:
                    self._try(label, rate)
        seeds = [each.seeds[1:] for each in self.trainings.values()]
        for others in zip(*seeds, strict=True):
            for label, seed in zip(self.trainings, others, strict=True):
                config = self.trainings[label].at(self.best(label), seed)
                self.ran[label].append(config)
                self.attempt(label, config)

    def best(self, label: str) -> float:
        """The learning rate that did best with the first seed."""
        tried = self.losses[label]
        return min(tried, key=lambda rate: tried[rate])

    def in_equal_time(self, pace: Pace) -> dict[str, Config]:
        """For each mixer a run that takes as long as the fastest's, its schedule run to the end."""
        finished = {
            label: each.at(self.best(label), each.seeds[0])
            for label, each in self.trainings.items()
            if math.isfinite(self.losses[label][self.best(label)])
        }
        seconds = {label: pace(config) * config.train.steps for label, config in finished.items()}
        least = min(seconds.values(), default=0.0)
        for label, config in finished.items():
            steps = int(config.train.steps * least / seconds[label])
            if steps < config.train.steps:
                each = self.trainings[label]
                finished[label] = each.at(self.best(label), each.seeds[0], max(1, steps))
                self.attempt(label, finished[label])
        return finished

    def _try(self, label: str, rate: float) -> None:
        each = self.trainings[label]
        config = each.at(rate, each.seeds[0])
        self.ran.setdefault(label, []).append(config)
        self.losses.setdefault(label, {})[rate] = self.attempt(label, config)


def beyond(tried: dict[float, float]) -> float | None:
    """The next learning rate past the edge at which the best lies; None where it lies inside.

    In the ratio of the two at that edge, or of three where there is one.
    """
    rates = sorted(tried)
    place = min(range(len(rates)), key=lambda n: tried[rates[n]])
    if place == 0:
        ratio = rates[1] / rates[0] if len(rates) > 1 else 3.0
        return float(f"{rates[0] / ratio:.3g}")
    if place == len(rates) - 1:
        return float(f"{rates[-1] * rates[-1] / rates[-2]:.3g}")
    return None
