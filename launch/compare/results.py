"""The results of a comparison: its records, on disk and in types, and the figures read off them."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, median_high
from typing import Any

from data_prep.files import write_whole
from launch.compare.child import OUT_OF_MEMORY, OUT_OF_TIME
from launch.compare.file import CompareConfig
from launch.compare.measurements import MEASUREMENTS, Cost
from trainer.config import Config
from trainer.measure import TrainingCost

Json = dict[str, Any]
Rank = tuple[float, ...]  # of a training, lower is better

LOST: Rank = (math.inf,)  # a training without a result


@dataclass(frozen=True)
class Visit:
    """One repetition of one cell."""

    kind: str  # a name of MEASUREMENTS
    label: str  # of the mixer
    length: int
    repetition: int


@dataclass(frozen=True)
class CellRecord:
    """What a visit has found: a cost, or why there is none."""

    visit: Visit
    commit: str
    cost: Cost | None = None
    failed: str | None = None
    failed_at: int | None = None  # the shorter length at which that was found

    @property
    def is_limit(self) -> bool:
        """A limit of the machine, not a fault: longer sequences need not be tried."""
        return self.failed in (OUT_OF_MEMORY, OUT_OF_TIME)

    @property
    def reason(self) -> str:
        """The last line of why it failed."""
        return (self.failed or "").strip().splitlines()[-1]

    def to_json(self) -> Json:
        visit = self.visit
        named: Json = {"commit": self.commit, "what": visit.kind, "mixer": visit.label}
        named |= {"length": visit.length, "repetition": visit.repetition}
        why = {"failed": self.failed, "failed_at": self.failed_at}
        failure = {key: value for key, value in why.items() if value is not None}
        return {**named, **failure, **(asdict(self.cost) if self.cost else {})}

    @classmethod
    def from_json(cls, raw: Json) -> "CellRecord":
        visit = Visit(raw["what"], raw["mixer"], raw["length"], raw["repetition"])
        if "failed" in raw:
            return cls(visit, raw["commit"], None, raw["failed"], raw.get("failed_at"))
        kind = MEASUREMENTS[visit.kind].cost
        figures = {item.name: raw[item.name] for item in fields(kind)}
        return cls(visit, raw["commit"], kind(**figures))


@dataclass(frozen=True)
class Point:
    """A held-out loss on the way, nats per token, and the share of right answers."""

    tokens: int
    seconds: float
    loss: float
    accuracy: float | None = None  # None of frames


@dataclass(frozen=True)
class TrainingRecord:
    """A finished training of a task. `final` is the run's evaluation.json."""

    learning_rate: float
    seed: int
    tokens: list[int]
    seconds: list[float]
    loss: list[float]
    held_out: list[Point]
    final: Json
    asks: bool = False  # whether the task has questions: then right answers count before the loss
    hardware: list[str] = field(default_factory=list)  # that it ran on, where its starts tell
    commits: list[str] = field(default_factory=list)  # of the code that it ran

    @property
    def final_loss(self) -> float:
        """Held out, after the last step, nats per token; infinite where it is no number."""
        return finite(self.final["loss"])

    @property
    def rank(self) -> Rank:
        """What runs of a task are compared by, the lowest best.

        Where the task asks questions, the share of wrong answers, and the loss of those alike:
        far beyond the lengths it was trained on a model that is seldom wrong, and sure of itself,
        has a higher loss than one that guesses.
        """
        return (1 - self.final["accuracy"], self.final_loss) if self.asks else (self.final_loss,)


@dataclass(frozen=True)
class ModelFacts:
    """A model's shape, its exact parameters, and FLOPs and tokens a step by length."""

    width: int
    layers: int
    mlp_width: int
    parameters: int
    training_flops_per_token: dict[int, float]
    tokens_per_step: dict[int, int]


