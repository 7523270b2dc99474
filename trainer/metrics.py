"""A run's figures: metrics.jsonl in full precision, and the same to TensorBoard."""

import json
import math
from contextlib import suppress
from dataclasses import asdict

import torch
from torch.utils.tensorboard import SummaryWriter

from data_prep.files import write_whole
from models.flops import training_flops_per_token
from trainer.events import Metrics, Streamed
from trainer.goodput import Goodput, Submission, taken
from trainer.provenance import hardware
from trainer.run_folder import Line, RunFolder, add_line, read_lines
from trainer.worker import Worker

# In which group of TensorBoard a figure stands; it opens the first, which is the loss.
GROUPS = {
    "loss": "loss/train",
    **dict.fromkeys(("grad_norm", "learning_rate", "skipped_steps"), "optimizer"),
    **dict.fromkeys(("tokens_per_second", "tokens_per_second_per_worker", "mfu"), "speed"),
    **dict.fromkeys(("relay_rounds", "relay_rerun_tokens", "relay_residual"), "relay"),
    **dict.fromkeys(("step_seconds", "data_seconds", "exchange_seconds", "save_seconds"), "time"),
}
# Dense bf16 peaks in FLOP/s, by the name that CUDA reports. Where the peak is unknown, mfu is null.
# The first that fits.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def step_metrics(worker: Worker, measured: Metrics) -> Metrics:
    """A step's line of metrics.jsonl: what was measured, and the rates that follow from it."""
    config, seconds = worker.config, measured["step_seconds"]
    assert seconds is not None
    rate = config.train.batch_size * config.train.seq_len / seconds
    rate_per_worker = rate / config.launch.workers
    peak = peak_flops(worker.device)
    mfu = None
    if peak is not None:
        length = measured["seq_len"]  # of this step, in a curriculum
        assert length is not None
        per_token = training_flops_per_token(config.model, int(length))
        mfu = per_token * rate_per_worker / peak
    return {
        **measured,
        "tokens_per_second": rate,
        "tokens_per_second_per_worker": rate_per_worker,
        "mfu": mfu,
    }


class MetricsWriter:
    """Writes one line per step, after those that the folder keeps of earlier starts."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        self._file = folder.metrics.open("a")
        board = folder.tensorboard / folder.path.name  # by which TensorBoard calls the run
        self._board = SummaryWriter(str(board), purge_step=first_step + 1)
        if folder.config.exists():
            indented = (f"    {line}\n" for line in folder.config.read_text().splitlines())
            self._board.add_text("configuration", "".join(indented), first_step)

    def write(self, metrics: Metrics) -> None:
        """One step's figures; None is written as null and not shown in TensorBoard."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                group = GROUPS.get(name, "run")
                tag = group if "/" in group else f"{group}/{name}"
                self._board.add_scalar(tag, value, metrics["step"])

    def streamed(self, event: Streamed) -> None:
        """How far a step is: TensorBoard shows it over the time."""
        self._board.add_scalar("time/share_of_step", event.share, event.step)

    def evaluated(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """The held-out loss, beside that of training."""
        self._board.add_scalar("loss/held_out", loss, step)
        if bits_per_byte is not None:
            self._board.add_scalar("loss/held_out_bits_per_byte", bits_per_byte, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class RunRecord:
    """What rank 0 writes of every step: its figures, goodput among them, and its sequences."""

    def __init__(self, worker: Worker, submission: Submission, step: int) -> None:
        """Goes on after `step`; what a lost run wrote of later ones is dropped."""
        self._worker, self._folder = worker, RunFolder(worker.config.run.dir)
        measured_on = hardware(worker.device.type == "cuda")
        self._goodput = Goodput(self._folder, submission, step, measured_on)
        self._folder.forget_after(step)
        self._writer = MetricsWriter(self._folder, step)
        train, last = worker.config.train, read_lines(self._folder.metrics)[-1:]
        known = last[0].get("tokens") if last and last[0]["step"] == step else None
        self._tokens = step * train.batch_size * train.seq_len if known is None else known

    def take_up(self, seconds: float, saved_at: float) -> None:
        """A step goes on amid which the run was stopped, after so long."""
        self._goodput.take_up(seconds, saved_at)

    def history(self, count: int) -> tuple[list[float | None], int]:
        """The losses of the last steps that were taken, and how many steps were left out."""
        lines = read_lines(self._folder.metrics)
        skipped = lines[-1].get("skipped_steps", 0) if lines else 0
        return [line["loss"] for line in taken(lines)[-count:]], skipped

    def is_evaluated(self, step: int) -> bool:
        return any(line["step"] == step for line in read_lines(self._folder.evaluations))

    def add(self, measured: Metrics, begins: list[int], useful: bool) -> Metrics:
        """A step; `begins` are the tokens at which its sequences begin. All its figures."""
        seconds = measured["step_seconds"] or 0.0
        train, workers = self._worker.config.train, self._worker.config.launch.workers
        counted = self._goodput.count(seconds if useful else 0.0, workers)
        self._tokens += train.batch_size * train.seq_len  # of every length, if there are several
        measured = {**measured, "tokens": self._tokens, **counted}
        metrics = step_metrics(self._worker, measured)
        add_line(self._folder.sequences, {"step": measured["step"], "begins": begins})
        self._writer.write(metrics)
        self._folder.progress.unlink(missing_ok=True)
        return metrics

    def streamed(self, event: Streamed) -> None:
        """How far a step is that takes its time, in progress.json until it is taken."""
        with suppress(OSError):  # a full disk is told of by what must be written
            write_whole(self._folder.progress, json.dumps(asdict(event)) + "\n")
        self._writer.streamed(event)

    def add_evaluation(self, line: Line) -> None:
        """What was held out, after a step."""
        self._folder.add_evaluation(line)
        self._writer.evaluated(line["step"], line["loss"], line["bits_per_byte"])

    def close(self) -> None:
        self._writer.close()


def finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
