"""Measure every cell, train every task; run again, it goes on.

Each result is on disk before the next cell starts.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.compare.cells import CellGang, cell_gang
from launch.compare.child import STOPPED, Call, Failed
from launch.compare.file import Comparison, of_results
from launch.compare.measurements import MEASUREMENTS, Cost
from launch.compare.results import (
    CellRecord,
    ModelFacts,
    Results,
    Store,
    Visit,
)
from launch.compare.schedule import Limits, visits
from launch.compare.trainings import Show, Train, train_all
from models.flops import parameters, training_flops_per_token
from trainer.config import Config
from trainer.provenance import commit


def run_comparison(
    comparison: Comparison,
    show: Show,
    train: Train,
    should_stop: Callable[[], bool],
) -> Results | None:
    """Measure what is not measured yet; all results, which are written to results.json too.

    None when it was asked to stop before the end. Raises LaunchError.
    """
    folder = Path(comparison.settings.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with cell_gang(comparison.config, should_stop) as gang:
        if gang is None:
            return None
        hardware = gang.hardware()
        bench = _Bench(comparison, gang, hardware, Store(folder / "measurements.json"))
        records = bench.measure_all(show, should_stop)
    trained = None if records is None else train_all(comparison, show, train, should_stop)
    if records is None or trained is None:
        return None
    results = Results(
        hardware=hardware,
        versions={
            "commit": " and ".join(sorted({*(r.commit for r in records), *trained.commits()})),
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
