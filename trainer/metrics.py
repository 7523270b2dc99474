"""A run's figures: metrics.jsonl in full precision, and the same to TensorBoard."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from models.flops import training_flops_per_token
from trainer.config import Config

# Dense bf16 peaks in FLOP/s, by the name that CUDA reports. Where the peak is unknown, mfu is null.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def step_metrics(
    config: Config,
    device: torch.device,
    step: int,
    consumed: int,
    *,
    step_seconds: float,
    **measured: float,
) -> dict[str, Any]:
    """A step's line of metrics.jsonl: what was measured, and the rates that follow from it.

    `consumed` counts sequences since the run began.
    """
    rate = config.train.batch_size * config.train.seq_len / step_seconds
    rate_per_worker = rate / config.launch.workers
    peak = peak_flops(device)
    flops = training_flops_per_token(config.model, config.train.seq_len) * rate_per_worker
    return {
        "step": step,
        "tokens": consumed * config.train.seq_len,
        "tokens_per_second": rate,
        "tokens_per_second_per_worker": rate_per_worker,
        "step_seconds": step_seconds,
        "mfu": None if peak is None else flops / peak,
        **measured,
    }


class MetricsWriter:
    """Writes one line per step. Opened at a step, it first drops what a lost run wrote after it."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        truncate_after(self.path, first_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, metrics: dict[str, Any]) -> None:
        """One step's figures; None is written as null and not shown in TensorBoard."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def truncate_after(path: Path, step: int) -> None:
    """Keep the lines of a .jsonl file whose step is at most `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    partial.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; what a killed writer left half-written is not one."""
    lines = []
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
