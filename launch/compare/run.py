"""Measure every cell, train every task; run again, it goes on.

Each result is on disk before the next cell starts.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from launch.compare.cells import CellGang, cell_gang
from launch.compare.child import STOPPED, Call, Failed
from launch.compare.file import Comparison, of_results
from launch.compare.measurements import MEASUREMENTS, Cost
from launch.compare.results import (
    CellRecord,
    ModelFacts,
    Point,
    Results,
    Runs,
    Store,
    TrainingRecord,
    Visit,
)
from launch.compare.schedule import Limits, visits
from launch.compare.search import Search
from launch.gang import LaunchError
from models.flops import parameters, training_flops_per_token
from trainer.config import Config
from trainer.provenance import commit
from trainer.run_folder import RunFolder, read_lines

Show = Callable[[str], None]


def run_comparison(
    comparison: Comparison,
    show: Show,
    train: Callable[[Config], bool],
    should_stop: Callable[[], bool],
) -> Results | None:
    """Measure what is not measured yet; all results, which are written to results.json too.

    `train` runs one training and returns whether it finished. None when it was asked to stop
    before the end. Raises LaunchError.
    """
    folder = Path(comparison.settings.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with cell_gang(comparison.config) as gang:
        hardware = gang.hardware()
        bench = _Bench(comparison, gang, hardware, Store(folder / "measurements.json"))
        records = bench.measure_all(show, should_stop)
    trained = None if records is None else _train_all(comparison, show, train, should_stop)
    if records is None or trained is None:
        return None
    results = Results(
        hardware=hardware,
        versions={
            "commit": " and ".join(sorted({record.commit for record in records})),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        settings=comparison.settings,
        config=comparison.config,
        target_parameters=comparison.target,
        models=_describe_models(comparison),
        cells=records,
        tasks=trained.tasks,
        lost=trained.lost,
        rates=trained.rates,
        in_equal_time=trained.in_equal_time,
    )
    results.write(folder / "results.json")
    return results


class _Bench:
    """Measures visits, each once."""

    def __init__(self, comparison: Comparison, gang: CellGang, hardware: str, store: Store) -> None:
        self.comparison, self.gang, self.hardware, self.store = comparison, gang, hardware, store

    def measure_all(self, show: Show, should_stop: Callable[[], bool]) -> list[CellRecord] | None:
        """The records of all visits, or None when asked to stop."""
        plan, limits = list(visits(self.comparison)), Limits()
        records: list[CellRecord] = []
        for visit in plan:
            key = self._key(visit)
            record = self.store.records.get(key)
            if record is None or limits.is_unlucky(record):
                if should_stop():
                    return None
                started = time.perf_counter()
                record = self._measure(visit, limits)
                self.store.add(key, record)
                seconds = time.perf_counter() - started
                show(
                    f"[{len(records) + 1}/{len(plan)}, repetition {visit.repetition + 1}] "
                    f"{visit.kind} {visit.label} at {visit.length:,}: "
                    f"{self._shown(record)} ({seconds:.0f} s)"
                )
            records.append(record)
            limits.add(record)
        return records

    def _measure(self, visit: Visit, limits: Limits) -> CellRecord:
        if limit := limits.beyond(visit):
            return CellRecord(visit, commit(), None, limit.failed, limit.visit.length)
        settings, kind = self.comparison.settings, MEASUREMENTS[visit.kind]
        memory = settings.memory_gib_per_worker
        call = Call(
            kind.function,
            self._config(visit),
            kind.arguments(settings, visit.length),
            settings.cell_timeout_seconds,
            None if memory is None else round(memory * 2**30),
        )
        outcomes = self.gang.measure(call, kind.alone)
        costs = [outcome for outcome in outcomes if not isinstance(outcome, Failed)]
        if len(costs) == len(outcomes):
            return CellRecord(visit, commit(), _worst(costs))
        reasons = [o.why for o in outcomes if isinstance(o, Failed) and o.why != STOPPED]
        failures = [CellRecord(visit, commit(), None, why) for why in reasons]
        # others may only have lost the one that was out of memory
        return next((failure for failure in failures if failure.is_limit), failures[0])

    def _config(self, visit: Visit) -> Config:
        return self.comparison.cells[visit.label, visit.length]

    def _key(self, visit: Visit) -> str:
        """A name that changes with whatever would change the result, but for the code itself."""
        described = of_results(self._config(visit))
        for section in ("run", "data", "checkpoint", "evaluate"):
            del described[section]
        settings = self.comparison.settings
        limits = settings.cell_timeout_seconds, settings.memory_gib_per_worker
        arguments = MEASUREMENTS[visit.kind].arguments(settings, visit.length)
        content = [visit.kind, described, arguments, limits, self.hardware, version("torch")]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        return f"{visit.kind}-{visit.label}-{visit.length:09}-{visit.repetition}-{digest}"

    def _shown(self, record: CellRecord) -> str:
        if record.cost is None:
            where = f" (at {record.failed_at:,} tokens)" if record.failed_at else ""
            return record.reason + where
        shown = MEASUREMENTS[record.visit.kind].shown(record.cost, self._config(record.visit))
        return f"{shown}, {record.cost.peak_memory_bytes / 2**30:.2f} GiB"


def _worst(costs: list[Any]) -> Cost:
    """One cost for all workers; times are the slowest worker's already."""
    own = ("peak_memory_bytes", "exchange_bytes", "exchange_seconds")  # of each worker
    names = [name for name in own if hasattr(costs[0], name)]
    return replace(costs[0], **{name: max(getattr(cost, name) for cost in costs) for name in names})


