"""The verbs: python -m launch train|compare CONFIG [key=value ...], generate RUN_DIR."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from launch.gang import LaunchError
from launch.ray_job import make_absolute, place_faults, run_job
from trainer.comparison import load_comparison
from trainer.config import load_config
from trainer.settings import ConfigError


def main(argv: list[str]) -> int:
    """Run one verb; 0 when it worked, 1 with one message on stderr when it did not."""
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser(
        "train", help="train a configuration on Ray; the same command again resumes"
    )
    train.add_argument("config", help="a YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")
    compare = verbs.add_parser(
        "compare", help="measure and train several mixers side by side; run again, it goes on"
    )
    compare.add_argument("config", help="a YAML file with a section `compare`, see configs/")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")
    generate = verbs.add_parser("generate", help="continue a text with a trained model")
    generate.add_argument("run", type=Path, metavar="RUN_DIR")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help="a file with the text, of any length")
    generate.add_argument("--max-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    generate.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest")
    generate.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.verb == "train":
            return _train(args.config, args.overrides)
        if args.verb == "compare":
            return _compare(args.config, args.overrides)
        return _generate(args)
    except (ValueError, LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _train(config_path: str, overrides: list[str]) -> int:
    config = load_config(config_path, overrides)
    if faults := place_faults([("run.dir", config.run.dir), ("data.path", config.data.path)]):
        raise ConfigError(config_path, faults)
    make_absolute(config)

    should_stop = _watch_signals("stopping after the next step and a checkpoint")
    print(f"starting {config.launch.workers} workers", flush=True)
    with _Progress() as progress:
        finished = run_job(config, progress.show, should_stop)
    run = Path(config.run.dir)
    if not finished:
        print(f"stopped in good order; the same command goes on from {run / 'checkpoints'}")
        return 0
    if not (run / "metrics.jsonl").exists():
        print(f"{run} is on storage that this machine does not see: no report was written")
        return 0
    from launch.report import write_report  # imports torch and matplotlib

    print("\n" + write_report(run))
    return 0


def _watch_signals(said: str) -> Callable[[], bool]:
    """Whether Ctrl-C or a pre-emption has asked to stop in good order; the second stops at once."""
    asked = 0

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise KeyboardInterrupt
        print(f"\n{said}; again to stop at once", flush=True)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    return lambda: asked > 0


def _compare(config_path: str, overrides: list[str]) -> int:
    comparison = load_comparison(config_path, overrides)
    paths = {("compare.dir", comparison.settings.dir)}
    for runs in comparison.tasks.values():
        paths |= {("data.path", run.data.path) for run, *_ in runs.values()}
    if faults := place_faults(sorted(paths)):
        raise ConfigError(config_path, faults)
    from launch.compare import run_comparison, train_quietly
    from launch.compare_report import write_comparison

    should_stop = _watch_signals("stopping after this cell, or the next step and a checkpoint")
    show = partial(print, flush=True)
    results = run_comparison(comparison, show, train_quietly(show, should_stop), should_stop)
    if results is None:
        print(f"stopped in good order; the same command goes on in {comparison.settings.dir}")
        return 0
    print("\n" + write_comparison(Path(comparison.settings.dir), results))
    return 0


class _Progress:
    """Rank 0's events as one live bar, and lines beside it for what is rarer than a step."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._interactive = sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "step":
            assert self._bar is not None
            self._bar.set_postfix_str(
                f"loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s, "
                f"ETA {time.strftime('%H:%M:%S', time.gmtime(event['eta_seconds']))}",
                refresh=False,
            )
            self._bar.update(event["step"] - self._bar.n)
        elif kind == "evaluation":
            self._write(
                f"step {event['step']}: held-out loss {event['loss']:.4f} nats, "
                f"{event['bits_per_byte']:.4f} bits per byte"
            )
        elif kind == "warning":
            self._write(f"warning: {event['message']}")

    def _start(self, event: dict[str, Any]) -> None:
        if self._bar is not None:  # started again after a lost worker
            self._bar.close()
        print(
            f"{event['parameters']:,} parameters on {event['workers']} workers: dp={event['dp']}, "
            f"sp={event['sp']}, {event['shard_tokens']:,} tokens of every sequence per worker, "
            f"{event['scan']} scan"
            + (f"; resuming at step {event['step']}" if event["step"] else ""),
            flush=True,
        )
        self._bar = tqdm(
            total=event["steps"],
            initial=event["step"],
            desc="step",
            mininterval=0.2 if self._interactive else 10,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}|{postfix}",
        )

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)


def _generate(args: argparse.Namespace) -> int:
    import torch

    from trainer.generate import generate, load_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, step = load_run(args.run, device)
    prompt = args.prompt if args.prompt is not None else args.prompt_file.read_text()
    print(f"[{args.run}, step {step}]", file=sys.stderr)
    text_of = tokenizer.decode_stream()
    for token in generate(
        model,
        tokenizer.encode(prompt).tolist(),
        args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    ):
        print(text_of(token), end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
