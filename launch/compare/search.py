"""Which trainings a task takes: learning rates until the best lies among others, then seeds.

Pure: `attempt` trains some runs, in whatever order, and ranks what each held out at its end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from launch.compare.file import Trainings
from launch.compare.results import LOST, Rank, middle_rank
from trainer.config import Config

Attempt = Callable[[list[tuple[str, Config]]], list[Rank]]  # of each (mixer, run)
Pace = Callable[[Config], float]  # a finished run -> seconds of a step


@dataclass
class Search:
    """The trainings of one task, mixer by mixer; every mixer has had a turn before the next."""

    trainings: dict[str, Trainings]
    attempt: Attempt
    ran: dict[str, list[Config]] = field(default_factory=dict)
    # by mixer and learning rate, those of the seeds so far
    found: dict[str, dict[float, list[Rank]]] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, dict[float, Rank]]:
        """By mixer and learning rate, the middle one of the seeds so far."""
        return {
            label: {rate: middle_rank(ranks) for rate, ranks in tried.items()}
            for label, tried in self.found.items()
        }

    def run(self, more_rates: int) -> None:
        """All rates with one seed, more where the best is at an edge; other seeds at the best.

        Where these make another rate the better one, it has them too: the first seed of a rate
        that has all may have been lucky.
        """
        each = self.trainings
        rates = zip(*(mixer.rates for mixer in each.values()), strict=True)
        self._try([pair for of_all in rates for pair in zip(each, of_all, strict=True)])
        left = dict.fromkeys(each, more_rates)
        while runs := [*self._further(left)] or [*self._lacking()]:
            self._train(runs)

    def _further(self, left: dict[str, int]) -> Iterator[tuple[str, float, int]]:
        """The next rates of the mixers whose best lies at an edge, and which have some left."""
        for label, tried in self.ranks.items():
            if left[label] and (rate := beyond(tried)) is not None:
                left[label] -= 1
                yield label, rate, self.trainings[label].seeds[0]

    def _lacking(self) -> list[tuple[str, float, int]]:
        """The seeds that the mixers' best rates have not had, all mixers' second before a third."""
        return [
            (label, self.best(label), seeds[place])
            for place in range(max(len(mixer.seeds) for mixer in self.trainings.values()))
            for label, seeds in ((name, each.seeds) for name, each in self.trainings.items())
            if len(self.found[label][self.best(label)]) <= place < len(seeds)
        ]

    def best(self, label: str) -> float:
        """The learning rate that did best, by the middle one of its seeds so far."""
        tried = self.ranks[label]
        return min(tried, key=lambda rate: tried[rate])

    def in_equal_time(self, pace: Pace) -> dict[str, Config]:
        """For each mixer a run that takes as long as the fastest's, its schedule run to the end."""
        finished = {
            label: each.at(self.best(label), each.seeds[0])
            for label, each in self.trainings.items()
            if self.ranks[label][self.best(label)] != LOST
        }
        seconds = {label: pace(config) * config.train.steps for label, config in finished.items()}
        least = min(seconds.values(), default=0.0)
        shorter = {}
        for label, config in finished.items():
            steps = int(config.train.steps * least / seconds[label])
            if steps < config.train.steps:
                each = self.trainings[label]
                shorter[label] = each.at(self.best(label), each.seeds[0], max(1, steps))
        self.attempt(list(shorter.items()))
        return finished | shorter

    def _try(self, pairs: list[tuple[str, float]]) -> None:
        """Mixers at rates, with the first seed."""
        self._train([(label, rate, self.trainings[label].seeds[0]) for label, rate in pairs])

    def _train(self, runs: list[tuple[str, float, int]]) -> None:
        """Mixers at rates and seeds."""
        configs = [(label, self.trainings[label].at(rate, seed)) for label, rate, seed in runs]
        for label, config in configs:
            self.ran.setdefault(label, []).append(config)
        for (label, rate, _), rank in zip(runs, self.attempt(configs), strict=True):
            self.found.setdefault(label, {}).setdefault(rate, []).append(rank)


def beyond(tried: dict[float, Rank]) -> float | None:
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
