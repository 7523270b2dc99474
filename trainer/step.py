"""What one step computes: an engine made ready for its devices, and the gradients of its batch."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from models.build import build_model
from models.layers import CausalConv, SwiGLU
from trainer.checkpoint import Saved
from trainer.data import MicroBatch
from trainer.engine import Engine
from trainer.loss import summed_loss
from trainer.parallel.recompute import recompute_blocks
from trainer.parallel.sharded import parallelize
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
    parallelize(model, worker.topology, config.parallel.relay_tolerance)
    if config.train.recompute:
        recompute_blocks(model)
    if config.train.compile:
        for module in model.modules():
            if isinstance(module, COMPILED):
                module.compile(dynamic=False)
    return Engine(model, worker, resume)


def seed_dropout(worker: Worker, step: int) -> None:
    """Dropout's masks follow from seed, step and rank alone, so that a resumed run draws the same.

    The ranks of one sequence draw different ones, or each shard would drop the same places.
    """
    config = worker.config
    if config.model.dropout:
        sequence = np.random.SeedSequence([config.run.seed, step, worker.topology.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def accumulate_gradients(engine: Engine, micro_batches: list[MicroBatch], worker: Worker) -> Tensor:
    """Forward and backward of a step; this rank's part of the mean loss, summed over the step.

    A rank's loss is its local sum over the token count of the whole SP group, so that gradients
    summed over SP and averaged over DP are those of the mean.
    """
    train, device = worker.config.train, worker.device
    total = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, start=1):
        readout = partial(
            summed_loss(batch), labels=batch.labels.to(device), tile=train.loss_tile_tokens
        )
        reset = None if batch.reset is None else batch.reset.to(device)
        loss, _ = engine(batch.inputs.to(device), reset=reset, readout=readout, last=True)
        counted = batch.scored_tokens or train.seq_len  # of a sequence, in all shards
        loss = loss / (counted * train.micro_batch_size)
        engine.backward(loss / len(micro_batches), last=number == len(micro_batches))
        total += loss.detach()
    return total / len(micro_batches)
