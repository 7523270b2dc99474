"""A comparison as a page for people: report.md, and plots of throughput, memory and loss."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from launch.compare_figures import (
    Cells,
    Figure,
    Results,
    gigaflops,
    group,
    known_peak,
    lengths_of,
    median_of,
    memory,
    training_rate,
    why_failed,
    workers_of,
)
from launch.compare_findings import findings_of
from launch.plot import Series, plot_lines


def write_comparison(folder: Path, results: Results) -> str:
    """Write report.md and its plots into `folder`; what the driver prints at the end."""
    training, reading = (group(results, what) for what in ("training", "reading"))
    rate = training_rate(results)
    findings = list(findings_of(results, training, reading))
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
        *_grid(results, training, lambda r: rate(r) / workers_of(results), "{:,.0f}", spread=False),
        "",
        "Seconds per optimizer step:",
        "",
        *_grid(results, training, lambda r: median(r["step_seconds"]), "{:.3f}"),
        "",
        "Peak memory of a worker over what it holds before it builds the model, GiB:",
        "",
        *_grid(results, training, memory, "{:.2f}"),
        "",
        "Achieved GFLOP/s of all workers, counting what the model needs (half the square of "
        "attention, nothing twice):",
        "",
        *_grid(results, training, gigaflops(results), "{:,.0f}", spread=False),
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


def _mfu(results: Results, training: Cells) -> list[str]:
    peak = known_peak(training)
    if peak is None:
        return ["MFU is not given: the peak of this device is not known.", ""]
    flops, total = gigaflops(results), peak * workers_of(results) / 1e9
    table = _grid(results, training, lambda r: 100 * flops(r) / total, "{:.1f}", spread=False)
    return ["MFU, percent:", "", *table, ""]


def _grid(
    results: Results, cells: Cells, figure: Figure, form: str, spread: bool = True
) -> list[str]:
    """Lengths down, mixers across; a cell that failed says why."""
    mixers = list(results["models"])
    lines = [f"| tokens | {' | '.join(mixers)} |", "|---|" + "---|" * len(mixers)]
    for length in lengths_of(results):
        row = []
        for mixer in mixers:
            repetitions = cells.get((mixer, length), [])
            middle = median_of(repetitions, figure)
            if middle is None:
                row.append(why_failed(repetitions))
                continue
            shown = form.format(middle)
            if spread:
                figures = [figure(record) for record in repetitions]
                shown += f" ({form.format(min(figures))} to {form.format(max(figures))})"
            row.append(shown)
        lines.append(f"| {length:,} | {' | '.join(row)} |")
    return lines


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
    rate = training_rate(results)
    plots: list[tuple[str, str, Series, dict[str, Any]]] = []

    def over_context(name: str, title: str, cells: Cells, figure: Figure, y: str) -> None:
        series: dict[str, list[tuple[float, float]]] = {}
        for mixer in results["models"]:
            points = [
                (float(length), middle)
                for length in lengths_of(results)
                if (middle := median_of(cells.get((mixer, length), []), figure)) is not None
            ]
            if points:
                series[mixer] = points
        plots.append((name, title, series, {"x": "context, tokens", "y": y, "lengths": True}))

    over_context(
        "throughput.png", "Training throughput over context", training, rate, "tokens per second"
    )
    over_context(
        "memory.png", "Peak memory over context", training, memory, "GiB a worker, over idle"
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
            curves: Series = {
                label: [(point[by], point["loss"]) for point in run["held_out"]]
                for label, run in runs.items()
            }
            title = f"{task}: held-out loss over {by if by == 'tokens' else 'time'}"
            plots.append((f"{task}_loss_{by}.png", title, curves, {"x": x, "y": "nats per token"}))
    for name, title, series, axes in plots:
        plot_lines(folder / name, series, title=title, **axes)
    return [(name, title) for name, title, _, _ in plots]
