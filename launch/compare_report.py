"""A comparison as a page for people: report.md, and plots of throughput, memory and loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

Results = dict[str, Any]
Cells = dict[tuple[str, int], list[dict[str, Any]]]  # (mixer, length) -> repetitions
Figure = Callable[[dict[str, Any]], float]  # of one repetition
Series = dict[str, list[tuple[float, float]]]

BASELINE = "attention"
MARKERS = "osD^vPX*"


def write_comparison(folder: Path, results: Results) -> str:
    """Write report.md and its plots into `folder`; what the driver prints at the end."""
    training, reading = (_group(results, what) for what in ("training", "reading"))
    rate = _training_rate(results)
    findings = list(_findings(results, training, reading))
    plots = _plots(folder, results, training, reading)
    page = [
        f"# {', '.join(results['models'])}: side by side",
        "",
        *_circumstances(results),
        "",
        "## What was found",
        "",
        *(f"- {finding}" for finding in findings),
        "",
        *(f"![{title}]({name})" for name, title in plots),
        "",
        "## The models",
        "",
        *_model_table(results),
        "",
        "## Training",
        "",
        "Tokens per second of all workers: median of the repetitions, and their spread.",
        "",
        *_grid(results, training, rate, "{:,.0f}"),
        "",
        f"Per worker ({results['config']['launch']['workers']} workers):",
        "",
        *_grid(results, training, lambda r: rate(r) / _workers(results), "{:,.0f}", spread=False),
        "",
        "Seconds per optimizer step:",
        "",
        *_grid(results, training, lambda r: median(r["step_seconds"]), "{:.3f}"),
        "",
        "Peak memory of a worker over what it holds before it builds the model, GiB:",
        "",
        *_grid(results, training, _memory, "{:.2f}"),
        "",
        "Achieved GFLOP/s of all workers, counting what the model needs (half the square of "
        "attention, nothing twice)" + (", and of the peak:" if _peak(training) else ":"),
        "",
        *_grid(results, training, _flops(results), "{:,.0f}", spread=False),
        "",
        *_mfu(results, training),
        "Bytes that a worker sends along the sequence per step:",
        "",
        *_grid(results, training, lambda r: r["exchange_bytes"], "{:,.0f}", spread=False),
        "",
        "## Reading and continuing a text, on one worker",
        "",
        f"Seconds to read a prompt (in segments of "
        f"{results['settings']['prefill_segment']:,} tokens):",
        "",
        *_grid(results, reading, lambda r: r["prefill_seconds"], "{:.3f}"),
        "",
        "Tokens per second of decoding after it:",
        "",
        *_grid(results, reading, lambda r: r["decode_tokens_per_second"], "{:,.0f}"),
        "",
        "What is kept of the text between tokens (with room to grow), KiB:",
        "",
        *_grid(results, reading, lambda r: r["carry_bytes"] / 1024, "{:,.0f}", spread=False),
        "",
        *_task_sections(results),
    ]
    (folder / "report.md").write_text("\n".join(page).rstrip() + "\n")
    shown = "\n".join(f"  {finding}" for finding in findings)
    return f"{shown}\n\nReport: {folder / 'report.md'}"


def _group(results: Results, what: str) -> Cells:
    cells: Cells = {}
    for record in results["cells"]:
        if record["what"] == what:
            cells.setdefault((record["mixer"], record["length"]), []).append(record)
    return cells


def _lengths(results: Results) -> list[int]:
    return sorted(set(results["settings"]["lengths"]))


def _workers(results: Results) -> int:
    return int(results["config"]["launch"]["workers"])


def _training_rate(results: Results) -> Figure:
    """Tokens per second of all workers, from the median step of a repetition."""

    def rate(record: dict[str, Any]) -> float:
        model = results["models"][record["mixer"]]
        return model["tokens_per_step"][str(record["length"])] / median(record["step_seconds"])

    return rate


def _memory(record: dict[str, Any]) -> float:
    return record["peak_memory_bytes"] / 2**30


def _flops(results: Results) -> Figure:
    rate = _training_rate(results)

    def gigaflops(record: dict[str, Any]) -> float:
        model = results["models"][record["mixer"]]
        per_token = model["training_flops_per_token"][str(record["length"])]
        return rate(record) * per_token / 1e9

    return gigaflops


def _peak(training: Cells) -> float | None:
    """The peak FLOP/s of a worker's device, where it is known."""
    known = [r.get("peak_flops") for repetitions in training.values() for r in repetitions]
    return next((peak for peak in known if peak), None)


