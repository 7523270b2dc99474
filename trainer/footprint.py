"""What a step will take of a worker's memory, and the segments that fit where none are named.

Nothing here is a formula of a mixer: each kind of block runs twice on a short sequence, and what
its backward would need is counted.
"""

import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.block import Block
from models.flops import parameters
from models.mixer import Carry
from trainer.checks import length_faults
from trainer.config import Config
from trainer.layout import AUTO, even_segments
from trainer.parallel.ulysses import head_copies
from trainer.worker import Worker

SHORT = 512  # tokens of a trial, and twice that: what grows between them grows with every token
FASTEST = 32_768  # tokens of a worker's segment; bench_context has the speed by their length
LEAST = 256  # below which the calls cost more than what they compute
PLANNED = 0.6  # of a worker's memory: allocators leave gaps, and others live there too
PROCESS = 700 << 20  # of Python, torch and DeepSpeed, before a model
CACHE_COPIES = 4  # of full attention's keys and values, while they are streamed
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker."""

    process: int  # of Python and the libraries, before a model
    weights: int  # with their gradients and the optimizer's state
    token: float  # what the backward of a token needs, in all layers
    block: float  # of that, the most of one layer: about what its backward makes besides
    carry: float  # what a segment leaves to the next one, of a sequence
    past: float  # what it leaves besides for every token before its end: full attention's cache
    logits: int

    def of_step(self, config: Config) -> int:
        """Of the whole process at its highest: what is kept, the carries, and the rest."""
        train, plan = config.train, config.plan
        cached, passed, kept = self.past * train.seq_len * config.model.tokens_of_input, 0.0, 1
        if plan.truncate:  # one after another, and no gradient comes back
            passed = 2 * (self.carry + cached)
        elif plan.segments > 1:
            # once more while they are saved
            passed, kept = 2 * self.carry * plan.segments + CACHE_COPIES * cached, plan.keep
        activations = self._tokens(config) * (self.token * kept + self.block)
        passed *= train.micro_batch_size
        return round(self.process + self.weights + activations + passed + self.logits)

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

    It is told where that is more than there is. Every worker calls it.
    """
    topology = worker.topology
    memory = memory_of(worker)
    found = topology.together(lambda: footprint(worker.config, worker.device))
    chosen = topology.together(lambda: segmented(worker.config, found, memory))
    # of one worker's figures, should their libraries differ
    train, expected = topology.gather_objects((chosen.train, found.of_step(chosen)))[0]
    if expected > memory:
        worker.warn(
            f"a step is expected to take {expected / 2**30:.1f} GiB of a worker, which has "
            f"{memory / 2**30:.1f}, {found.weights / 2**30:.1f} of them for weights and the "
            f"optimizer's state: should it not fit, set train.segment_len=auto, which streams the "
            f"sequence in segments that do, train.recompute=true, or more workers"
        )
    return replace(worker, config=replace(worker.config, train=train)), expected


