"""Plots of benchmark results: log axes, labelled, readable in print."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = "osD^vPX*"


def plot_lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    reference: str | None = None,
) -> None:
    """One line per series of (x, y) points; `reference` is drawn dashed and without markers."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for marker, (name, points) in zip(MARKERS * 3, series.items(), strict=False):
        style = {"linestyle": "--", "color": "black"} if name == reference else {"marker": marker}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(value: float) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value:g}"
