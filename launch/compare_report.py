"""A comparison as a page for people: report.md, and plots of throughput, memory and loss."""

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
    table,
    training_rate,
    typical,
    why_failed,
    workers_of,
)
from launch.compare_findings import findings_of
from launch.compare_tasks import task_sections
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
        "## Training",
        "",
        "Tokens per second of all workers: median of the repetitions, and their spread.",
        "",
        *_grid(results, training, rate, "{:,.0f}"),
        f"Per worker ({results['config']['launch']['workers']} workers):",
        "",
        *_grid(results, training, lambda r: rate(r) / workers_of(results), "{:,.0f}", spread=False),
        "Seconds per optimizer step:",
        "",
        *_grid(results, training, lambda r: median(r["step_seconds"]), "{:.3f}"),
        "Peak memory of a worker over what it holds before it builds the model, GiB:",
        "",
        *_grid(results, training, memory, "{:.2f}"),
        "Achieved GFLOP/s of all workers, counting what the model needs (half the square of "
        "attention, nothing twice):",
        "",
        *_grid(results, training, gigaflops(results), "{:,.0f}", spread=False),
        *_mfu(results, training),
        "Bytes that a worker sends along the sequence per step:",
        "",
        *_grid(results, training, lambda r: r["exchange_bytes"], "{:,.0f}", spread=False),
        "## Reading and continuing a text, on one worker",
        "",
        f"Seconds to read a prompt (in segments of "
        f"{results['settings']['prefill_segment']:,} tokens):",
        "",
        *_grid(results, reading, lambda r: r["prefill_seconds"], "{:.3f}"),
        "Tokens per second of decoding after it:",
        "",
        *_grid(results, reading, lambda r: r["decode_tokens_per_second"], "{:,.0f}"),
        "What is kept of the text between tokens (with room to grow), KiB:",
        "",
        *_grid(results, reading, lambda r: r["carry_bytes"] / 1024, "{:,.0f}", spread=False),
        *task_sections(results),
    ]
    (folder / "report.md").write_text("\n".join(page).rstrip() + "\n")
    shown = "\n".join(f"  {finding}" for finding in findings)
    return f"{shown}\n\nReport: {folder / 'report.md'}"


def _mfu(results: Results, training: Cells) -> list[str]:
    peak = known_peak(training)
    if peak is None:
        return ["MFU is not given: the peak of this device is not known.", ""]
    flops, total = gigaflops(results), peak * workers_of(results) / 1e9
    shares = _grid(results, training, lambda r: 100 * flops(r) / total, "{:.1f}", spread=False)
    return ["MFU, percent:", "", *shares]


def _grid(
    results: Results, cells: Cells, figure: Figure, form: str, spread: bool = True
) -> list[str]:
    """Lengths down, mixers across; a cell that failed says why."""
    rows = []
    for length in lengths_of(results):
        row = []
        for mixer in results["models"]:
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
        rows.append((f"{length:,}", row))
    return table("tokens", results["models"], rows)


def _circumstances(results: Results) -> list[str]:
    config, settings = results["config"], results["settings"]
    train, launch = config["train"], config["launch"]
    limit = settings["memory_gib_per_worker"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    seeds = ", ".join(map(str, settings["seeds"] or [config["run"]["seed"]]))
    rates = f"learning rate {config['optim']['learning_rate']:g}, tuned for none"
    if settings["learning_rates"]:
        tried = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
        rates = f"learning rates {tried}, of which each mixer's best counts"
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
        f"- trainings: seed {seeds}; {rates}; weight decay {config['optim']['weight_decay']:g} on "
        f"matrices, but not on those that make gates and candidates of a recurrence; recurrences "
        f"have a convolution of {config['model']['conv_width']} tokens before them, attention and "
        f"window have none; seconds are steps at the pace of a training's median step",
    ]


def _model_table(results: Results) -> list[str]:
    target = results["target_parameters"]
    rows = [
        (
            label,
            [
                *(str(m[part]) for part in ("width", "layers", "mlp_width")),
                f"{m['parameters']:,}",
                f"{m['parameters'] / target:.2%}",
            ],
        )
        for label, m in results["models"].items()
    ]
    return [
        f"Solved for {target:,} parameters by {results['settings']['match']}; the MLP takes up the "
        f"rest.",
        "",
        *table("mixer", ("width", "layers", "MLP", "parameters", "of the target"), rows),
    ]


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
                label: [(point[by], point["loss"]) for point in typical(found)["held_out"]]
                for label, found in runs.items()
            }
            title = f"{task}: held-out loss over {by if by == 'tokens' else 'time'}"
            plots.append((f"{task}_loss_{by}.png", title, curves, {"x": x, "y": "nats per token"}))
    for name, title, series, axes in plots:
        plot_lines(folder / name, series, title=title, **axes)
    return [(name, title) for name, title, _, _ in plots]
