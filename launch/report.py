"""A run's folder as a page for people: report.md, loss.png, samples.txt."""

import json
import statistics
from pathlib import Path
from typing import Any

from trainer.config import Config, load_dumped
from trainer.metrics import read_lines

PROMPT_TOKENS = 256
SAMPLE_TOKENS = 512


def write_report(run: Path) -> str:
    """Write the report of a run, and return what the driver prints at the end.

    Raises ValueError where the folder holds no run.
    """
    config = load_dumped(run / "config.yaml")
    metrics = read_lines(run / "metrics.jsonl")
    evaluations = _lines(run / "evaluations.jsonl")
    result = _result(run, metrics[-1]["step"])
    sample = _sample(run, config)
    (run / "samples.txt").write_text(f"{sample[0]}\n>>> continued by the model:\n{sample[1]}\n")
    _plot(run / "loss.png", metrics, evaluations, result)
    summary = _summary(config, metrics, result)
    (run / "report.md").write_text(_page(run, config, metrics, result, sample))
    commands = "\n".join(f"  {command}" for command in _commands(run))
    return (
        f"{summary}\n\nSampled continuation ({run / 'samples.txt'} has it all):\n"
        f"{_indent(sample[1][:400])}\n\nReport and curve: {run / 'report.md'}, {run / 'loss.png'}\n"
        f"Go on with:\n{commands}"
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []


def _result(run: Path, step: int) -> dict[str, Any] | None:
    """The final evaluation, if it is of this step."""
    path = run / "evaluation.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and result["step"] == step else None


def _commands(run: Path) -> list[str]:
    return [
        f"tensorboard --logdir {run / 'tensorboard'}",
        f"python -m launch train {run / 'config.yaml'} train.steps=N    # resume, and train longer",
        f'python -m launch generate {run} --prompt "import os"',
    ]


def _summary(config: Config, metrics: list[dict[str, Any]], result: dict[str, Any] | None) -> str:
    speed = statistics.median(m["tokens_per_second"] for m in metrics)
    lines = [
        f"{metrics[-1]['step']} steps of {config.train.batch_size} x {config.train.seq_len:,} "
        f"tokens on {config.launch.workers} workers (sp={config.parallel.sp}), "
        f"median {speed:,.0f} tokens/s"
    ]
    if result:
        lines.append(f"\nHeld-out loss on {result['tokens']:,} tokens:")
        lines += [
            f"  {name:<8} {row['loss']:.4f} nats   {row['bits_per_byte']:.4f} bits per byte"
            for name, row in _rows(config, result)
        ]
    return "\n".join(lines)


def _rows(config: Config, result: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    name = config.model.mixer if isinstance(config.model.mixer, str) else "model"
    return [*result["baselines"].items(), (name, result)]


def _page(
    run: Path,
    config: Config,
    metrics: list[dict[str, Any]],
    result: dict[str, Any] | None,
    sample: tuple[str, str],
) -> str:
    tail = metrics[-min(50, len(metrics)) :]
    step_seconds = statistics.median(m["step_seconds"] for m in tail)
    exchange = statistics.median(m["exchange_seconds"] for m in tail)
    tokens_per_second = config.train.batch_size * config.train.seq_len / step_seconds
    memory = max(m["peak_memory_bytes"] for m in metrics)
    page = [
        f"# {run.name}",
        "",
        f"{config.model.layers} layers of {config.model.mixer}, width {config.model.width}, on "
        f"{config.data.path}. {config.launch.workers} workers, dp={config.dp}, "
        f"sp={config.parallel.sp}, ZeRO stage {config.deepspeed.zero_stage}, "
        f"{config.train.dtype}. The full configuration is `config.yaml`.",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {metrics[-1]['step']} |",
        f"| tokens per step | {config.train.batch_size * config.train.seq_len:,} |",
        f"| tokens seen | {metrics[-1]['tokens']:,} |",
        f"| step time, median of the last {len(tail)} | {step_seconds:.3f} s |",
        f"| of it in the exchange, waiting included | {exchange:.3f} s |",
        f"| tokens per second | {tokens_per_second:,.0f} |",
        f"| peak memory of a worker | {memory / 2**30:.2f} GiB |",
        f"| last training loss | {metrics[-1]['loss']:.4f} nats |",
        "",
        "![loss](loss.png)",
        "",
    ]
    if result:
        page += [
            "## Held-out loss",
            "",
            f"On {result['tokens']:,} tokens of documents that were not trained on; the n-gram "
            f"models are counted on the training split and measured on the same tokens.",
            "",
            "| model | nats per token | bits per byte |",
            "|---|---|---|",
            *(
                f"| {name} | {row['loss']:.4f} | {row['bits_per_byte']:.4f} |"
                for name, row in _rows(config, result)
            ),
            "",
            "| position in the sequence | nats per token |",
            "|---|---|",
            *(
                f"| {start:,} to {stop - 1:,} | {loss:.4f} |"
                for start, stop, loss in result["by_position"]
            ),
            "",
        ]
    page += [
        "## A sample",
        "",
        "```",
        sample[0][-200:],
        ">>>",
        sample[1],
        "```",
        "",
        "## Go on",
        "",
    ]
    return "\n".join([*page, *(f"    {command}" for command in _commands(run)), ""])


def _sample(run: Path, config: Config) -> tuple[str, str]:
    """(prompt, continuation): the start of the held-out text, and what the model makes of it."""
    import torch

    from trainer.data import TokenStream
    from trainer.generate import generate, load_run

    model, tokenizer, _ = load_run(run, torch.device("cpu"))
    stream = TokenStream(config.data, "held_out" if config.evaluate.sequences else "train")
    prompt = stream.read(0, min(PROMPT_TOKENS, stream.token_count))[0].tolist()
    tokens = generate(model, prompt, SAMPLE_TOKENS, temperature=0.8, top_k=40)
    return tokenizer.decode(prompt), tokenizer.decode(list(tokens))


def _plot(
    path: Path,
    metrics: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    result: dict[str, Any] | None,
) -> None:
    """Training and held-out loss over tokens, and the held-out loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([m["tokens"] for m in metrics], [m["loss"] for m in metrics], lw=1, label="training")
    per_step = metrics[-1]["tokens"] / metrics[-1]["step"]
    if evaluations:
        left.plot(
            [e["step"] * per_step for e in evaluations],
            [e["loss"] for e in evaluations],
            "o-",
            label="held out",
        )
    if result:
        for (name, row), style in zip(result["baselines"].items(), (":", "--"), strict=False):
            left.axhline(row["loss"], color="gray", ls=style, lw=1, label=name)
        centers = [start for start, _, _ in result["by_position"]]
        right.step(centers, [loss for _, _, loss in result["by_position"]], where="post")
    left.set(xlabel="tokens", ylabel="loss, nats per token", title="Loss over training")
    left.legend()
    right.set(xlabel="position in the sequence, tokens", title="Held-out loss by position")
    right.set_xscale("symlog", linthresh=16)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