def _mfu(results: Results, training: Cells) -> list[str]:
    peak = _peak(training)
    if peak is None:
        return ["MFU is not given: the peak of this device is not known.", ""]
    flops, total = _flops(results), peak * _workers(results) / 1e9
    table = _grid(results, training, lambda r: 100 * flops(r) / total, "{:.1f}", spread=False)
    return ["MFU, percent:", "", *table, ""]


def _median(repetitions: Sequence[dict[str, Any]], figure: Figure) -> float | None:
    """None for a cell that was not measured to the end."""
    if not repetitions or any("failed" in record for record in repetitions):
        return None
    return median(figure(record) for record in repetitions)


def _grid(
    results: Results, cells: Cells, figure: Figure, form: str, spread: bool = True
) -> list[str]:
    """Lengths down, mixers across; a cell that failed says why."""
    mixers = list(results["models"])
    lines = [f"| tokens | {' | '.join(mixers)} |", "|---|" + "---|" * len(mixers)]
    for length in _lengths(results):
        row = []
        for mixer in mixers:
            repetitions = cells.get((mixer, length), [])
            middle = _median(repetitions, figure)
            if middle is None:
                row.append(_why(repetitions))
                continue
            shown = form.format(middle)
            if spread:
                figures = [figure(record) for record in repetitions]
                shown += f" ({form.format(min(figures))} to {form.format(max(figures))})"
            row.append(shown)
        lines.append(f"| {length:,} | {' | '.join(row)} |")
    return lines


def _why(repetitions: Sequence[dict[str, Any]]) -> str:
    """What a cell without a figure says."""
    failed = next((record for record in repetitions if "failed" in record), None)
    if failed is None:
        return "not measured"
    reason = failed["failed"].strip().splitlines()[-1]
    at = f" already at {failed['failed_at']:,}" if failed.get("failed_at") else ""
    return f"**{reason}{at}**"


