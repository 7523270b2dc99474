"""A comparison as a page for people: report.md, and plots of throughput, memory and loss."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.files import write_whole
from launch.compare.file import file_name
from launch.compare.findings import findings_of
from launch.compare.results import (
    Cells,
    Figure,
    Results,
    figure,
    median_of,
    memory_gib,
    step_seconds,
    typical,
    why_failed,
)
from launch.compare.tasks import task_sections
from launch.page import table
from launch.plot import Axes, Series, plot_lines


def write_comparison(folder: Path, results: Results) -> str:
    """Write report.md and its plots into `folder`; what the driver prints at the end."""
    findings = list(findings_of(results))
    plots = list(_plots(results))
    for name, series, axes in plots:
        plot_lines(folder / name, series, axes)
    page = [
        f"# {', '.join(results.models)}: side by side",
        "",
        *_circumstances(results),
        "",
        "## What was found",
        "",
        *(f"- {finding}" for finding in findings),
        "",
        *(f"![{axes.title}]({name})" for name, _, axes in plots),
        "",
        "## The models",
        "",
        *_model_table(results),
        *_training_section(results),
        *_reading_section(results),
        *task_sections(results),
    ]
    write_whole(folder / "report.md", "\n".join(page).rstrip() + "\n")
    shown = "\n".join(f"  {finding}" for finding in findings)
    return f"{shown}\n\nReport: {folder / 'report.md'}"


def _training_section(results: Results) -> Iterator[str]:
    cells, rate = results.of("training"), results.training_rate
    workers = results.workers
    yield from (
        "## Training",
        "",
        "Tokens per second of all workers: median of the repetitions, and their spread.",
        "",
        *_grid(results, cells, rate, "{:,.0f}"),
        f"Per worker ({workers} workers):",
        "",
        *_grid(results, cells, lambda r: rate(r) / workers, "{:,.0f}", spread=False),
        "Seconds per optimizer step:",
        "",
        *_grid(results, cells, step_seconds, "{:.3f}"),
        "Peak memory of a worker over what it holds before it builds the model, GiB:",
        "",
        *_grid(results, cells, memory_gib, "{:.2f}"),
        "Achieved GFLOP/s of all workers, counting what the model needs (half the square of "
        "attention, nothing twice):",
        "",
        *_grid(results, cells, results.gigaflops, "{:,.0f}", spread=False),
        "What large products of that precision reach in the same processes, all at once, GFLOP/s:",
        "",
        *_grid(results, cells, lambda r: workers * figure("limit_flops")(r) / 1e9, "{:,.0f}"),
        "The first as a share of the second, percent:",
        "",
        *_grid(results, cells, _share_of_limit(results), "{:.0f}", spread=False),
        *_mfu(results, cells),
        "Bytes that a worker sends along the sequence per step:",
        "",
        *_grid(results, cells, figure("exchange_bytes"), "{:,.0f}", spread=False),
    )


def _share_of_limit(results: Results) -> Figure:
    """What a training achieves, of what the machine gives, in percent."""
    limit = figure("limit_flops")
    return lambda record: 1e11 * results.gigaflops(record) / (results.workers * limit(record))


def _reading_section(results: Results) -> Iterator[str]:
    cells = results.of("reading")
    yield from (
        "## Reading and continuing a text, on one worker",
        "",
        f"Seconds to read a prompt (in segments of {results.settings.prefill_segment:,} tokens):",
        "",
        *_grid(results, cells, figure("prefill_seconds"), "{:.3f}"),
        "Tokens per second of decoding after it:",
        "",
        *_grid(results, cells, figure("decode_tokens_per_second"), "{:,.0f}"),
        "What is kept of the text between tokens (with room to grow), KiB:",
        "",
        *_grid(results, cells, lambda r: figure("carry_bytes")(r) / 1024, "{:,.0f}", spread=False),
    )


def _mfu(results: Results, training: Cells) -> list[str]:
    peak = results.known_peak()
    if peak is None:
        return ["MFU is not given: the peak of this device is not known.", ""]
    total = peak * results.workers / 1e9
    shares = _grid(
        results, training, lambda r: 100 * results.gigaflops(r) / total, "{:.1f}", spread=False
    )
    return ["MFU, percent:", "", *shares]


def _grid(results: Results, cells: Cells, of: Figure, form: str, spread: bool = True) -> list[str]:
    """Lengths down, mixers across; a cell that failed says why."""
    rows = []
    for length in results.lengths:
        row = []
        for mixer in results.models:
            repetitions = cells.get((mixer, length), [])
            middle = median_of(repetitions, of)
            if middle is None:
                row.append(why_failed(repetitions))
                continue
            shown = form.format(middle)
            if spread:
                figures = [of(record) for record in repetitions]
                shown += f" ({form.format(min(figures))} to {form.format(max(figures))})"
            row.append(shown)
        rows.append((f"{length:,}", row))
    return table("tokens", results.models, rows)


def _circumstances(results: Results) -> list[str]:
    config, settings = results.config, results.settings
    train, launch = config.train, config.launch
    limit = settings.memory_gib_per_worker
    versions = ", ".join(f"{name} {value}" for name, value in results.versions.items())
    runs = [run for task in results.tasks.values() for same in task.values() for run in same]
    own_seeds = sorted({run.seed for run in runs}) or [config.run.seed]
    seeds = ", ".join(map(str, settings.seeds or own_seeds))
    own_rates = sorted({run.learning_rate for run in runs}) or [config.optim.learning_rate]
    own = ", ".join(f"{rate:g}" for rate in own_rates)
    rates = f"learning rate {own}, tuned for none"
    if settings.learning_rates:
        tried = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
        rates = f"learning rates {tried}, of which each mixer's best counts"
        if any(run.asks for run in runs):
            rates += " (where a task asks questions, by right answers held out, else by loss)"
        if settings.more_rates:
            rates += f"; up to {settings.more_rates} more where the best is at an edge"
    taps = config.model.attention_conv
    before = f"a convolution of {taps} tokens before them" if taps else "none"
    return [
        f"- {versions}",
        f"- {results.hardware}; {launch.workers} workers, sp={config.parallel.sp}, "
        f"ZeRO stage {config.deepspeed.zero_stage}, {train.dtype}, "
        f"recompute {str(train.recompute).lower()}, compile {str(train.compile).lower()}",
        f"- {settings.repetitions} repetitions, interleaved; each times at most "
        f"{settings.steps} steps or {settings.seconds:g} s, at least one, after one that is "
        f"not timed, in fresh processes",
        f"- a cell is out of time after {settings.cell_timeout_seconds:g} s"
        + (f", out of memory above {limit:g} GiB a worker" if limit else ""),
        "- the same optimizer, precision, sharded step and tiled loss for all; random tokens in "
        "the cells",
        f"- trainings: seed {seeds}; {rates}; weight decay {config.optim.weight_decay:g} on "
        f"matrices, but not on those that make gates and candidates of a recurrence; recurrences "
        f"have a convolution of {config.model.conv_width} tokens before them, attention and "
        f"window have {before}; a gate on a recurrence's output {str(config.model.gate).lower()}, "
        f"expansion {config.model.expansion:g}, memories at first of up to "
        f"{config.model.memory_tokens:,.0f} tokens; seconds are steps at the pace of a "
        f"training's median step"
        + (f", up to {settings.at_once} trainings at once" if settings.at_once > 1 else ""),
        *(f"- {note}" for note in settings.notes),
    ]


def _model_table(results: Results) -> list[str]:
    target = results.target_parameters
    rows = [
        (
            label,
            [
                *(str(size) for size in (model.width, model.layers, model.mlp_width)),
                f"{model.parameters:,}",
                f"{model.parameters / target:.2%}",
            ],
        )
        for label, model in results.models.items()
    ]
    solved = f"Solved for {target:,} parameters by {results.settings.match}"
    if results.settings.match == "none":
        whose = "" if results.settings.parameters else "the first one's "
        solved = f"As configured, beside {whose}{target:,} parameters"
    elif results.config.model.mlp_ratio:
        solved += "; the MLP takes up the rest"
    return [
        f"{solved}.",
        "",
        *table("mixer", ("width", "layers", "MLP", "parameters", "of the target"), rows),
    ]


def _plots(results: Results) -> Iterator[tuple[str, Series, Axes]]:
    """(file, lines, axes) of every plot."""
    training, reading = results.of("training"), results.of("reading")
    decoding = figure("decode_tokens_per_second")
    unit = "squared error" if results.config.model.of_frames else "nats per token"
    for name, title, cells, of, y in (
        ("throughput", "Training throughput", training, results.training_rate, "tokens per second"),
        ("memory", "Peak memory", training, memory_gib, "GiB a worker, over idle"),
        ("decode", "Decoding", reading, decoding, "tokens per second"),
    ):
        axes = Axes(f"{title} over context", "context, tokens", y, lengths=True)
        yield f"{name}.png", _over_context(results, cells, of), axes
    for task, runs in results.tasks.items():
        for by, x in (("tokens", "tokens trained on"), ("seconds", "seconds of training steps")):
            curves: Series = {
                label: [(getattr(point, by), point.loss) for point in typical(same).held_out]
                for label, same in runs.items()
            }
            title = f"{task}: held-out loss over {by if by == 'tokens' else 'time'}"
            yield f"{file_name(task)}_loss_{by}.png", curves, Axes(title, x, unit)
    if lines := _over_position(results):
        axes = Axes("Held-out loss by position", "from this token to twice as far", unit, True)
        yield "loss_by_position.png", lines, axes


def _over_position(results: Results) -> Series:
    """A line for each mixer of each task, where all tasks are of one text, and none asks back."""
    for_each = results.settings.tasks.values()
    if any(option.startswith(("data.", "evaluate.")) for options in for_each for option in options):
        return {}
    series: dict[str, list[tuple[float, float]]] = {}
    for task, runs in results.tasks.items():
        for label, final in ((label, typical(same).final) for label, same in runs.items()):
            # axes are logarithmic
            points = [(x, loss) for x, _, loss in final["by_position"] if min(x, loss) > 0]
            if points and not final["by_distance"]:
                series[f"{label}, {task}" if len(results.tasks) > 1 else label] = points
    return series


def _over_context(results: Results, cells: Cells, of: Figure) -> Series:
    """A line for each mixer that was measured at all."""
    series: dict[str, list[tuple[float, float]]] = {}
    for mixer in results.models:
        for length in results.lengths:
            middle = median_of(cells.get((mixer, length), []), of)
            if middle is not None:
                series.setdefault(mixer, []).append((float(length), middle))
    return series
