"""The run, top to bottom: every worker calls `train` with the same configuration."""

import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor

from models.flops import parameters
from trainer import checkpoint
from trainer.checkpoint import Saved
from trainer.config import Config
from trainer.data import SequenceReader, open_data, training_batches
from trainer.engine import versions
from trainer.evaluate import Evaluation, check_rollouts, evaluate, evaluated_on, final_result
from trainer.events import Ended, Evaluated, Pulse, Report, Started, Stepped, Stop, Stopped, silent
from trainer.fixed import fixed_values
from trainer.footprint import settle
from trainer.goodput import SaveSchedule, Submission, of_this_process
from trainer.guard import RECENT, Guard, RunError, compare_replicas
from trainer.memory import peak_memory_bytes
from trainer.metrics import RunRecord, finite
from trainer.midstep import Midstep, resume, way
from trainer.optim import learning_rate
from trainer.run_folder import RunFolder, truncate_after
from trainer.start import find_checkpoint, note_start, open_folder, redrawn, scan_backends
from trainer.step import accumulate_gradients, build_engine, seed_dropout
from trainer.worker import Worker, multiplies_in_bf16

LOCK_PATIENCE_SECONDS = 10  # for a worker of the start before that is just ending


def train(
    config: Config,
    report: Report = silent,
    pulse: Pulse | None = None,
    submission: Submission | None = None,
) -> None:
    """Train from the newest intact checkpoint of config.run.dir, or from the start, to the end.

    Every rank of the world calls this. Raises ValueError for what a user got wrong, DataError for
    damaged data, RunError where training itself fails, ReplicaError where workers no longer agree;
    the last checkpoint stays good.
    """
    worker = Worker.join(config, report, pulse)
    submission = submission or of_this_process()
    with _held(worker, submission):
        run = _Run(worker, submission)
        run.announce()
        run.evaluate_when_due()  # where an earlier start saved this step, and ended before
        stop = Stop.NO
        while run.step < run.last_step and not stop:
            try:
                asked = run.take_step()
            except RunError:
                run.note_bad_step()
                raise
            except Stopped:  # amid a step, which is saved
                break
            if run.save_due or run.step == run.last_step or asked == Stop.NOW:
                run.save()
                stop = asked
            run.evaluate_when_due()
        run.finish()


@contextmanager
def _held(worker: Worker, submission: Submission) -> Iterator[None]:
    """The run's folder, for this run alone."""
    locks, folder = list[int](), RunFolder(worker.config.run.dir)
    name = submission.name
    most = 0.8 * worker.config.parallel.timeout_seconds  # others wait in a collective
    worker.topology.on_first(lambda: locks.append(folder.hold(LOCK_PATIENCE_SECONDS, name, most)))
    try:
        yield
    finally:
        for lock in locks:
            os.close(lock)


