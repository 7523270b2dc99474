"""python -m launch compare: measure every cell, train every task, report. Run again, it goes on.

Cells are interleaved: a repetition passes through all of them before the next begins, so that a
machine that drifts drifts for all alike. Each result is on disk before the next cell starts.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from launch.cells import CellGang, cell_gang
from launch.gang import LaunchError
from launch.ray_job import Event, make_absolute, run_job
from trainer.comparison import Comparison, describe_models
from trainer.config import Config
from trainer.measure import OUT_OF_MEMORY, OUT_OF_TIME, STOPPED
from trainer.metrics import read_lines
from trainer.provenance import commit

Record = dict[str, Any]
Show = Callable[[str], None]
WHATS = ("training", "reading")


@dataclass(frozen=True)
class Visit:
    """One repetition of one cell."""

    what: str  # a name of WHATS
    label: str
    length: int
    repetition: int
    config: Config


def run_comparison(
    comparison: Comparison,
    show: Show,
    train: Callable[[Config], bool],
    should_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """Measure what is not measured yet; all results, which are written to results.json too.

    `train` runs one training and returns whether it finished. None when it was asked to stop
    before the end. Raises LaunchError.
    """
    folder = Path(comparison.settings.dir)
    folder.mkdir(parents=True, exist_ok=True)
    store = _Store(folder / "measurements.json")
    with cell_gang(comparison.config) as workers:
        hardware = workers.hardware()
        visits = list(_visits(comparison))
        records: list[Record] = []
        limits: dict[tuple[str, str], Record] = {}  # where a mixer first met a limit
        reached: dict[tuple[str, str], int] = {}  # the longest that a mixer has managed
        for visit in visits:
            key, mixer = _key(visit, comparison, hardware), (visit.what, visit.label)
            known = store.records.get(key)
            # a limit where as much was managed before is bad luck: it is measured again
            unlucky = known and "failed" in known and visit.length <= reached.get(mixer, 0)
            if known is None or unlucky:
                if should_stop():
                    return None
                started = time.perf_counter()
                limit = limits.get(mixer)
                if limit and limit["length"] <= visit.length:  # an easier one did not work
                    failed = {"failed": limit["failed"], "failed_at": limit["length"]}
                    store.add(key, {**_named(visit), **failed})
                else:
                    store.add(key, _measure(workers, visit, comparison))
                show(
                    f"[{len(records) + 1}/{len(visits)}, repetition {visit.repetition + 1}] "
                    f"{visit.what} {visit.label} at {visit.length:,}: "
                    f"{_shown(store.records[key], visit)} ({time.perf_counter() - started:.0f} s)"
                )
            record = store.records[key]
            records.append(record)
            if "failed" not in record:
                reached[mixer] = max(visit.length, reached.get(mixer, 0))
            elif _is_limit(record["failed"]) and visit.length > reached.get(mixer, 0):
                limits[mixer] = min(record, limits.get(mixer, record), key=lambda r: r["length"])
    lost: dict[str, dict[str, str]] = {task: {} for task in comparison.tasks}
    for task, label, config in _trainings(comparison):
        if _has_result(config):
            continue
        which = f"{label} at learning rate {config.optim.learning_rate:g}, seed {config.run.seed}"
        show(f"training {which} on {task}: {config.train.steps} steps")
        try:
            if should_stop() or not train(config):
                return None
        except LaunchError as error:  # marked in the report, and tried again next time
            lost[task][which] = str(error).strip().splitlines()[-1]
            show(f"  failed: {error}")
    results = {
        "hardware": hardware,
        "versions": {
            "commit": " and ".join(sorted({record["commit"] for record in records})),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "settings": asdict(comparison.settings),
        "config": asdict(comparison.config),
        "target_parameters": comparison.target,
        "models": describe_models(comparison),
        "cells": records,
        "tasks": {
            task: {
                label: curves
                for label, configs in runs.items()
                if (curves := [_curve(config) for config in configs if _has_result(config)])
            }
            for task, runs in comparison.tasks.items()
        },
        "lost": lost,
    }
    _write_whole(folder / "results.json", results)
    return results


def train_quietly(show: Show, should_stop: Callable[[], bool]) -> Callable[[Config], bool]:
    """How a comparison trains a task: through Ray as ever, telling evaluations and warnings."""

    def on_event(event: Event) -> None:
        if event["event"] == "evaluation":
            show(f"  step {event['step']}: held-out loss {event['loss']:.4f} nats")
        elif event["event"] == "warning":
            show(f"  warning: {event['message']}")

    def train(config: Config) -> bool:
        make_absolute(config)
        return run_job(config, on_event, should_stop)

    return train


def _visits(comparison: Comparison) -> Iterator[Visit]:
    """Every repetition of every cell; mixers of one length are neighbours in time."""
    labels, lengths = list(comparison.models), sorted(set(comparison.settings.lengths))
    for repetition in range(comparison.settings.repetitions):
        for length in lengths:
            for what in WHATS:
                # another one is first each time
                shift = repetition % len(labels)
                for label in labels[shift:] + labels[:shift]:
                    config = comparison.cells[label, length]
                    yield Visit(what, label, length, repetition, config)


def _trainings(comparison: Comparison) -> Iterator[tuple[str, str, Config]]:
    """(task, label, run) of every training; all mixers have had a rate and seed before the next."""
    for task, runs in comparison.tasks.items():
        for configs in zip(*runs.values(), strict=True):
            yield from ((task, label, run) for label, run in zip(runs, configs, strict=True))


def _arguments(visit: Visit, comparison: Comparison) -> tuple[Any, ...]:
    settings = comparison.settings
    if visit.what == "training":
        return settings.steps, settings.seconds
    return visit.length, settings.decode_tokens, settings.prefill_segment


def _measure(workers: CellGang, visit: Visit, comparison: Comparison) -> Record:
    settings = comparison.settings
    memory = settings.memory_gib_per_worker
    results = workers.measure(
        visit.what,
        visit.config,
        _arguments(visit, comparison),
        settings.cell_timeout_seconds,
        None if memory is None else round(memory * 2**30),
    )
    record: Record = _named(visit)
    failures = [r["failed"] for r in results if "failed" in r and r["failed"] != STOPPED]
    if failures:
        # others may only have lost the one that was out of memory
        limits = [failure for failure in failures if _is_limit(failure)]
        return {**record, "failed": (limits or failures)[0]}
    record |= results[0]  # times are the slowest worker's already
    for figure in ("peak_memory_bytes", "exchange_bytes", "exchange_seconds"):
        if figure in record:
            record[figure] = max(result[figure] for result in results)
    return record


def _is_limit(failure: str) -> bool:
    """A limit of the machine, not a fault: longer sequences need not be tried."""
    return failure in (OUT_OF_MEMORY, OUT_OF_TIME)


def _named(visit: Visit) -> Record:
    return {
        "commit": commit(),
        "what": visit.what,
        "mixer": visit.label,
        "length": visit.length,
        "repetition": visit.repetition,
    }


def _key(visit: Visit, comparison: Comparison, hardware: str) -> str:
    """A name that changes with whatever would change the result, but for the code itself."""
    described = asdict(visit.config)
    for section in ("run", "data", "checkpoint", "evaluate"):
        del described[section]
    settings = comparison.settings
    limits = settings.cell_timeout_seconds, settings.memory_gib_per_worker
    content = [visit.what, described, _arguments(visit, comparison), limits, hardware]
    content.append(version("torch"))
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return f"{visit.what}-{visit.label}-{visit.length:09}-{visit.repetition}-{digest}"


def _shown(record: Record, visit: Visit) -> str:
    if "failed" in record:
        where = f" (at {record['failed_at']:,} tokens)" if "failed_at" in record else ""
        return record["failed"].strip().splitlines()[-1] + where
    memory = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
    if visit.what == "training":
        train = visit.config.train
        rate = train.batch_size * train.seq_len / median(record["step_seconds"])
        return f"{rate:,.0f} tokens/s, {memory}"
    return (
        f"prefill {record['prefill_seconds']:.2f} s, decode "
        f"{record['decode_tokens_per_second']:,.0f} tokens/s, {memory}"
    )


def _has_result(config: Config) -> bool:
    path = Path(config.run.dir) / "evaluation.json"
    return path.exists() and json.loads(path.read_text())["step"] == config.train.steps


def _curve(config: Config) -> dict[str, Any]:
    """A finished training: the loss over tokens, and over time at the pace of its median step.

    The pace, and not the sum, because trainings are hours apart on machines that others use too.
    """
    folder = Path(config.run.dir)
    metrics = read_lines(folder / "metrics.jsonl")
    pace = median(line["step_seconds"] for line in metrics)
    seconds = [pace * line["step"] for line in metrics]
    at = {line["step"]: (line["tokens"], t) for line, t in zip(metrics, seconds, strict=True)}
    return {
        "learning_rate": config.optim.learning_rate,
        "seed": config.run.seed,
        "tokens": [line["tokens"] for line in metrics],
        "seconds": seconds,
        "loss": [line["loss"] for line in metrics],
        "held_out": [
            {"tokens": at[line["step"]][0], "seconds": at[line["step"]][1], "loss": line["loss"]}
            for line in read_lines(folder / "evaluations.jsonl")
        ],
        "final": json.loads((folder / "evaluation.json").read_text()),
    }


class _Store:
    """The records of visits on disk, whole after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
        # what failed otherwise than by a limit may have been bad luck: it is measured again
        self.records = {k: r for k, r in found.items() if _is_limit(r.get("failed", OUT_OF_TIME))}

    def add(self, key: str, record: Record) -> None:
        self.records[key] = record
        _write_whole(self.path, self.records)


def _write_whole(path: Path, value: Any) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
