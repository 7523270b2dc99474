"""What a step will take of a worker's memory, and the segments that fit where none are named.

Nothing here is a formula of a mixer: each kind of block runs twice on a short sequence, and what
its backward would need is counted.
"""

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.block import Block
from models.config import ModelConfig
from models.flops import parameters
from models.mixer import Carry
from trainer.checks import length_faults
from trainer.config import AUTO, Config
from trainer.worker import Worker

SHORT, LONG = 512, 1024  # tokens of the trials: what grows between them grows with every token
FASTEST = 32_768  # tokens of a worker's segment beyond which none was faster (bench_context)
LEAST = 256  # below which the calls cost more than what they compute
PLANNED = 0.6  # of a worker's memory: allocators leave gaps, and others live there too
PROCESS = 700 << 20  # of Python, torch and DeepSpeed, before a model
CACHE_COPIES = 4  # of full attention's keys and values, while they are streamed
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker."""

    weights: int  # with their gradients and the optimizer's state
    token: float  # what the backward of a token needs, in all layers
    block: float  # of that, the most of one layer: about what its backward makes besides
    carry: float  # what a segment leaves to the next one, of a sequence
    past: float  # what it leaves besides for every token before its end: full attention's cache
    logits: int

    def of_step(self, config: Config) -> int:
        """Of the whole process at its highest: what is kept, the carries, and the rest."""
        train, plan = config.train, config.plan
        passed = 0.0
        if plan.segments > 1:
            cached = self.past * train.seq_len / config.parallel.sp  # each rank has its heads
            passed = self.carry * plan.segments + CACHE_COPIES * cached
        kept = self._tokens(config) * (self.token * plan.keep + self.block)
        passed *= train.micro_batch_size
        return round(PROCESS + self.weights + kept + passed + self.logits)

    def of_segment(self, config: Config) -> float:
        """What keeping one more segment takes."""
        return self._tokens(config) * self.token + self.carry * config.train.micro_batch_size

    @staticmethod
    def _tokens(config: Config) -> int:
        return (
            config.layout().shard_tokens
            * config.train.micro_batch_size
            * config.model.tokens_of_input
        )


def settle(worker: Worker) -> tuple[Worker, int]:
    """The worker with its segments chosen, and the bytes that a step is expected to take.

    Raises ValueError, on every worker, where that is more than there is. Every worker calls it.
    """
    topology = worker.topology
    memory = memory_of(worker)
    found = topology.together(lambda: footprint(worker.config, worker.device))
    chosen = topology.together(lambda: segmented(worker.config, found, memory))
    # of one worker's figures, should their libraries differ
    train, expected = topology.gather_objects((chosen.train, found.of_step(chosen)))[0]
    config = replace(worker.config, train=train)
    if expected > memory:
        raise ValueError(
            f"a step takes about {expected / 2**30:.1f} GiB of a worker, which has "
            f"{memory / 2**30:.1f}: set train.segment_len=auto, which streams the sequence in "
            f"segments that fit, train.recompute=true, or more workers of parallel.sp"
        )
    return replace(worker, config=config), expected


def memory_of(worker: Worker) -> int:
    """Bytes that the worker with the least of them has: of its GPU, or its share of a machine's."""
    if worker.device.type == "cuda":
        mine = torch.cuda.get_device_properties(worker.device).total_memory
    else:
        mine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        for limit in (Path(name) for name in GROUP_LIMITS):  # of a container
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                mine = min(mine, int(text))
    everyone = worker.topology.gather_objects((socket.gethostname(), mine))
    hosts = [host for host, _ in everyone]
    shared = worker.device.type == "cpu"
    return min(each // (hosts.count(host) if shared else 1) for host, each in everyone)


def segmented(config: Config, found: Footprint, memory: int) -> Config:
    """The configuration with `train.segment_len` chosen, for a worker with so many bytes.

    The whole sequence where it fits; else the longest segments that do, up to the fastest, and as
    many of the last ones kept as there is room for. It follows from nothing that changes between
    two starts on the same machines. Raises ValueError where not even short segments fit.
    """
    if config.train.segment_len != AUTO:
        return config
    room = PLANNED * memory
    for cut in _cuts(config):
        left = room - found.of_step(cut)
        if left >= 0:
            return _keeping(cut, int(left // found.of_segment(cut)), found)
    raise ValueError(
        f"train.segment_len: not even segments of {LEAST} tokens a worker fit in its "
        f"{memory / 2**30:.1f} GiB, of which {PLANNED:.0%} are planned for; weights and the "
        f"optimizer's state take {found.weights / 2**30:.1f}: use fewer workers on a machine, "
        f"deepspeed.zero_stage, a smaller model or train.micro_batch_size"
    )


def _cuts(config: Config) -> list[Config]:
    """The whole sequence, then shorter and shorter segments, equally long but for the last."""
    train, sp = config.train, config.parallel.sp
    cuts = [replace(config, train=replace(train, segment_len=None))]
    tokens = FASTEST
    while tokens >= LEAST:
        inputs = max(1, tokens // (train.micro_batch_size * config.model.tokens_of_input))
        segments = -(-train.seq_len // (inputs * sp))
        segment_len = -(-train.seq_len // (segments * sp)) * sp
        cut = replace(config, train=replace(train, segment_len=min(segment_len, train.seq_len)))
        if not any(length_faults(cut)):
            cuts.append(cut)
        tokens //= 2
    return cuts


def _keeping(cut: Config, more: int, found: Footprint) -> Config:
    """So many more of the last segments kept, where that is sound and saves something."""
    if found.past or cut.deepspeed.zero_stage == 3:  # each would keep a cache; see train.checks
        return cut
    keep = min(cut.plan.keep + more, cut.plan.segments)
    return replace(cut, train=replace(cut.train, keep_segments=keep))


def footprint(config: Config, device: torch.device) -> Footprint:
    """Of the configured model, on one worker of the configured world."""
    model, train = config.model, config.train
    size = 2 if train.dtype == "bf16" else 4
    dtype = torch.bfloat16 if size == 2 else torch.float32
    layers = model.layer_mixers()
    trials = {kind: _trial(model, kind, device, dtype) for kind in set(layers)}
    tokens, carries, pasts = zip(*(trials[kind] for kind in layers), strict=True)
    kept = float(model.width * size * len(layers)) if train.recompute else sum(tokens)
    sharers = config.launch.workers if config.deepspeed.zero_stage else 1
    # weights, gradients and their sums stay whole but at stages 2 and 3; Adam's two numbers
    # and, in bf16, the fp32 weights are shared from stage 1 on
    whole, shared = (4, 12) if size == 2 else (8, 8)
    return Footprint(
        weights=round(parameters(model) * (whole + shared / sharers)),
        token=kept + (max(tokens) if train.recompute else 0.0),
        block=max(tokens),
        carry=sum(carries),
        past=sum(pasts),
        logits=3 * 4 * model.vocab_size * train.loss_tile_tokens,
    )


def _trial(
    model: ModelConfig, kind: str, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Of one block: bytes kept for the backward of a token; of its carry, and by token before."""
    with torch.random.fork_rng(devices=[]):
        block = Block(model, kind).to(device, dtype)
    kept, left = [], []
    for steps in (SHORT, LONG):
        x = torch.zeros(1, steps, model.width, device=device, dtype=dtype, requires_grad=True)
        bytes_kept, (_, carry) = _kept(block, x)
        kept.append(bytes_kept)
        left.append(sum(each.nbytes for each in carry))
    past = (left[1] - left[0]) / (LONG - SHORT)
    return (kept[1] - kept[0]) / (LONG - SHORT), left[0] - past * SHORT, past


def _kept(block: Block, x: Tensor) -> tuple[int, tuple[Tensor, Carry]]:
    """Bytes that its backward would need, and what it gives."""
    found: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(note, lambda saved: saved):
        result = block(x)
    return sum(found.values()), result
