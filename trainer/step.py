"""What one step computes: an engine made ready for its devices, and the gradients of its batch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.build import build_model
from models.layers import CausalConv, SwiGLU
from models.mixer import Carry
from models.stack import Readout
from trainer.checkpoint import Saved
from trainer.data import MicroBatch
from trainer.engine import Engine
from trainer.events import Stop, Streamed
from trainer.loss import summed_loss
from trainer.parallel.recompute import recompute_blocks
from trainer.parallel.sharded import parallelize
from trainer.segments import stream
from trainer.trained import take_weights
from trainer.worker import Worker

TELL_SECONDS = 2.0  # at least, between two reports of how far a streamed step is
# What torch.compile is given: modules whose own code exchanges nothing (what ZeRO-3 gathers for
# them, its hooks gather outside the graph). The compiler may order collectives that do not depend
# on each other differently on each rank, and they would wait for each other for ever.
COMPILED = (SwiGLU, CausalConv, nn.RMSNorm)


def build_engine(worker: Worker, resume: Saved | None = None) -> Engine:
    """The configured model, from its seed or from a checkpoint, sharded and wrapped."""
    config = worker.config
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    if resume is None and (begun := config.train.init_from):
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
    micro_batches: Sequence[Iterator[MicroBatch]],
    worker: Worker,
    way: "OnTheWay | None" = None,
) -> Tensor:
    """Forward and backward of a step; this rank's part of the mean loss, summed over the step.

    Of each micro-batch come the segments of `config.plan.reads`. Raises Stopped amid a streamed
    step, where `way` hears that somebody asks for it.

    A rank's loss is its local sum over the token count of the whole SP group, so that gradients
    summed over SP and averaged over DP are those of the mean.
    """
    total = torch.zeros((), device=worker.device)
    way = way or OnTheWay(worker, 0)
    for number, segments in enumerate(micro_batches, start=1):
        done = number == len(micro_batches)
        pass_ = _Pass(engine, way, number, len(micro_batches), done)
        total += stream(
            worker.config.plan, partial(pass_.take, segments), pass_.run, pass_.backward
        )
    return total


@dataclass
class OnTheWay:
    """A streamed step, which can take hours: how far it is, and whether it is to be given up."""

    worker: Worker
    step: int  # taken before it
    asked: Stop = Stop.NO
    runs: int = 0  # of a segment
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def tell(self) -> None:
        """Before each run of a segment; rank 0 reports now and then, and hears what is asked."""
        now, config = time.monotonic(), self.worker.config
        if self.runs and now - self.told > TELL_SECONDS:
            self.told, of = now, len(config.plan.reads) * config.accumulation
            event = Streamed(self.step + 1, self.runs, of, now - self.began)
            self.asked = self.worker.tell(event)
        self.runs += 1


@dataclass
class _Pass:
    """A micro-batch on its way through the model, there and back."""

    engine: Engine
    way: OnTheWay
    number: int  # of the micro-batch
    micro_batches: int
    last: bool  # whether no other micro-batch of the step follows

    def take(self, segments: Iterator[MicroBatch]) -> MicroBatch:
        """The next one; all workers raise the same DataError where one cannot read."""
        worker = self.way.worker
        if worker.config.plan.segments == 1:  # read, and found good, with the step's others
            return next(segments)
        self.way.tell()
        return worker.read_together(lambda: next(segments), self.way.asked)

    def run(
        self, segment: int, batch: MicroBatch, carry: list[Carry] | None, answer: bool
    ) -> tuple[Tensor, list[Carry]]:
        """A segment's share of the mean loss, where it is asked for, and the carry that leaves."""
        worker = self.way.worker
        config, device = worker.config, worker.device
        segments, train = config.plan.segments, config.train
        if segments > 1:
            seed_dropout(worker, self.way.step, self.number, segment)
            worker.pulse.now(f"computing segment {segment + 1} of {segments}")
        readout: Readout = _nothing
        if answer:
            labels = batch.labels.to(device)
            readout = partial(summed_loss(batch), labels=labels, tile=train.loss_tile_tokens)
        reset = None if batch.reset is None else batch.reset.to(device)
        last = segment == segments - 1
        loss, carry = self.engine(
            batch.inputs.to(device), carry, reset=reset, readout=readout, last=last
        )
        counted = batch.scored_tokens or train.seq_len  # of a sequence, in all shards
        return loss / (counted * train.micro_batch_size * self.micro_batches), carry

    def backward(self, loss: Tensor, done: bool) -> None:
        self.engine.backward(loss, last=done and self.last)


def _nothing(hidden: Tensor, weight: Tensor) -> Tensor:
    """No loss: on the way there only the carry is wanted."""
    return hidden.new_zeros(())
