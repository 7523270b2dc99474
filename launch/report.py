"""A run's folder as a page for people: report.md, loss.png, samples.txt."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.files import write_whole
from launch.page import table
from trainer.checks import asks_questions
from trainer.config import Config, load_dumped
from trainer.goodput import describe
from trainer.run_folder import Line, RunFolder, read_lines

PROMPT_TOKENS = 256
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class _Record:
    """What a run has left in its folder."""

    folder: RunFolder
    config: Config
    metrics: list[Line]
    evaluations: list[Line]
    result: Line | None  # the final evaluation, if the last step has one
    asks: bool  # whether its data ask questions: only answers count
    # the start of a text, and what the model makes of it; None where it learned no text
    sample: tuple[str, str] | None


def write_report(folder: RunFolder) -> str:
    """Write the report of a run, and return what the driver prints at the end.

    Raises ValueError where the folder holds no run, or one without a step.
    """
    config, metrics = load_dumped(folder.config), read_lines(folder.metrics)
    if not metrics:
        raise ValueError(f"{folder.path} has taken no step yet, of which a report would tell")
    asks = asks_questions([folder.path])
    run = _Record(
        folder,
        config,
        metrics,
        read_lines(folder.evaluations),
        folder.read_result(metrics[-1]["step"]),
        asks,
        None if config.model.of_frames or asks else _sample(folder, config),
    )
    told = [_summary(run)]
    if run.sample:
        prompt, continuation = run.sample
        write_whole(folder.samples, f"{prompt}\n>>> continued by the model:\n{continuation}\n")
        told.append(
            f"Sampled continuation ({folder.samples} has it all):\n{_indent(continuation[:400])}"
        )
    _plot(run)
    write_whole(folder.report, "\n".join([*_page(run), ""]))
    commands = "\n".join(f"  {command}" for command in _commands(run))
    told.append(f"Report and curve: {folder.report}, {folder.curve}\nGo on with:\n{commands}")
    return "\n\n".join(told)


def _commands(run: _Record) -> list[str]:
    folder = run.folder
    commands = [
        f"tensorboard --logdir {folder.tensorboard}",
        f"python -m launch train {folder.config} train.steps=N    # resume, and train longer",
    ]
    if run.config.model.of_frames:
        seen = run.config.evaluate.rollout_frames
        use = f"rollout {folder.path}" + (f" --frames {seen}" if seen else "")
        commands.append(f"python -m launch {use}")
    if run.sample:
        commands.append(f'python -m launch generate {folder.path} --prompt "import os"')
    return commands


def _summary(run: _Record) -> str:
    config = run.config
    speed = statistics.median(m["tokens_per_second"] for m in run.metrics)
    pieces = "frames" if config.model.of_frames else "tokens"
    lines = [
        f"{run.metrics[-1]['step']} steps of {config.train.batch_size} x {config.train.seq_len:,} "
        f"{pieces} on {config.launch.workers} workers (sp={config.parallel.sp}), "
        f"median {speed:,.0f} {pieces}/s"
    ]
    if risen := risen_loss(run.metrics):
        lines.append(f"warning: {risen}")
    if run.result:
        what = "squared error of actions" if run.config.model.of_frames else "loss"
        pieces = "answers" if run.asks else pieces
        lines.append(f"\nHeld-out {what} on {run.result['tokens']:,} {pieces}:")
        for name, row in _models(run):
            told = f"   {row['accuracy']:.1%} right" if run.asks else ""
            if run.sample:
                told = f" nats   {row['bits_per_byte']:.4f} bits per byte"
            lines.append(f"  {name:<8} {row['loss']:.4f}{told}")
        if played := run.result.get("rollouts"):
            lines.append(
                f"Normalised score in {played['environment']}: {played['score']:.1f}, mean of "
                f"{len(played['returns'])} episodes"
            )
    return "\n".join(lines)


def _unit(run: _Record) -> str:
    return "squared error of actions" if run.config.model.of_frames else "loss, nats per token"


def risen_loss(metrics: list[Line]) -> str | None:
    """That a run has learned nothing: its losses at the end are above those of its beginning."""
    losses = [line["loss"] for line in metrics if line["loss"] is not None]
    count = min(10, len(losses) // 2)
    if not count:
        return None
    first, last = (statistics.mean(part) for part in (losses[:count], losses[-count:]))
    if last <= first:
        return None
    return (
        f"The loss ended above where it began: {last:.3f} over the last {count} steps, "
        f"{first:.3f} over the first"
    )


def _models(run: _Record) -> list[tuple[str, Line]]:
    """The n-gram models and ours, each with its losses."""
    assert run.result
    name = run.config.model.mixer if isinstance(run.config.model.mixer, str) else "model"
    return [*run.result["baselines"].items(), (name, run.result)]


def _page(run: _Record) -> Iterator[str]:
    config, metrics = run.config, run.metrics
    yield from (
        f"# {run.folder.path.name}",
        "",
        f"{config.model.layers} layers of {config.model.mixer}, width {config.model.width}, on "
        f"{' and '.join(config.data.sources)}. {config.launch.workers} workers, dp={config.dp}, "
        f"sp={config.parallel.sp}, ZeRO stage {config.deepspeed.zero_stage}, "
        f"{config.train.dtype}. The full configuration is `config.yaml`.",
        "",
        *table("", ("",), _figures(run.folder, config, metrics)),
        f"![loss]({run.folder.curve.name})",
        "",
        *([f"**{risen}**", ""] if (risen := risen_loss(metrics)) else []),
    )
    told = _earned if config.model.of_frames else _answers if run.asks else _losses
    if run.result:
        yield from (
            "## Held-out loss",
            "",
            *told(run),
            *_by_source(run),
            *table(
                "position in the sequence",
                ("squared error" if config.model.of_frames else "nats per token",),
                [
                    (f"{start:,} to {stop - 1:,}", (f"{loss:.4f}",))
                    for start, stop, loss in run.result["by_position"]
                ],
            ),
        )
    if run.sample:
        prompt, continuation = run.sample
        yield from ("## A sample", "", "```", prompt[-200:], ">>>", continuation, "```", "")
    yield from ("## Go on", "", *(f"    {command}" for command in _commands(run)))


def _by_source(run: _Record) -> list[str]:
    """Of a run on several; frames have no bytes."""
    assert run.result
    rows = run.result.get("by_source", [])
    if not rows:
        return []
    if run.config.model.of_frames:
        errors = [(name, (f"{frames:,}", f"{loss:.4f}")) for name, frames, loss, _ in rows]
        return [*table("source", ("frames", "squared error"), errors)]
    losses = [(name, (f"{n:,}", f"{loss:.4f}", f"{bits:.4f}")) for name, n, loss, bits in rows]
    return [*table("source", ("tokens", "nats per token", "bits per byte"), losses)]


def _losses(run: _Record) -> list[str]:
    assert run.result
    rows = [(name, (f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}")) for name, r in _models(run)]
    return [
        f"On {run.result['tokens']:,} tokens of documents that were not trained on; the n-gram "
        f"models are counted on the training split and measured on the same tokens.",
        "",
        *table("model", ("nats per token", "bits per byte"), rows),
    ]


def _answers(run: _Record) -> list[str]:
    """Of a run on questions: what it knows."""
    assert run.result
    rows = [("all", (f"{run.result['accuracy']:.1%}", f"{run.result['loss']:.4f}"))]
    by_distance = run.result.get("by_distance", [])
    rows += [(f"{n:,}", (f"{right:.1%}", f"{loss:.4f}")) for n, loss, right in by_distance]
    return [
        f"On {run.result['tokens']:,} answers that were not trained on.",
        "",
        *table("distance, tokens", ("right", "nats per answer"), rows),
    ]


def _earned(run: _Record) -> list[str]:
    """Of a decision model: its error, and what its episodes earn."""
    assert run.result
    frames, loss = run.result["tokens"], run.result["loss"]
    told = (
        f"On {frames:,} frames of episodes that were not trained on, the squared error of actions"
    )
    lines = [f"{told} is {loss:.4f}.", ""]
    if played := run.result.get("rollouts"):
        rows = zip(played["returns"], played["lengths"], strict=True)
        lines += [
            f"Played in {played['environment']}, asked for a return of {played['asked']:,.0f}: a "
            f"normalised score of {played['score']:.1f}.",
            "",
            *table(
                "episode",
                ("return", "frames"),
                [(f"{n}", (f"{r:,.1f}", f"{t:,}")) for n, (r, t) in enumerate(rows, start=1)],
            ),
        ]
    return lines


def _figures(
    folder: RunFolder, config: Config, metrics: list[Line]
) -> Iterator[tuple[str, tuple[str]]]:
    tail = metrics[-min(50, len(metrics)) :]
    step_seconds = statistics.median(m["step_seconds"] for m in tail)
    exchange = statistics.median(m["exchange_seconds"] for m in tail)
    tokens = config.train.batch_size * config.train.seq_len
    memory = max(m["peak_memory_bytes"] for m in metrics)
    yield "steps", (f"{metrics[-1]['step']}",)
    yield "tokens per step", (f"{tokens:,}",)
    yield "tokens seen", (f"{metrics[-1]['tokens']:,}",)
    yield f"step time, median of the last {len(tail)}", (f"{step_seconds:.3f} s",)
    yield "of it in the exchange, waiting included", (f"{exchange:.3f} s",)
    yield "tokens per second", (f"{tokens / step_seconds:,.0f}",)
    yield "peak memory of a worker", (f"{memory / 2**30:.2f} GiB",)
    if metrics[-1]["loss"] is not None:
        yield "last training loss", (f"{metrics[-1]['loss']:.4f}",)
    yield from _goodput(folder)


def _goodput(folder: RunFolder) -> Iterator[tuple[str, tuple[str]]]:
    """What became of the time since the run was submitted."""
    told = describe(folder)
    if told is None:  # a run of an older version
        return
    share, elapsed = told["goodput"], told["elapsed_seconds"]
    yield "goodput: steps that count, of the time submitted", (f"{share:.1%} of {elapsed:,.0f} s",)
    yield "time that saves held up the steps", (f"{told['save_share']:.2%}",)
    if told["restarts"]:
        yield "restarts", (f"{told['restarts']}, {told['lost_steps']} steps taken again",)
        slowest = f"{told['recovery_seconds']:.0f} s, at worst {told['worst_recovery_seconds']:.0f}"
        yield "to the first new step, median", (slowest,)


def _sample(folder: RunFolder, config: Config) -> tuple[str, str]:
    """(prompt, continuation): the start of the held-out text, and what the model makes of it."""
    import torch

    from trainer.data import TokenStream
    from trainer.generate import Sampling, generate, load_run

    trained = load_run(folder.path, torch.device("cpu"))
    if config.evaluate.sequences:
        stream = TokenStream(config.held_out.data, "held_out")
    else:
        stream = TokenStream(config.data, "train")
    prompt = stream.read(0, min(PROMPT_TOKENS, stream.tokens[0]))[0].tolist()
    sampling = Sampling(temperature=0.8, top_k=40, known=trained.known)
    tokens = list(generate(trained.model, prompt, SAMPLE_TOKENS, sampling))
    written = trained.tokenizer.decode_stream(prompt)
    continuation = "".join(map(written.step, tokens)) + written.end()
    return trained.tokenizer.decode(prompt), continuation


def _plot(run: _Record) -> None:
    """Training and held-out loss over tokens, and the held-out loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics, evaluations, result = run.metrics, run.evaluations, run.result
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([m["tokens"] for m in metrics], [m["loss"] for m in metrics], lw=1, label="training")
    if evaluations:
        tokens = {m["step"]: m["tokens"] for m in metrics}
        points = [(tokens[e["step"]], e["loss"]) for e in evaluations if e["step"] in tokens]
        left.plot([x for x, _ in points], [y for _, y in points], "o-", label="held out")
    if result:
        for (name, row), style in zip(result["baselines"].items(), (":", "--"), strict=False):
            left.axhline(row["loss"], color="gray", ls=style, lw=1, label=name)
        centers = [start for start, _, _ in result["by_position"]]
        right.step(centers, [loss for _, _, loss in result["by_position"]], where="post")
    left.set(xlabel="tokens", ylabel=_unit(run), title="Loss over training")
    left.legend()
    right.set(xlabel="position in the sequence, tokens", title="Held-out loss by position")
    right.set_xscale("symlog", linthresh=16)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(run.folder.curve, dpi=120)
    plt.close(figure)


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