class _Run:
    """One start of a run, on one worker: what it has, and what it does with it."""

    def __init__(self, worker: Worker, submission: Submission) -> None:
        worker, self.expected_bytes = settle(worker)
        config = worker.config
        self.worker, self.config, self.topology = worker, config, worker.topology
        self.folder = RunFolder(config.run.dir)
        if config.evaluate.rollouts:
            self.topology.together(check_rollouts)  # now, not after the last step
        self.data, self.held_out = open_data(worker)
        open_folder(worker)
        saved, mirror = find_checkpoint(worker, self.data)
        self.changed = note_start(worker, self.data)
        worker.pulse.now("building the model")
        self.engine = build_engine(worker, saved)
        self.step = saved.manifest.step if saved else 0  # steps taken
        self.saved_at = (saved.manifest.step, saved.manifest.runs) if saved else None
        self.last_step = config.train.steps
        if config.train.stop_after is not None:
            self.last_step = min(self.last_step, self.step + config.train.stop_after)
        self.evaluated: Evaluation | None = None  # of the last step, if it was
        self.asked: Stop = Stop.NO
        self.recent_seconds: deque[float] = deque(maxlen=20)
        self.record = RunRecord(worker, submission, self.step) if self.topology.first else None
        history = self.topology.gather_objects(self.record and self.record.history(RECENT))[0]
        self.guard = Guard(config, *history)
        self.schedule = SaveSchedule(config.checkpoint)
        self.saver = checkpoint.Saver(
            self.folder, config.checkpoint.keep, self.topology.aside, mirror
        )
        self._enter_stage(saved)

    def _enter_stage(self, saved: Saved | None = None) -> None:
        """What follows from the length that sequences have from here on."""
        now = self.stage = replace(self.worker, config=self.config.at(self.step))
        self.guard.config = now.config
        self.consumed = saved.manifest.sequences_consumed if saved else 0  # of this length
        data = now.config.data
        self.reader = SequenceReader(self.data, now.layout, data.reset_state, data.shift)
        self.midstep = resume(now, saved, self.engine)  # of an earlier start
        if saved and self.midstep and self.record:
            self.record.take_up(
                self.midstep.before + self.midstep.held_up, saved.folder.stat().st_mtime
            )
        done = self.midstep.done if self.midstep else (0, 0)
        if saved and self.midstep is None and saved.manifest.runs:
            self.saved_at = None  # of a step that is begun anew
        self.batches = training_batches(
            self.reader, now.config, self.topology.dp_rank, self.consumed, done
        )

    def announce(self) -> None:
        """Tell what starts, and on which backend."""
        config, layout = self.config, self.stage.layout
        self.worker.tell(
            Started(
                step=self.step,
                steps=config.train.steps,
                parameters=parameters(config.model),
                workers=config.launch.workers,
                dp=config.dp,
                sp=config.parallel.sp,
                shard_tokens=layout.shard_tokens,
                segments=layout.segments,
                expected_bytes=self.expected_bytes,
                scan=scan_backends(self.engine, self.worker),
                changed=tuple(self.changed),
                runs=self.midstep.runs if self.midstep else 0,
            )
        )
        if config.train.dtype == "bf16" and not multiplies_in_bf16(self.worker.device):
            self.worker.warn("this processor has no bf16, which is slow: set train.dtype=fp32")
        if config.at(config.train.steps - 1).train.seq_len < config.train.seq_len:
            told = "train.curriculum lasts all of train.steps: no step has train.seq_len tokens"
            self.worker.warn(told)
        if self.changed and (jump := redrawn(self.folder, config, self.step)):
            self.worker.warn(jump)

    def take_step(self) -> Stop:
        """Read, learn, record; what whoever watches asks for. Stopped amid a streamed one."""
        midstep, self.midstep = self.midstep or Midstep(self.stage, self.step), None
        midstep.asked, midstep.due, midstep.save = self.asked, self.schedule.overdue, self.save
        if self.record:
            midstep.show = self.record.streamed
        started, midstep.began = time.perf_counter(), time.monotonic()
        save_seconds = self.schedule.take_held_up() + midstep.held_up  # before, and amid it so far
        self.worker.pulse.now("reading data")
        batch, _ = self.worker.read_together(lambda: next(self.batches))
        data_seconds = time.perf_counter() - started
        seed_dropout(self.worker, self.step)
        meter, relays = self.topology.sequence.meter, self.topology.sequence.relays
        meter.take()
        relays.take()
        self.worker.pulse.now("computing")
        loss_sum = accumulate_gradients(self.engine, batch.micro_batches, self.stage, midstep)
        saved_amid = self.schedule.take_held_up()
        started, save_seconds = started + saved_amid, save_seconds + saved_amid
        exchange_seconds, _ = meter.take()
        relayed = relays.take().figures()
        losses, memory, asked = self._agree(loss_sum)
        taken = self.guard.takes_loss(losses, self.step + 1, batch.begins)
        rate = learning_rate(self.step, self.config.train.steps, self.config.optim)
        grad_norm = self.engine.step(rate, leave_out=not taken)
        taken = taken and self.guard.takes_norm(grad_norm, self.step + 1, batch.begins)
        self.step += 1
        self.worker.pulse.step = self.step
        train = self.stage.config.train
        self.consumed += train.batch_size
        self.evaluated = None
        every = self.config.guard.checksum_every
        if every and self.step % every == 0:
            self._compare_replicas()
        step_seconds = time.perf_counter() - started + midstep.before
        self.recent_seconds.append(step_seconds)
        steps_left = self.config.train.steps - self.step
        if self.record:
            measured = {
                "step": self.step,
                "seq_len": train.seq_len,
                "loss": finite(float(losses.sum()) / self.topology.dp_size),
                "grad_norm": finite(grad_norm),
                "learning_rate": rate,
                "step_seconds": step_seconds,
                "data_seconds": data_seconds,
                "exchange_seconds": exchange_seconds,
                **relayed,
                "save_seconds": save_seconds,
                "peak_memory_bytes": memory,
                "eta_seconds": statistics.median(self.recent_seconds) * steps_left,
                "skipped_steps": self.guard.skipped,
            }
            metrics = self.record.add(measured, batch.begins, taken)
            # taken up in the next step's exchange, so that all workers stop at the same one
            self.asked = self.worker.tell(Stepped(self.step, self.config.train.steps, metrics))
        if self.config.stage(self.step) != self.config.stage(self.step - 1):
            self.batches.close()
            self._enter_stage()
        return asked

    def save(self, midstep: Midstep | None = None) -> None:
        """A checkpoint of this step, and of the next as far as it is, beside the training."""
        midstep = midstep or Midstep(self.stage, self.step)  # of which nothing is done
        runs = midstep.runs
        if (self.step, runs) == self.saved_at:
            return
        started = time.perf_counter()
        self.worker.pulse.now("saving")
        if self.config.guard.checksum_every:
            self._compare_replicas()  # or a damaged checkpoint would push out a good one
        self._end_save()
        order = self.reader.order(self.config.run.seed, self.config.data.shift)
        manifest = checkpoint.Manifest.of(
            self.topology,
            order.positions(self.consumed),
            step=self.step,
            zero_stage=self.config.deepspeed.zero_stage,
            sequences_consumed=self.consumed,
            data_fingerprint=self.reader.stream.fingerprint,
            versions=versions(),
            fixed=fixed_values(self.config),
            runs=runs,
            way=way(self.stage) if runs else {},
        )
        waited = time.perf_counter() - started
        midstep.hold_up(waited)  # of which its files tell, made before the copy of all the rest
        self.saver.start(manifest, {**midstep.files(self.engine), **self.engine.snapshot()})
        self.saved_at = self.step, runs
        took = time.perf_counter() - started
        self.schedule.saved(took)
        midstep.hold_up(took - waited)

    def _end_save(self, last: bool = False) -> None:
        """Wait for the save before; what went wrong with it is told, or ends the run."""
        self.saver.wait()
        faults = self.topology.gather_objects(self.saver.fault)
        self.saver.fault = None
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return
        goes_on = fault.is_here and self.step < self.last_step  # here, or where it is moved to
        if (last and not goes_on) or self.config.checkpoint.on_failure == "stop":
            raise ValueError(fault.message)
        then = "it goes on from here" if last else "the next save tries again"
        self.worker.warn(f"{fault.message}; {then}")

    def note_bad_step(self) -> None:
        """For the next start, which goes back beyond the checkpoint that led here."""
        self.saver.wait()  # whether it failed or not
        if self.topology.first:
            since = self.guard.bad_since or self.step + 1
            checkpoint.note_bad_steps(self.folder, since, self.config.guard.on_bad_step)

    def _compare_replicas(self) -> None:
        mine = self.engine.weights_checksum(), socket.gethostname()
        sums, hosts = zip(*self.topology.gather_objects(mine), strict=True)
        compare_replicas(list(sums), list(hosts), self.step)

    def evaluate_when_due(self) -> None:
        """Each of the steps after which it is, once."""
        every = self.config.evaluate.every
        if every and self.step and self.step % every == 0:
            done = self.record is not None and self.record.is_evaluated(self.step)
            if not self.topology.gather_objects(done)[0]:
                self.evaluate()

    def evaluate(self) -> None:
        """The held-out loss after this step, if there is held-out data."""
        if self.held_out is None:
            return
        self.worker.pulse.now("evaluating")
        result = self.evaluated = evaluate(self.engine, self.held_out, self.worker)
        if self.record:
            self.record.add_evaluation({"step": self.step, **asdict(result)})
        self.worker.tell(Evaluated(self.step, result.loss, result.bits_per_byte, result.accuracy))

    def finish(self) -> None:
        """After the last step: the result, unless an earlier start has left it."""
        self.worker.pulse.now("ending the last save")
        self._end_save(last=True)
        steps = self.config.train.steps
        if self.step == steps and self.held_out:
            result = self.folder.read_result(steps)
            of = evaluated_on(self.held_out, self.config)
            mine = result is not None and result.get("of") == of
            if not self.topology.gather_objects(mine)[0]:
                if self.evaluated is None:
                    if self.topology.first:  # the line of an earlier result, if there is one
                        truncate_after(self.folder.evaluations, steps - 1)
                    self.evaluate()
                self.worker.pulse.now("making the result")
                self.topology.aside.on_first(self._write_result)  # which may take its time
        if self.record:
            self.record.close()
        self.worker.tell(Ended(self.step, steps))
        self.engine.destroy()
        self.topology.destroy()

    def _write_result(self) -> None:
        assert self.held_out
        assert self.evaluated
        found = final_result(self.evaluated, self.data, self.held_out, self.worker)
        self.folder.write_result({"step": self.config.train.steps, **found})

    def _agree(self, loss_sum: Tensor) -> tuple[Tensor, int, Stop]:
        """Every worker's share of the loss [dp * sp], the highest memory of any, what is asked.

        And whether a checkpoint is due after this step, by rank 0's clock.
        """
        device = self.worker.device
        mine = [
            float(loss_sum),
            float(peak_memory_bytes(device)),
            float(self.asked),
            float(self.schedule.due(self.step + 1)),
            float(self.saver.fault is not None),
        ]
        everyone = self.topology.gather(torch.tensor(mine, dtype=torch.float64, device=device))
        losses, memories, asked, due, failed = everyone.cpu().unbind(1)
        # a step that was saved in its middle leaves a checkpoint of its own
        self.save_due = bool(due[0]) or (self.saved_at is not None and self.saved_at[1] > 0)
        if failed.any():
            self._end_save()
        return losses, int(memories.max()), Stop(int(asked.max()))
