"""A comparison in words, each sentence made from the figures."""

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from launch.compare.measurements import MEASUREMENTS
from launch.compare.results import (
    Cells,
    Figure,
    Results,
    Runs,
    TrainingRecord,
    best_runs,
    failure_of,
    figure,
    median_accuracy,
    median_loss,
    median_of,
    memory_gib,
    typical,
    why_failed,
)


def findings_of(results: Results) -> Iterator[str]:
    """The comparison in words, each sentence from the figures."""
    mixers, training, reading = list(results.models), results.of("training"), results.of("reading")
    compared: list[tuple[str, str, Cells, Figure]] = [
        ("trains faster than", "its speed", training, results.training_rate),
        ("trains in less memory than", "its memory", training, lambda r: 1 / memory_gib(r)),
        ("decodes faster than", "its speed", reading, figure("decode_tokens_per_second")),
    ]
    for base in (base for base in results.settings.baselines if base in mixers):
        for better, unit, cells, of in compared:
            for mixer in mixers:
                if mixer != base:
                    ratios = _ratios(results, cells, of, (mixer, base))
                    yield _crossing((mixer, base), better, unit, ratios)
    for kind in MEASUREMENTS:
        cells = results.of(kind)
        for mixer in mixers:
            lost = [n for n in results.lengths if failure_of(cells.get((mixer, n), []))]
            if lost:
                why = why_failed(cells[mixer, lost[0]]).strip("*")
                yield f"{mixer}, {kind}: {why} at {lost[0]:,} tokens."
    for task, runs in results.tasks.items():
        yield from _verdict(task, runs)
        yield from _machines(task, results.hardware, runs)
        for label, tried in runs.items():
            yield from _edge(f"{task}: {label}", results.rates[task][label], typical(tried))
        for label, why in results.lost[task].items():
            yield f"{task}: the training of {label} failed: {why}"


def _ratios(
    results: Results, cells: Cells, of: Figure, pair: tuple[str, str]
) -> list[tuple[int, float]]:
    """(length, a mixer's figure over the baseline's), where both were measured."""
    mixer, base_mixer = pair
    ratios = []
    for length in results.lengths:
        ours = median_of(cells.get((mixer, length), []), of)
        base = median_of(cells.get((base_mixer, length), []), of)
        if ours is not None and base is not None:
            ratios.append((length, ours / base))
    return ratios


def _crossing(
    pair: tuple[str, str], better: str, unit: str, ratios: list[tuple[int, float]]
) -> str:
    """Where the ratio passes one, by a straight line between measured points on log axes.

    A ratio above one is for the mixer; of memory it is the baseline's over the mixer's.
    """
    mixer, baseline = pair
    if not ratios:
        return f"{mixer} and {baseline} were measured together at no length."
    (first, at_first), (last, at_last) = ratios[0], ratios[-1]
    measured = f" measured, {first:,} to {last:,} tokens" if last > first else " measured"
    if all(ratio > 1 for _, ratio in ratios):
        where = f"at every length{measured}"
    elif all(ratio <= 1 for _, ratio in ratios):
        where = f"at no length{measured}"
    else:
        crossings = [
            a * (b / a) ** (math.log(s) / math.log(s / t))
            for (a, s), (b, t) in pairwise(ratios)
            if (s > 1) != (t > 1)
        ]
        passed = " and ".join(f"{crossing:,.0f}" for crossing in crossings)
        if len(crossings) > 1:
            where = f"in parts: the lines cross at about {passed} tokens"
        elif at_last > 1:
            where = f"from about {passed} tokens on"
        else:
            where = f"only up to about {passed} tokens"
    if unit == "its memory":
        at_first, at_last = 1 / at_first, 1 / at_last
    return (
        f"{mixer} {better} {baseline} {where}: {at_first:.2f} times {unit} at {first:,} tokens"
        + (f", {at_last:.2f} times at {last:,}." if last > first else ".")
    )


def _verdict(task: str, runs: Runs) -> Iterator[str]:
    if not runs:
        return
    chosen = {label: typical(same) for label, same in runs.items()}
    asks = all(run.asks for run in chosen.values())
    judged, at_end = ("right answers", median_accuracy) if asks else ("held-out loss", median_loss)

    def best_first(found: dict[str, float]) -> str:
        ordered = sorted(found, key=lambda label: found[label], reverse=asks)
        return ", ".join(f"{name} {found[name]:{'.1%' if asks else '.3f'}}" for name in ordered)

    tokens = next(iter(chosen.values())).tokens[-1]
    seeds = {len(best_runs(same)) for same in runs.values()}
    middle = (
        f", the median of {' or '.join(map(str, sorted(seeds)))} seeds" if max(seeds) > 1 else ""
    )
    finals = best_first({label: at_end(same) for label, same in runs.items()})
    yield f"{task}, {judged} after {tokens:,} tokens{middle}, best first: {finals}."
    seconds = min(run.seconds[-1] for run in chosen.values())
    each_then = {
        label: [_held_out_at(run, seconds) for run in best_runs(same)]
        for label, same in runs.items()
    }
    at_time = {
        label: median(value for value in values if value is not None)
        for label, values in each_then.items()
        if None not in values
    }
    yield (
        f"{task}, {judged} after {seconds:,.0f} s of training steps, best first: "
        f"{best_first(at_time)} "
        f"(the slower ones are then in the middle of their learning-rate schedule"
        + (", or not evaluated yet" if len(at_time) < len(runs) else "")
        + ")."
    )


def _machines(task: str, hardware: str, runs: Runs) -> Iterator[str]:
    """Where seconds are not of one machine."""
    known = {name for same in runs.values() for run in same for name in run.hardware}
    if known and known != {hardware}:
        yield (
            f"{task}: trained on {', '.join(sorted(known))}, cells were measured on {hardware}: "
            f"seconds of one are not those of another."
        )


def _edge(who: str, rates: list[float], best: TrainingRecord) -> Iterator[str]:
    """Where the best learning rate may lie outside those that were tried, and lost or not."""
    for place, edge, beyond in ((0, "lowest", "lower"), (-1, "highest", "higher")):
        if len(rates) > 1 and best.learning_rate == rates[place]:
            yield (
                f"{who} did best at the {edge} learning rate tried, {rates[place]:g}: a {beyond} "
                f"one may be better still."
            )


def _held_out_at(run: TrainingRecord, seconds: float) -> float | None:
    """The held-out loss, or share of right answers where the task asks, at a time.

    Straight between evaluations; None before the first.
    """
    points = [(p.seconds, p.accuracy if run.asks else p.loss) for p in run.held_out]
    known = [(at, value) for at, value in points if value is not None]
    if not known or seconds < known[0][0]:
        return None
    for (a, before), (b, after) in pairwise(known):
        if a <= seconds <= b:
            if math.isinf(before + after):  # no line leads there
                return before if seconds == a else after if seconds == b else math.inf
            return before + (after - before) * (seconds - a) / (b - a)
    return known[-1][1]