def memory_of(worker: Worker) -> int:
    """Bytes that the worker with the least of them has: of its GPU, or its share of a machine's."""
    if worker.device.type == "cuda":
        mine = torch.cuda.get_device_properties(worker.device).total_memory
    else:
        mine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        for limit in (Path(name) for name in GROUP_LIMITS):  # of a container
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                mine = min(mine, int(text))
    own, _ = resource.getrlimit(resource.RLIMIT_DATA)  # of this process, as a comparison sets it
    own = mine if own == resource.RLIM_INFINITY or worker.device.type == "cuda" else own
    everyone = worker.topology.gather_objects((socket.gethostname(), mine, own))
    hosts = [host for host, _, _ in everyone]
    shared = worker.device.type == "cpu"
    least = min(min(m // (hosts.count(host) if shared else 1), own) for host, m, own in everyone)
    # to the next sixteenth of a power of two: what is chosen by it is to stay, though another start
    # finds some megabytes less
    grain = max(1, 1 << (least.bit_length() - 5))
    return least // grain * grain


def segmented(config: Config, found: Footprint, memory: int) -> Config:
    """The configuration with `train.segment_len` chosen, for a worker with so many bytes.

    The whole sequence where it fits; else the longest segments that do, up to the fastest, and as
    many of the last ones kept as there is room for. Raises ValueError where not even short
    segments fit.
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
    train = config.train
    cuts = [replace(config, train=replace(train, segment_len=None))]
    tokens = FASTEST
    while tokens >= LEAST:
        most = max(1, tokens // (train.micro_batch_size * config.model.tokens_of_input))
        segment_len = even_segments(train.seq_len, most, config.parallel.sp)
        cut = replace(config, train=replace(train, segment_len=segment_len))
        if segment_len and not any(
            fault for each in _lengths(cut) for fault in length_faults(each)
        ):
            cuts.append(cut)
        tokens //= 2
    return cuts


def _lengths(config: Config) -> Iterator[Config]:
    """The run at each length that its sequences will have."""
    yield config
    yield config.held_out
    for stage in range(len(config.train.curriculum)):
        yield config.at(stage * config.train.curriculum_steps)


def _keeping(cut: Config, more: int, found: Footprint) -> Config:
    """So many more of the last segments kept, where that is sound and saves something."""
    if found.past or cut.deepspeed.zero_stage == 3:  # each would keep a cache; see train.checks
        return cut
    keep = min(cut.plan.keep + more, cut.plan.segments)
    return replace(cut, train=replace(cut.train, keep_segments=keep))


def footprint(config: Config, device: torch.device) -> Footprint:
    """Of the configured model, on one worker of the configured world."""
    model, train, stage = config.model, config.train, config.deepspeed.zero_stage
    size = 2 if train.dtype == "bf16" else 4
    layers = model.layer_mixers()
    trials = {kind: _trial(config, kind, device) for kind in set(layers)}
    tokens, carries, pasts = zip(*(trials[kind] for kind in layers), strict=True)
    kept = float(model.width * size * len(layers)) if train.recompute else sum(tokens)
    # Adam's two numbers, and fp32 weights beside those in bf16, are shared out from ZeRO stage 1
    # on, gradients from 2 on, weights at 3
    state = 12 if size == 2 else 8
    shared = [state, 4, size][:stage]
    whole = [state, 4, size][stage:]
    numbers = sum(whole) + sum(shared) / config.launch.workers
    sp = config.parallel.sp
    copies = head_copies(model.heads, model.shared_kv_heads, sp) if any(pasts) else 1
    return Footprint(
        process=PROCESS if device.type == "cpu" else 0,
        weights=round(parameters(model) * numbers),
        token=kept + (max(tokens) if train.recompute else 0.0),
        block=max(tokens),
        carry=sum(carries),
        past=sum(pasts) * copies / sp,
        logits=3 * 4 * model.vocab_size * train.loss_tile_tokens,
    )


def _trial(config: Config, kind: str, device: torch.device) -> tuple[float, float, float]:
    """Of one block: bytes kept for the backward of a token; of its carry, and by token before."""
    model = config.model
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    with torch.random.fork_rng(devices=[]):
        block = Block(model, kind).to(device, dtype)
    short = max(SHORT, 2 * model.halo_width)  # a window shows what it keeps beyond itself
    kept, left = [], []
    for steps in (short, 2 * short):
        x = torch.zeros(1, steps, model.width, device=device, dtype=dtype, requires_grad=True)
        reset = torch.zeros(1, steps, device=device, dtype=torch.uint8)
        bytes_kept, carry = _kept(block, x, reset if config.data.reset_state else None)
        kept.append(bytes_kept)
        left.append(sum(each.nbytes for each in carry))
    past = (left[1] - left[0]) / short
    return (kept[1] - kept[0]) / short, left[0] - past * short, past


def _kept(block: Block, x: Tensor, reset: Tensor | None) -> tuple[int, Carry]:
    """Bytes that its backward would need, and the carry that leaves it."""
    found: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(note, lambda saved: saved):
        _, carry = block(x, reset=reset)
    return sum(found.values()), carry