def _circumstances(results: Results) -> list[str]:
    config, settings = results["config"], results["settings"]
    train, launch = config["train"], config["launch"]
    limit = settings["memory_gib_per_worker"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    return [
        f"- {versions}",
        f"- {results['hardware']}; {launch['workers']} workers, sp={config['parallel']['sp']}, "
        f"ZeRO stage {config['deepspeed']['zero_stage']}, {train['dtype']}, "
        f"recompute {str(train['recompute']).lower()}, compile {str(train['compile']).lower()}",
        f"- {settings['repetitions']} repetitions, interleaved; each times at most "
        f"{settings['steps']} steps or {settings['seconds']:g} s, at least one, after one that is "
        f"not timed, in fresh processes",
        f"- a cell is out of time after {settings['cell_timeout_seconds']:g} s"
        + (f", out of memory above {limit:g} GiB a worker" if limit else ""),
        "- the same optimizer, precision, sharded step and tiled loss for all; random tokens in "
        "the cells",
        f"- trainings: one run each, seed {config['run']['seed']}; one learning rate for all, tuned"
        f" for none ({config['optim']['learning_rate']:g} where a task does not say otherwise); "
        f"weight decay {config['optim']['weight_decay']:g} on matrices, but not on those that make "
        f"gates and candidates of a recurrence; recurrences have a convolution of "
        f"{config['model']['conv_width']} tokens before them, attention and window have none",
    ]


def _model_table(results: Results) -> list[str]:
    target = results["target_parameters"]
    lines = [
        f"Solved for {target:,} parameters by {results['settings']['match']}; the MLP takes up the "
        f"rest.",
        "",
        "| mixer | width | layers | MLP | parameters | of the target |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {label} | {m['width']} | {m['layers']} | {m['mlp_width']} | {m['parameters']:,} | "
        f"{m['parameters'] / target:.2%} |"
        for label, m in results["models"].items()
    ]
    return lines


def _findings(results: Results, training: Cells, reading: Cells) -> Iterator[str]:
    """The comparison in words, each sentence from the figures."""
    mixers = list(results["models"])
    compared: list[tuple[str, str, Cells, Figure]] = [
        ("trains faster than", "its speed", training, _training_rate(results)),
        ("trains in less memory than", "its memory", training, lambda r: 1 / _memory(r)),
        ("decodes faster than", "its speed", reading, lambda r: r["decode_tokens_per_second"]),
    ]
    for better, what, cells, figure in compared if BASELINE in mixers else []:
        for mixer in mixers:
            if mixer != BASELINE:
                yield _crossing(mixer, better, what, _ratios(results, cells, figure, mixer))
    for what, cells in (("training", training), ("reading", reading)):
        for mixer in mixers:
            lost = [n for n in _lengths(results) if "failed" in _first(cells.get((mixer, n), []))]
            if lost:
                why = _why(cells[mixer, lost[0]]).strip("*")
                yield f"{mixer}, {what}: {why} at {lost[0]:,} tokens."
    for task, runs in results["tasks"].items():
        yield from _verdict(task, runs)
        for label, why in results["lost"][task].items():
            yield f"{task}: the training of {label} failed: {why}"


def _first(repetitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next((r for r in repetitions if "failed" in r), {})


def _ratios(results: Results, cells: Cells, figure: Figure, mixer: str) -> list[tuple[int, float]]:
    """(length, the mixer's figure over the baseline's), where both were measured."""
    found = []
    for length in _lengths(results):
        ours = _median(cells.get((mixer, length), []), figure)
        base = _median(cells.get((BASELINE, length), []), figure)
        if ours is not None and base is not None:
            found.append((length, ours / base))
    return found


def _crossing(mixer: str, better: str, what: str, ratios: list[tuple[int, float]]) -> str:
    """Where the ratio passes one, by a straight line between measured points on log axes.

    A ratio above one is for the mixer; of memory it is the baseline's over the mixer's.
    """
    if not ratios:
        return f"{mixer} and {BASELINE} were measured together at no length."
    (first, at_first), (last, at_last) = ratios[0], ratios[-1]
    if all(ratio > 1 for _, ratio in ratios):
        where = f"at every length measured, {first:,} to {last:,} tokens"
    elif all(ratio <= 1 for _, ratio in ratios):
        where = f"at no length measured, {first:,} to {last:,} tokens"
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
    if what == "its memory":
        at_first, at_last = 1 / at_first, 1 / at_last
    return (
        f"{mixer} {better} {BASELINE} {where}: {at_first:.2f} times {what} at {first:,} tokens, "
        f"{at_last:.2f} times at {last:,}."
    )


def _verdict(task: str, runs: dict[str, Any]) -> Iterator[str]:
    if not runs:
        return
    by_loss = sorted(runs, key=lambda label: runs[label]["final"]["loss"])
    tokens = runs[by_loss[0]]["tokens"][-1]
    losses = ", ".join(f"{label} {runs[label]['final']['loss']:.3f}" for label in by_loss)
    yield f"{task}, held-out loss after {tokens:,} tokens, best first: {losses}."
    seconds = min(run["seconds"][-1] for run in runs.values())
    found = {label: _loss_at(run, seconds) for label, run in runs.items()}
    at_time = {label: loss for label, loss in found.items() if loss is not None}
    ordered = sorted(at_time, key=lambda label: at_time[label])
    losses = ", ".join(f"{label} {at_time[label]:.3f}" for label in ordered)
    yield (
        f"{task}, held-out loss after {seconds:,.0f} s of training steps, best first: {losses} "
        f"(the slower ones are then in the middle of their learning-rate schedule"
        + (", or not evaluated yet" if len(at_time) < len(runs) else "")
        + ")."
    )


def _loss_at(run: dict[str, Any], seconds: float) -> float | None:
    """The held-out loss at a time, straight between evaluations; None before the first."""
    points = [(e["seconds"], e["loss"]) for e in run["held_out"]]
    if seconds < points[0][0]:
        return None
    for (a, before), (b, after) in pairwise(points):
        if a <= seconds <= b:
            return before + (after - before) * (seconds - a) / (b - a)
    return points[-1][1]


def _task_sections(results: Results) -> Iterator[str]:
    for task, runs in results["tasks"].items():
        labels = list(runs)
        if not labels:
            continue
        yield from (f"## Task: {task}", "", "| | " + " | ".join(labels) + " |")
        yield "|---|" + "---|" * len(labels)
        rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("held-out loss, nats per token", lambda run: f"{run['final']['loss']:.4f}"),
            ("tokens trained on", lambda run: f"{run['tokens'][-1]:,}"),
            ("seconds of training steps", lambda run: f"{run['seconds'][-1]:,.0f}"),
        ]
        if any(run["final"].get("accuracy") is not None for run in runs.values()):
            rows.insert(1, ("accuracy", lambda run: f"{run['final']['accuracy']:.1%}"))
        for name, shown in rows:
            yield f"| {name} | " + " | ".join(shown(runs[label]) for label in labels) + " |"
        for name, by, first in (
            ("distance", "by_distance", "accuracy at a distance of"),
            ("position", "by_position", "loss at positions"),
        ):
            tables = [runs[label]["final"].get(by) or [] for label in labels]
            if not all(tables) or (
                by == "by_position" and runs[labels[0]]["final"].get("by_distance")
            ):
                continue
            yield from ("", f"| {first} | " + " | ".join(labels) + " |")
            yield "|---|" + "---|" * len(labels)
            for row in zip(*tables, strict=True):
                if name == "distance":
                    where, cells = f"{row[0][0]:,} tokens", [f"{r[2]:.1%}" for r in row]
                else:
                    where = f"{row[0][0]:,} to {row[0][1] - 1:,}"
                    cells = [f"{r[2]:.4f}" for r in row]
                yield f"| {where} | " + " | ".join(cells) + " |"
        baselines = runs[labels[0]]["final"]["baselines"]
        if baselines:
            shown_baselines = ", ".join(f"{n} {b['loss']:.4f}" for n, b in baselines.items())
            yield from ("", f"For comparison, counted on the training split: {shown_baselines}.")
        yield ""


def _plots(
    folder: Path, results: Results, training: Cells, reading: Cells
) -> list[tuple[str, str]]:
    """(file, title) of every plot that was drawn."""
    rate = _training_rate(results)
    context = "context, tokens"
    plots: list[tuple[str, str, Series, dict[str, Any]]] = []

    def over_context(name: str, title: str, cells: Cells, figure: Figure, y: str) -> None:
        series: Series = {}
        for mixer in results["models"]:
            points = [
                (float(length), middle)
                for length in _lengths(results)
                if (middle := _median(cells.get((mixer, length), []), figure)) is not None
            ]
            if points:
                series[mixer] = points
        plots.append((name, title, series, {"x": context, "y": y}))

    over_context(
        "throughput.png", "Training throughput over context", training, rate, "tokens per second"
    )
    over_context(
        "memory.png", "Peak memory over context", training, _memory, "GiB a worker, over idle"
    )
    over_context(
        "decode.png",
        "Decoding over context",
        reading,
        lambda r: r["decode_tokens_per_second"],
        "tokens per second",
    )
    for task, runs in results["tasks"].items():
        for by, x in (("tokens", "tokens trained on"), ("seconds", "seconds of training steps")):
            series = {
                label: [(point[by], point["loss"]) for point in run["held_out"]]
                for label, run in runs.items()
            }
            title = f"{task}: held-out loss over {by if by == 'tokens' else 'time'}"
            plots.append((f"{task}_loss_{by}.png", title, series, {"x": x, "y": "nats per token"}))
    for name, title, series, axes in plots:
        _draw(folder / name, title, series, **axes)
    return [(name, title) for name, title, _, _ in plots]


def _draw(path: Path, title: str, series: Series, *, x: str, y: str) -> None:
    """Lines on log axes, told apart by marker as well as colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for marker, (name, points) in zip(MARKERS * 3, series.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(NullFormatter())
    heights = [height for points in series.values() for _, height in points]
    if heights and max(heights) < 2 * min(heights):  # too close for ticks at 1, 2 and 5
        axes.yaxis.set_major_locator(MaxNLocator(6))
    if "context" in x:
        lengths = sorted({length for points in series.values() for length, _ in points})
        axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(value: float) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value:g}"