@dataclass
class _Trained:
    """The finished trainings of all tasks; those that were lost, and why."""

    tasks: dict[str, Runs] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    in_equal_time: dict[str, dict[str, TrainingRecord]] = field(default_factory=dict)


class _Stopped(Exception):
    """The comparison was asked to stop."""


def _train_all(
    comparison: Comparison,
    show: Show,
    train: Callable[[Config], bool],
    should_stop: Callable[[], bool],
) -> _Trained | None:
    """Train what has no result yet; None when stopped."""
    trained, settings = _Trained(), comparison.settings
    for task, trainings in comparison.tasks.items():
        lost = trained.lost[task] = {}

        def attempt(label: str, config: Config, task: str = task, lost: Any = lost) -> float:
            if not _result(config):
                name = f"{label} at learning rate {config.optim.learning_rate:g}"
                name += f", seed {config.run.seed}"
                show(f"training {name} on {task}: {config.train.steps} steps")
                try:
                    if should_stop() or not train(config):
                        raise _Stopped
                except LaunchError as error:  # marked in the report, and tried again next time
                    lost[name] = str(error).strip().splitlines()[-1]
                    show(f"  failed: {error}")
            return _curve(config).final_loss if _result(config) else math.inf

        search = Search(trainings, attempt)
        try:
            search.run(settings.more_rates)
            equal = search.in_equal_time(_pace) if settings.equal_time else {}
        except _Stopped:
            return None
        trained.tasks[task] = {
            label: curves
            for label, configs in search.ran.items()
            if (curves := [_curve(config) for config in configs if _result(config)])
        }
        trained.rates[task] = {label: sorted(tried) for label, tried in search.losses.items()}
        finished = {label: config for label, config in equal.items() if _result(config)}
        trained.in_equal_time[task] = {label: _curve(config) for label, config in finished.items()}
    return trained


def _describe_models(comparison: Comparison) -> dict[str, ModelFacts]:
    lengths = comparison.settings.lengths
    return {
        label: ModelFacts(
            width=model.width,
            layers=model.layers,
            mlp_width=model.mlp_width,
            parameters=parameters(model),
            training_flops_per_token={n: training_flops_per_token(model, n) for n in lengths},
            tokens_per_step={n: comparison.cells[label, n].train.batch_size * n for n in lengths},
        )
        for label, model in comparison.models.items()
    }


def _pace(config: Config) -> float:
    """Seconds of a run's median step."""
    return median(line["step_seconds"] for line in read_lines(RunFolder(config.run.dir).metrics))


def _result(config: Config) -> dict[str, Any] | None:
    return RunFolder(config.run.dir).read_result(config.train.steps)


def _curve(config: Config) -> TrainingRecord:
    """A finished training: the loss over tokens, and over time at the pace of its median step.

    The pace, and not the sum, because trainings are hours apart on machines that others use too.
    """
    folder = RunFolder(config.run.dir)
    metrics = read_lines(folder.metrics)
    pace = _pace(config)
    tokens = {line["step"]: line["tokens"] for line in metrics}
    final = _result(config)
    assert final is not None
    return TrainingRecord(
        learning_rate=config.optim.learning_rate,
        seed=config.run.seed,
        tokens=list(tokens.values()),
        seconds=[pace * step for step in tokens],
        loss=[line["loss"] for line in metrics],
        held_out=[
            Point(tokens[line["step"]], pace * line["step"], line["loss"])
            for line in read_lines(folder.evaluations)
        ],
        final=final,
    )
