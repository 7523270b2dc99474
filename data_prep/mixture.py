"""Several datasets by weight: which source the n-th sequence of a run is of, a function of n alone.

After any number of sequences, each source has had its share of them to within one sequence. Those
of a source follow each other in its own order, however often it is passed through.

Source: the earliest deadline first of released jobs, which meets every deadline on one machine (Liu
and Layland 1973); a source of weight w has its i-th job from i / w on, due by (i + 1) / w.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LONGEST = 100_000  # sequences until the order of sources repeats


@dataclass(frozen=True)
class Mixture:
    """Sources by their parts [sources], whole numbers without a common divisor."""

    parts: tuple[int, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Mixture":
        """Of weights in any unit. Raises ValueError where they cannot be kept exactly."""
        if not weights:
            raise ValueError("there is no source: give at least one, with its weight")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight {weight} of {name} is not positive")
        exact = [Fraction(str(weight)) for weight in weights.values()]
        whole = math.lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * whole) for weight in exact]
        divisor = math.gcd(*parts)
        if sum(parts) // divisor > LONGEST:
            raise ValueError(
                f"the weights {', '.join(map(str, weights.values()))} are exact only every "
                f"{sum(parts) // divisor:,} sequences: round them, to parts of {LONGEST:,} at most"
            )
        return cls(tuple(part // divisor for part in parts))

    def fingerprint(self, sources: list[str]) -> str:
        """Of all that decides what the n-th sequence is, given the sources' own fingerprints."""
        if len(sources) == 1:
            return sources[0]
        return hashlib.sha256(json.dumps([sources, self.parts]).encode()).hexdigest()

    @property
    def period(self) -> int:
        """Sequences after which every source has had its share exactly."""
        return sum(self.parts)

    def source(self, n: int) -> tuple[int, int]:
        """Of the n-th sequence: its source, and how many of that source came before."""
        rounds, place = divmod(n, self.period)
        source, before = self._order[place].tolist()
        return source, rounds * self.parts[source] + before

    def counts(self, n: int) -> list[int]:
        """How many of the first n sequences are of each source."""
        rounds, place = divmod(n, self.period)
        inside = np.bincount(self._order[:place, 0], minlength=len(self.parts)).tolist()
        return [rounds * part + more for part, more in zip(self.parts, inside, strict=True)]

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """[period, 2] source, and how many of it came before, of every sequence of a period."""
        taken, period = [0] * len(self.parts), self.period
        order = np.empty((period, 2), np.int64)
        for n in range(period):
            released = (k for k, part in enumerate(self.parts) if taken[k] * period <= n * part)
            first = min(released, key=lambda k: -(-(taken[k] + 1) * period // self.parts[k]))
            order[n] = first, taken[first]
            taken[first] += 1
        return order
