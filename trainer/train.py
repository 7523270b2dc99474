"""The run, top to bottom: every worker calls `train` with the same configuration."""

import math
import statistics
import time
import warnings
from collections import deque
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from data_prep.schema import TOKENIZER_NAME
from models.flops import parameters
from models.scan import choose_backend
from trainer import checkpoint
from trainer.checkpoint import Saved
from trainer.config import Config, dump_config
from trainer.data import (
    DataError,
    MicroBatch,
    Position,
    SequenceReader,
    open_split,
    training_batches,
)
from trainer.engine import versions
from trainer.evaluate import Evaluation, evaluate, final_result
from trainer.events import Ended, Evaluated, Report, Started, Stepped
from trainer.memory import peak_memory_bytes
from trainer.metrics import MetricsWriter, step_metrics
from trainer.optim import learning_rate
from trainer.run_folder import RunFolder, truncate_after
from trainer.step import accumulate_gradients, build_engine, seed_dropout
from trainer.worker import Worker


class RunError(RuntimeError):
    """The run itself cannot go on (a loss that is not finite): starting again would not help."""


def train(config: Config, report: Report) -> None:
    """Train from the newest intact checkpoint of config.run.dir, or from the start, to the end.

    Every rank of the world calls this. Raises ValueError for what a user got wrong, DataError for
    damaged data, RunError where training itself fails; the last checkpoint stays good.
    """
    run = _Run(Worker.join(config, report))
    run.announce()
    last_step = config.train.steps
    if config.train.stop_after is not None:
        last_step = min(last_step, run.step + config.train.stop_after)
    stop = False
    while run.step < last_step and not stop:
        stop = run.take_step()
        if run.step % config.checkpoint.every == 0 or run.step == last_step or stop:
            run.save()
        if config.evaluate.every and run.step % config.evaluate.every == 0:
            run.evaluate()
    run.finish()