@dataclass(frozen=True)
class Results:
    """All that a comparison has found, and in which circumstances."""

    hardware: str
    versions: dict[str, str]
    settings: CompareConfig
    config: Config
    target_parameters: int
    models: dict[str, ModelFacts]
    cells: list[CellRecord]
    tasks: dict[str, dict[str, list[TrainingRecord]]]  # name -> label -> runs
    lost: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> training -> why
    # name -> label -> the learning rates tried, with those whose trainings were lost
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # name -> label -> the run in as much time as the fastest mixer's took
    in_equal_time: dict[str, dict[str, TrainingRecord]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        raw = {**asdict(self), "cells": [cell.to_json() for cell in self.cells]}
        write_whole(path, json.dumps(_strict(raw), allow_nan=False) + "\n")

    @property
    def lengths(self) -> list[int]:
        return sorted(set(self.settings.lengths))

    @property
    def workers(self) -> int:
        return self.config.launch.workers

    def of(self, kind: str) -> "Cells":
        """Repetitions of every cell of one kind, by mixer and length."""
        cells: Cells = {}
        for record in self.cells:
            if record.visit.kind == kind:
                cells.setdefault((record.visit.label, record.visit.length), []).append(record)
        return cells

    def training_rate(self, record: CellRecord) -> float:
        """Tokens per second of all workers, from the median step of a repetition."""
        tokens = self.models[record.visit.label].tokens_per_step[record.visit.length]
        return tokens / step_seconds(record)

    def gigaflops(self, record: CellRecord) -> float:
        """Achieved by all workers, counting what the model needs."""
        model = self.models[record.visit.label]
        per_token = model.training_flops_per_token[record.visit.length]
        return self.training_rate(record) * per_token / 1e9

    def known_peak(self) -> float | None:
        """The peak FLOP/s of a worker's device, where it is known."""
        costs = (record.cost for record in self.cells)
        peaks = (cost.peak_flops for cost in costs if isinstance(cost, TrainingCost))
        return next((peak for peak in peaks if peak), None)


def finite(loss: float) -> float:
    """A loss to be sorted: infinite where it is no number."""
    return loss if math.isfinite(loss) else math.inf


def _strict(value: Any) -> Any:
    """With null for numbers that JSON does not have: other readers refuse them."""
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Store:
    """The records of visits on disk, whole after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        raw: dict[str, Json] = json.loads(path.read_text()) if path.exists() else {}
        self.records: dict[str, CellRecord] = {}
        for key, known in raw.items():
            with suppress(KeyError):  # of other figures than today's: it is measured again
                record = CellRecord.from_json(known)
                # and so is what failed otherwise than by a limit: it may have been bad luck
                if record.failed is None or record.is_limit:
                    self.records[key] = record

    def add(self, key: str, record: CellRecord) -> None:
        self.records[key] = record
        raw = {key: record.to_json() for key, record in self.records.items()}
        write_whole(self.path, json.dumps(raw, indent=1) + "\n")


Cells = dict[tuple[str, int], list[CellRecord]]  # (mixer, length) -> repetitions
Figure = Callable[[CellRecord], float]  # of one repetition
Runs = dict[str, list[TrainingRecord]]  # a mixer's label -> its runs of one task


def figure(name: str) -> Figure:
    """A figure that a cost has by name."""
    return lambda record: getattr(record.cost, name)


def step_seconds(record: CellRecord) -> float:
    assert isinstance(record.cost, TrainingCost)
    return median(record.cost.step_seconds)


def memory_gib(record: CellRecord) -> float:
    assert record.cost
    return record.cost.peak_memory_bytes / 2**30


def median_of(repetitions: Sequence[CellRecord], of: Figure) -> float | None:
    """None for a cell that was not measured to the end."""
    if not repetitions or failure_of(repetitions):
        return None
    return median(of(record) for record in repetitions)


def failure_of(repetitions: Sequence[CellRecord]) -> CellRecord | None:
    """The first repetition that failed."""
    return next((record for record in repetitions if record.failed), None)


def why_failed(repetitions: Sequence[CellRecord]) -> str:
    """What a cell without a figure says."""
    failed = failure_of(repetitions)
    if failed is None:
        return "not measured"
    at = f" already at {failed.failed_at:,}" if failed.failed_at else ""
    return f"**{failed.reason}{at}**"


def by_rate(runs: Sequence[TrainingRecord]) -> dict[float, list[TrainingRecord]]:
    """A mixer's runs of a task by learning rate, lowest rate first; of one rate the best first."""
    return {
        rate: sorted((r for r in runs if r.learning_rate == rate), key=lambda r: r.rank)
        for rate in sorted({run.learning_rate for run in runs})
    }


def best_runs(runs: Sequence[TrainingRecord]) -> list[TrainingRecord]:
    """One run for each seed, at the learning rate of the lowest middle rank; the best first.

    Of the rates that have had most seeds: others were given up after the first.
    """
    tried = by_rate(runs).values()
    most = max(len(same) for same in tried)
    full = [same for same in tried if len(same) == most]
    return min(full, key=lambda same: middle_rank([run.rank for run in same]))


def middle_rank(ranks: Sequence[Rank]) -> Rank:
    """That of the seed in the middle, of two there the worse; of a lost one all are lost."""
    return LOST if LOST in ranks else median_high(ranks)


def typical(runs: Sequence[TrainingRecord]) -> TrainingRecord:
    """Of the runs at the best learning rate, the one in the middle; of two there, the worse."""
    best = best_runs(runs)
    return best[len(best) // 2]


def median_accuracy(runs: Sequence[TrainingRecord]) -> float:
    """Of the seeds at the best learning rate, the share of right answers."""
    return median(run.final["accuracy"] for run in best_runs(runs))


def median_loss(runs: Sequence[TrainingRecord]) -> float:
    """Of the seeds at the best learning rate."""
    return median(run.final_loss for run in best_runs(runs))
