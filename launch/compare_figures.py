"""Reads the figures of a comparison out of its results: cells, medians, rates, failures."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

Results = dict[str, Any]
Cells = dict[tuple[str, int], list[dict[str, Any]]]  # (mixer, length) -> repetitions
Figure = Callable[[dict[str, Any]], float]  # of one repetition
Run = dict[str, Any]  # one training of a task


def group(results: Results, what: str) -> Cells:
    cells: Cells = {}
    for record in results["cells"]:
        if record["what"] == what:
            cells.setdefault((record["mixer"], record["length"]), []).append(record)
    return cells


def lengths_of(results: Results) -> list[int]:
    return sorted(set(results["settings"]["lengths"]))


def workers_of(results: Results) -> int:
    return int(results["config"]["launch"]["workers"])


def training_rate(results: Results) -> Figure:
    """Tokens per second of all workers, from the median step of a repetition."""

    def rate(record: dict[str, Any]) -> float:
        model = results["models"][record["mixer"]]
        return model["tokens_per_step"][str(record["length"])] / median(record["step_seconds"])

    return rate


def memory(record: dict[str, Any]) -> float:
    return record["peak_memory_bytes"] / 2**30


def gigaflops(results: Results) -> Figure:
    rate = training_rate(results)

    def achieved(record: dict[str, Any]) -> float:
        model = results["models"][record["mixer"]]
        per_token = model["training_flops_per_token"][str(record["length"])]
        return rate(record) * per_token / 1e9

    return achieved


def known_peak(training: Cells) -> float | None:
    """The peak FLOP/s of a worker's device, where it is known."""
    known = [r.get("peak_flops") for repetitions in training.values() for r in repetitions]
    return next((peak for peak in known if peak), None)


def median_of(repetitions: Sequence[dict[str, Any]], figure: Figure) -> float | None:
    """None for a cell that was not measured to the end."""
    if not repetitions or any("failed" in record for record in repetitions):
        return None
    return median(figure(record) for record in repetitions)


def failure_of(repetitions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first repetition that failed."""
    return next((record for record in repetitions if "failed" in record), None)


def why_failed(repetitions: Sequence[dict[str, Any]]) -> str:
    """What a cell without a figure says."""
    failed = failure_of(repetitions)
    if failed is None:
        return "not measured"
    reason = failed["failed"].strip().splitlines()[-1]
    at = f" already at {failed['failed_at']:,}" if failed.get("failed_at") else ""
    return f"**{reason}{at}**"


def held_out(run: Run) -> float:
    """The loss after the last step, nats per token."""
    return run["final"]["loss"]


def by_rate(runs: Sequence[Run]) -> dict[float, list[Run]]:
    """A mixer's runs of a task by learning rate, lowest rate first; of one rate the best first."""
    rates = sorted({run["learning_rate"] for run in runs})
    return {
        rate: sorted((run for run in runs if run["learning_rate"] == rate), key=held_out)
        for rate in rates
    }


def best_runs(runs: Sequence[Run]) -> list[Run]:
    """One run for each seed, at the learning rate of the lowest median loss; the best first."""
    return min(by_rate(runs).values(), key=lambda found: median(map(held_out, found)))


def typical(runs: Sequence[Run]) -> Run:
    """Of the runs at the best learning rate, the one in the middle."""
    found = best_runs(runs)
    return found[(len(found) - 1) // 2]


def table(corner: str, columns: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Markdown of (name, cells) rows, and an empty line."""
    names = list(columns)
    lines = [f"| {corner} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows), ""]
