"""What is measured, in which order, and what need not be. Pure: nothing runs here.

Cells are interleaved: a repetition passes through all of them before the next begins, so that a
machine that drifts drifts for all alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from launch.compare.file import Comparison
from launch.compare.measurements import MEASUREMENTS
from launch.compare.results import CellRecord, Visit


def visits(comparison: Comparison) -> Iterator[Visit]:
    """Every repetition of every cell; mixers of one length are neighbours in time."""
    labels, lengths = list(comparison.models), sorted(set(comparison.settings.lengths))
    for repetition in range(comparison.settings.repetitions):
        for length in lengths:
            for kind in MEASUREMENTS:
                # another one is first each time
                shift = repetition % len(labels)
                for label in labels[shift:] + labels[:shift]:
                    yield Visit(kind, label, length, repetition)


@dataclass
class Limits:
    """What each mixer has managed, and where it first met a limit of the machine."""

    _met: dict[tuple[str, str], CellRecord] = field(default_factory=dict)
    _reached: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, record: CellRecord) -> None:
        """Take note of a cell, measured now or before."""
        visit, mixer = record.visit, (record.visit.kind, record.visit.label)
        if record.failed is None:
            self._reached[mixer] = max(visit.length, self._reached.get(mixer, 0))
        elif record.is_limit and visit.length > self._reached.get(mixer, 0):
            self._met[mixer] = min(
                record, self._met.get(mixer, record), key=lambda r: r.visit.length
            )

    def is_unlucky(self, record: CellRecord) -> bool:
        """A limit where as much was managed before is bad luck: it is to be measured again."""
        visit = record.visit
        reached = self._reached.get((visit.kind, visit.label), 0)
        return record.failed is not None and visit.length <= reached

    def beyond(self, visit: Visit) -> CellRecord | None:
        """The limit that an easier cell has met, so that this one need not be tried."""
        met = self._met.get((visit.kind, visit.label))
        return met if met and met.visit.length <= visit.length else None
