"""A run's events on a terminal: one live bar, and lines beside it for what is rarer than a step."""

import math
import sys
import time
from datetime import timedelta
from typing import Never

from tqdm import tqdm

from trainer.events import Evaluated, Event, Metrics, Started, Stepped, Streamed, Warned


class Progress:
    """Shows events as they come."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None
        self._interactive = sys.stderr.isatty()
        self._wrote = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self._start(event)
            case Stepped(step, _, metrics):
                self._advance(step, metrics)
            case Evaluated(step):
                self._write(f"step {step}: {event}")
            case Streamed() if self._bar is not None and self._interactive:
                self._bar.set_postfix_str(str(event))
            case Streamed():
                self._write_seldom(str(event))
            case Warned(message):
                self._write(f"warning: {message}")

    def _start(self, event: Started) -> None:
        if self._bar is not None:  # started again after a lost worker
            self._bar.close()
        print(
            f"{event.parameters:,} parameters on {event.workers} workers: dp={event.dp}, "
            f"sp={event.sp}, {event.shard_tokens:,} tokens of every "
            f"{'sequence' if event.segments == 1 else 'segment'} per worker"
            f"{'' if event.segments == 1 else f', {event.segments:,} segments'}, "
            f"about {event.expected_bytes / 2**30:.2f} GiB, {event.scan} scan{_resuming(event)}",
            flush=True,
        )
        for change in event.changed:
            print(f"changed since the last start: {change}", flush=True)
        self._bar = tqdm(
            total=event.steps,
            initial=event.step,
            desc="step",
            mininterval=0.2 if self._interactive else 10,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}|{postfix}",
        )

    def _advance(self, step: int, metrics: Metrics) -> None:
        assert self._bar is not None
        loss = math.nan if metrics["loss"] is None else metrics["loss"]
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"ETA {timedelta(seconds=round(metrics['eta_seconds'] or 0))}",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def _write_seldom(self, line: str) -> None:
        """Where nothing can be drawn over: a line in ten seconds."""
        if time.monotonic() - self._wrote > 10:
            self._wrote = time.monotonic()
            self._write(line)

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)


def _resuming(start: Started) -> str:
    amid = f", {start.runs:,} segments into the next" if start.runs else ""
    return f"; resuming at step {start.step}{amid}" if start.step or amid else ""