class _Run:
    """One start of a run, on one worker: what it has, and what it does with it."""

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.worker, self.config, self.topology = worker, config, worker.topology
        self.folder = RunFolder(config.run.dir)
        self.reader = _reader(worker, "train")
        self.held_out = _reader(worker, "held_out") if config.evaluate.sequences else None
        self._open_folder()
        saved = checkpoint.find(self.folder, self.topology, worker.warn)
        self.engine = build_engine(worker, saved)
        self.step, self.consumed = 0, 0  # steps taken; sequences read for them
        if saved:
            self._check_resume(saved)
            self.step, self.consumed = saved.manifest.step, saved.manifest.sequences_consumed
        self.batches = training_batches(self.reader, config, self.topology.dp_rank, self.consumed)
        self.evaluated: Evaluation | None = None  # of the last step, if it was
        self.asked_to_stop = False
        self.recent_seconds: deque[float] = deque(maxlen=20)
        self.writer: MetricsWriter | None = None
        if self.topology.first:
            self.writer = MetricsWriter(self.folder, self.step)
            truncate_after(self.folder.evaluations, self.step)

    def announce(self) -> None:
        """Tell what starts, and on which backend."""
        config, layout = self.config, self.worker.layout
        self.worker.tell(
            Started(
                step=self.step,
                steps=config.train.steps,
                parameters=parameters(config.model),
                workers=config.launch.workers,
                dp=config.dp,
                sp=config.parallel.sp,
                shard_tokens=layout.shard_tokens,
                scan=self._scan_backends(),
            )
        )

    def _scan_backends(self) -> str:
        """What runs the model's scans; the reason of a slow one is told."""
        dtype = torch.bfloat16 if self.config.train.dtype == "bf16" else torch.float32
        with warnings.catch_warnings(record=True) as caught:
            backends = {
                choose_backend("auto", recurrence, self.worker.device.type, dtype)
                for recurrence in self.engine.recurrences()
            }
        for warning in caught:
            self.worker.warn(str(warning.message))
        return " and ".join(sorted(backends)) or "no"

    def take_step(self) -> bool:
        """Read, learn, record; whether any worker was asked to stop."""
        started = time.perf_counter()
        micro_batches = self._read()
        data_seconds = time.perf_counter() - started
        seed_dropout(self.worker, self.step)
        meter = self.topology.sequence.meter
        meter.take()
        loss_sum = accumulate_gradients(self.engine, micro_batches, self.worker)
        exchange_seconds, _ = meter.take()
        loss, memory, stop = self._agree(loss_sum)
        rate = learning_rate(self.step, self.config.train.steps, self.config.optim)
        grad_norm = self.engine.step(rate)
        if not math.isfinite(grad_norm):
            raise RunError(_not_finite("gradient norm", grad_norm, self.step + 1))
        self.step += 1
        self.consumed += self.config.train.batch_size
        self.evaluated = None
        step_seconds = time.perf_counter() - started
        self.recent_seconds.append(step_seconds)
        steps_left = self.config.train.steps - self.step
        if self.writer:
            metrics = step_metrics(
                self.worker,
                {
                    "step": self.step,
                    "tokens": self.consumed * self.config.train.seq_len,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "step_seconds": step_seconds,
                    "data_seconds": data_seconds,
                    "exchange_seconds": exchange_seconds,
                    "peak_memory_bytes": memory,
                    "eta_seconds": statistics.median(self.recent_seconds) * steps_left,
                },
            )
            self.writer.write(metrics)
            # taken up in the next step's exchange, so that all workers stop at the same one
            self.asked_to_stop = self.worker.tell(
                Stepped(self.step, self.config.train.steps, metrics)
            )
        return stop

    def save(self) -> None:
        """A checkpoint of this step."""
        position = Position(self.consumed, self.reader.sequences)
        manifest = checkpoint.Manifest(
            step=self.step,
            world_size=self.topology.world_size,
            dp=self.topology.dp_size,
            sp=self.topology.sp_size,
            zero_stage=self.config.deepspeed.zero_stage,
            epoch=position.epoch,
            consumed_in_epoch=position.consumed_in_epoch,
            sequences_consumed=self.consumed,
            data_fingerprint=self.reader.stream.info.fingerprint,
            versions=versions(),
        )
        keep = self.config.checkpoint.keep
        checkpoint.save(self.folder, manifest, self.engine.save, keep, self.topology)

    def evaluate(self) -> None:
        """The held-out loss after this step, if there is held-out data."""
        if self.held_out is None:
            return
        result = self.evaluated = evaluate(self.engine, self.held_out, self.worker)
        if self.topology.first:
            self.folder.add_evaluation({"step": self.step, **asdict(result)})
        self.worker.tell(Evaluated(self.step, result.loss, result.bits_per_byte))

    def finish(self) -> None:
        """After the last step: the result, unless an earlier start has left it."""
        if self.writer:
            self.writer.close()
        steps = self.config.train.steps
        if self.step == steps and self.held_out:
            known = self.topology.gather_objects(self.folder.read_result(steps) is not None)[0]
            if not known:
                if self.evaluated is None:
                    self.evaluate()
                if self.topology.first and self.evaluated:
                    result = final_result(self.evaluated, self.reader, self.held_out)
                    self.folder.write_result({"step": steps, **result})
        self.worker.tell(Ended(self.step, steps))
        self.engine.destroy()
        self.topology.destroy()

    def _open_folder(self) -> None:
        """Make the folder and what a reader of the run needs besides its checkpoints."""
        folder, stream = self.folder, self.reader.stream

        def write() -> None:
            try:
                folder.checkpoints.mkdir(parents=True, exist_ok=True)
                dump_config(self.config, folder.config)
                if stream.info.tokenizer != "bytes":
                    folder.tokenizer.write_bytes((stream.folder / TOKENIZER_NAME).read_bytes())
            except OSError as error:
                reason = f"{error.strerror}: {error.filename}"
                raise ValueError(f"run.dir {folder.path} cannot be written: {reason}") from None

        def check() -> None:
            if not folder.path.is_dir():
                raise ValueError(
                    f"run.dir {folder.path} is not visible to worker {self.topology.rank}: "
                    f"use a folder that all workers share"
                )

        self.topology.on_first(write)
        self.topology.together(check)

    def _check_resume(self, saved: Saved) -> None:
        manifest, stream, config = saved.manifest, self.reader.stream, self.config
        if manifest.step > config.train.steps:
            raise ValueError(
                f"train.steps {config.train.steps} is below step {manifest.step}, which the run in "
                f"{config.run.dir} has reached: raise it, or choose another run.dir"
            )
        if manifest.data_fingerprint != stream.info.fingerprint:
            raise ValueError(
                f"data.path {stream.folder} is not the data that the run was trained on: its order "
                f"would be another; give back the same data, or choose another run.dir"
            )

    def _read(self) -> list[MicroBatch]:
        """This rank's micro-batches; all workers raise the same DataError where one cannot read."""
        batch, fault = None, None
        try:
            batch = next(self.batches)
        except DataError as error:
            fault = str(error)
        failed = torch.tensor([int(batch is None)], device=self.worker.device)
        if self.topology.gather(failed).any():
            faults = sorted({f for f in self.topology.gather_objects(fault) if f})
            raise DataError("\n".join(faults))
        assert batch is not None
        return batch

    def _agree(self, loss_sum: Tensor) -> tuple[float, int, bool]:
        """The global mean loss, the highest memory of any worker, whether any was asked to stop.

        Every worker raises RunError together where the loss is not finite.
        """
        device = self.worker.device
        mine = [float(loss_sum), float(peak_memory_bytes(device)), float(self.asked_to_stop)]
        everyone = self.topology.gather(torch.tensor(mine, dtype=torch.float64, device=device))
        losses, memories, stops = everyone.unbind(1)
        loss = float(losses.sum()) / self.topology.dp_size
        if not math.isfinite(loss):
            raise RunError(_not_finite("loss", loss, self.step + 1))
        return loss, int(memories.max()), bool(stops.any())


def _reader(worker: Worker, split: str) -> SequenceReader:
    """This rank's shards of a split; what is wrong with the data is told by all workers."""
    config = worker.config
    stream = worker.topology.together(partial(open_split, config, split))
    shift = split == "train" and config.data.shift
    return SequenceReader(stream, worker.layout, config.data.reset_state, shift)


def _not_finite(figure: str, value: float, step: int) -> str:
    return (
        f"the {figure} is {value} at step {step}: nothing was saved since the last checkpoint; "
        f"lower optim.learning_rate or optim.clip, or lengthen optim.warmup_steps, and start again"
    )
