"""Lines on log axes, labelled, readable in print: for reports and benchmarks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Series = Mapping[str, Sequence[tuple[float, float]]]

MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Axes:
    """What stands around the lines. With `lengths` the ticks of x are the points, in K and M."""

    title: str
    x: str
    y: str
    lengths: bool = False


def plot_lines(path: Path, series: Series, axes: Axes, reference: str | None = None) -> None:
    """One line per series of (x, y) points, told apart by marker as well as colour.

    `reference` is drawn dashed and without markers.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    # logarithms draw no infinite loss, and nothing where all are
    series = {
        name: drawn
        for name, points in series.items()
        if (drawn := [point for point in points if all(map(math.isfinite, point))])
    }
    figure, plot = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for marker, (name, points) in zip(MARKERS * 3, series.items(), strict=False):
        style: dict[str, Any] = {"marker": marker}
        if name == reference:
            style = {"linestyle": "--", "color": "black"}
        plot.plot(*zip(*points, strict=True), label=name, **style)
    plot.set(xscale="log", yscale="log", xlabel=axes.x, ylabel=axes.y, title=axes.title)
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(NullFormatter())
    heights = [height for points in series.values() for _, height in points]
    if heights and max(heights) < 2 * min(heights):  # too close for ticks at 1, 2 and 5
        plot.yaxis.set_major_locator(MaxNLocator(6))
    if axes.lengths:
        places = sorted({place for points in series.values() for place, _ in points})
        plot.set_xticks(places, [_short(place) for place in places])
    plot.grid(alpha=0.3)
    if series:
        plot.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(value: float) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value:g}"
