"""Reads the figures of a comparison out of its results: cells, medians, rates, failures."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

Results = dict[str, Any]
Cells = dict[tuple[str, int], list[dict[str, Any]]]  # (mixer, length) -> repetitions
Figure = Callable[[dict[str, Any]], float]  # of one repetition


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
