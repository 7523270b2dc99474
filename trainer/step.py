"""What one step computes: an engine made ready for its devices, and the gradients of its batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from models.build import build_model
from models.layers import CausalConv, SwiGLU
from models.mixer import Carry
from models.stack import Readout
from trainer.checkpoint import WEIGHTS, Saved
from trainer.data import MicroBatch
from trainer.engine import Engine
from trainer.events import Stop, Stopped
from trainer.loss import summed_loss
from trainer.midstep import Midstep
from trainer.parallel.recompute import recompute_blocks
from trainer.parallel.sharded import parallelize
from trainer.reshape import needs_reshaping
from trainer.segments import Position, stream
from trainer.trained import take_weights
from trainer.worker import Worker

# What torch.compile is given: modules whose own code exchanges nothing (what ZeRO-3 gathers for
# them, its hooks gather outside the graph). The compiler may order collectives that do not depend
# on each other differently on each rank, and they would wait for each other for ever.
COMPILED = (SwiGLU, CausalConv, nn.RMSNorm)


def build_engine(worker: Worker, resume: Saved | None = None) -> Engine:
    """The configured model, from its seed or from a checkpoint, sharded and wrapped."""
    config = worker.config
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    if resume and resume.manifest.step == 0 and needs_reshaping(resume.manifest, worker.topology):
        weights = str(resume.folder / WEIGHTS)
        worker.topology.together(lambda: load_model(model, weights))
        resume = None  # no step was taken: what Adam has not yet cannot be cut anew
    elif resume is None and (begun := config.train.init_from):
        worker.topology.together(lambda: take_weights(model, Path(begun)))
    parallelize(model, worker.topology, config.parallel.relay_tolerance)
    if config.train.recompute:
        recompute_blocks(model)
    if config.train.compile:
        for module in model.modules():
            if isinstance(module, COMPILED):
                module.compile(dynamic=False)
    return Engine(model, worker, resume)


def seed_dropout(worker: Worker, *place: int) -> None:
    """Dropout's masks follow from seed, place and rank alone: the same when it is run again.

    `place` is the step; of a streamed sequence its micro-batch and segment too. The ranks of one
    sequence draw different ones, or each shard would drop the same places.
    """
    config = worker.config
    if config.model.dropout:
        sequence = np.random.SeedSequence([config.run.seed, *place, worker.topology.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def accumulate_gradients(
    engine: Engine,
    micro_batches: Iterable[Iterator[MicroBatch]],
    worker: Worker,
    midstep: Midstep | None = None,
) -> Tensor:
    """Forward and backward of a step; this rank's part of the mean loss, summed over the step.

    Of each micro-batch come the segments of `config.plan.reads`, from where the step stands. Raises
    Stopped amid a streamed step, where somebody asks for it, once that is saved.

    A rank's loss is its local sum over the token count of the whole SP group, so that gradients
    summed over SP and averaged over DP are those of the mean.
    """
    now = midstep or Midstep(worker, 0)
    for segments in micro_batches:
        loss = stream(worker.config.plan, _Work(engine, now, segments), now.here)
        now.next_micro_batch(loss)
    return now.total.to(worker.device)


@dataclass
class _Work:
    """A micro-batch on its way through the model, there and back."""

    engine: Engine
    now: Midstep
    segments: Iterator[MicroBatch]

    def take(self, here: Position | None) -> MicroBatch:
        """The next one; all workers raise the same DataError where one cannot read."""
        worker, now = self.now.worker, self.now
        if worker.config.plan.segments == 1:  # read, and found good, with the step's others
            return next(self.segments)
        now.tell()
        batch, (stop, due) = worker.read_together(
            lambda: next(self.segments), now.asked == Stop.NOW, now.due()
        )
        if here and (stop or due):
            now.save(now)
            if stop:
                raise Stopped
        return batch

    def run(
        self, segment: int, batch: MicroBatch, carry: list[Carry] | None, answer: bool
    ) -> tuple[Tensor, list[Carry]]:
        """A segment's share of the mean loss, where it is asked for, and the carry that leaves."""
        worker = self.now.worker
        config, device = worker.config, worker.device
        segments, train = config.plan.segments, config.train
        if segments > 1:
            seed_dropout(worker, self.now.step, self.now.micro_batch, segment)
            worker.pulse.now(f"computing segment {segment + 1} of {segments}")
        readout: Readout | None = None  # on the way there the carry alone is wanted
        if answer:
            labels = batch.labels.to(device)
            readout = partial(summed_loss(batch), labels=labels, tile=train.loss_tile_tokens)
        reset = None if batch.reset is None else batch.reset.to(device)
        last = segment == segments - 1
        loss, carry = self.engine(
            batch.inputs.to(device), carry, reset=reset, readout=readout, last=last
        )
        if not answer:
            return torch.zeros(()), carry
        counted = batch.scored_tokens or train.seq_len  # of a sequence, in all shards
        return loss / (counted * train.micro_batch_size * config.accumulation), carry

    def backward(self, loss: Tensor, done: bool) -> None:
        last = self.now.micro_batch == self.now.worker.config.accumulation - 1
        self.engine.backward(loss, last=done and last)
