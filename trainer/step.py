"""What one step computes: a model made ready for its devices, and the gradients of its batch."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from models.layers import CausalConv, SwiGLU
from models.lm import LanguageModel
from trainer.config import Config
from trainer.data import MicroBatch
from trainer.engine import Engine
from trainer.loss import scored_cross_entropy, summed_cross_entropy
from trainer.parallel.recompute import recompute_blocks
from trainer.parallel.sharded import parallelize
from trainer.parallel.topology import Topology

# What torch.compile is given: modules whose own code exchanges nothing (what ZeRO-3 gathers for
# them, its hooks gather outside the graph). The compiler may order collectives that do not depend
# on each other differently on each rank, and they would wait for each other for ever.
COMPILED = (SwiGLU, CausalConv, nn.RMSNorm)


def prepare_model(model: LanguageModel, config: Config, topology: Topology) -> None:
    """What is done to a model from outside, before DeepSpeed wraps it."""
    parallelize(model, topology)
    if config.train.recompute:
        recompute_blocks(model)
    if config.train.compile:
        for module in model.modules():
            if isinstance(module, COMPILED):
                module.compile(dynamic=False)


def seed_dropout(config: Config, step: int, rank: int) -> None:
    """Dropout's masks follow from seed, step and rank alone, so that a resumed run draws the same.

    The ranks of one sequence draw different ones, or each shard would drop the same places.
    """
    if config.model.dropout:
        sequence = np.random.SeedSequence([config.run.seed, step, rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def accumulate_gradients(
    engine: Engine, micro_batches: list[MicroBatch], config: Config, device: torch.device
) -> Tensor:
    """Forward and backward of a step; this rank's part of the mean loss, summed over the step.

    A rank's loss is its local sum over the token count of the whole SP group, so that gradients
    summed over SP and averaged over DP are those of the mean.
    """
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        readout = partial(
            summed_cross_entropy if batch.scored_tokens is None else scored_cross_entropy,
            labels=batch.labels.to(device),
            tile=config.train.loss_tile_tokens,
        )
        reset = None if batch.reset is None else batch.reset.to(device)
        loss, _ = engine(batch.tokens.to(device), reset=reset, readout=readout, last=True)
        counted = batch.scored_tokens or config.train.seq_len  # of a sequence, in all shards
        loss = loss / (counted * config.train.micro_batch_size)
        engine.backward(loss)
        total += loss.detach()
    return total / len(micro_batches)
