"""What a run costs: training steps on all workers, or reading and continuing a text on one."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, repeat

import torch
from torch import Tensor

from models.build import build_model
from models.config import ModelConfig
from models.mixer import Carry
from models.stack import Stack
from trainer.config import Config
from trainer.data import MicroBatch
from trainer.footprint import settle
from trainer.layout import AUTO
from trainer.memory import peak_memory_bytes
from trainer.metrics import peak_flops
from trainer.step import accumulate_gradients, build_engine
from trainer.worker import Worker, multiplies_in_bf16


@dataclass(frozen=True)
class TrainingCost:
    """Of a worker. Memory is what came on top of the idle process."""

    step_seconds: list[float]  # wall time of each timed step, to the end of the slowest worker's
    exchange_seconds: float  # of a step
    exchange_bytes: int  # that this worker sends in a step
    peak_memory_bytes: int
    idle_memory_bytes: int
    peak_flops: float | None  # of the device, where it is known
    limit_flops: float  # per second, what large matrix products reach while all workers make them


@dataclass(frozen=True)
class ReadingCost:
    """Of one worker that reads a prompt and continues it."""

    prefill_seconds: float
    decode_tokens_per_second: float
    carry_bytes: int  # kept of the text between tokens
    peak_memory_bytes: int
    idle_memory_bytes: int


def random_batches(worker: Worker) -> list[Iterator[MicroBatch]]:
    """A step's micro-batches of random tokens, or frames, of this rank's shape, for ever."""
    config, generator = worker.config, torch.Generator().manual_seed(worker.topology.rank)
    batches: list[Iterator[MicroBatch]] = []
    for _ in range(config.accumulation):
        seed = int(torch.randint(1 << 40, (), generator=generator))
        batches.append(_random_segments(worker, seed))
    return batches


def _random_segments(worker: Worker, seed: int) -> Iterator[MicroBatch]:
    """Made as they are asked for, so that a sequence is never whole; the same there and back."""
    config = worker.config
    for number in cycle(config.plan.reads):
        generator = torch.Generator().manual_seed(seed + number)
        yield _random_batch(config, len(worker.layout.held(number)), generator)


def _random_batch(config: Config, tokens: int, generator: torch.Generator) -> MicroBatch:
    model = config.model
    read = _random_inputs(model, (config.train.micro_batch_size, tokens + 1), generator)
    labels = read[..., : model.action_width].tanh() if model.of_frames else read
    return MicroBatch(read[:, :-1], labels[:, 1:], None)


def _random_inputs(
    model: ModelConfig, shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Tokens [B, T], or frames [B, T, A + 1 + S]."""
    if not model.of_frames:
        return torch.randint(model.vocab_size, shape, generator=generator)
    numbers = model.action_width + 1 + model.observation_width
    return torch.randn(*shape, numbers, generator=generator)


def timed_steps(worker: Worker) -> Iterator[float]:
    """Seconds of one optimizer step after another, to the end of the slowest worker's.

    The model, engine and step are the trainer's own; only the reading of data is left out.
    """
    engine, batches = build_engine(worker), random_batches(worker)
    for _ in repeat(None):
        start = time.perf_counter()
        accumulate_gradients(engine, batches, worker)
        engine.step(worker.config.optim.learning_rate)
        _synchronize(worker.device)
        mine = torch.tensor([time.perf_counter() - start], device=worker.device)
        yield float(worker.topology.gather(mine).max())


def measure_training(config: Config, steps: int, seconds: float, untimed: int = 1) -> TrainingCost:
    """Time up to `steps` optimizer steps, as many as fit into `seconds`, at least one.

    So many before them are not timed. Every worker calls it.
    """
    worker = Worker.join(config)
    device, meter = worker.device, worker.topology.sequence.meter
    idle = _resident_bytes(device)
    if config.train.segment_len == AUTO:
        worker, _ = settle(worker)
    clock = timed_steps(worker)
    for _ in range(untimed):
        next(clock)
    meter.take()
    timed = [next(clock)]
    while len(timed) < steps and sum(timed) < seconds:
        timed.append(next(clock))
    exchange_seconds, sent_bytes = meter.take()
    return TrainingCost(
        step_seconds=timed,
        exchange_seconds=exchange_seconds / len(timed),
        exchange_bytes=sent_bytes // len(timed),
        peak_memory_bytes=peak_memory_bytes(device) - idle,
        idle_memory_bytes=idle,
        peak_flops=peak_flops(device),
        limit_flops=_limit_flops(worker),
    )


@torch.inference_mode()
def _limit_flops(worker: Worker) -> float:
    """FLOP/s of products of large matrices on this worker, while all others make them too."""
    device, bf16 = worker.device, worker.config.train.dtype == "bf16"
    size = 8192 if device.type == "cuda" else 1024
    if bf16 and not multiplies_in_bf16(device):
        size = 256  # of 1024 they would take minutes
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    rates = []
    for _ in range(5):
        worker.topology.gather(torch.zeros(1, device=device))  # all begin
        start = time.perf_counter()
        for _ in range(8):
            a @ a
        _synchronize(device)
        rates.append(8 * 2 * size**3 / (time.perf_counter() - start))
    return statistics.median(rates)


@torch.inference_mode()
def measure_reading(config: Config, context: int, tokens: int, segment: int) -> ReadingCost:
    """Read a prompt of `context` random tokens in segments, then decode `tokens`, one by one."""
    alone = replace(config, parallel=replace(config.parallel, sp=1))
    device = Worker.join(alone).device
    idle = _resident_bytes(device)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    torch.manual_seed(config.run.seed)
    model = build_model(config.model).to(device, dtype).eval()
    prompt = _random_inputs(config.model, (1, context), torch.Generator().manual_seed(0)).to(device)
    _read(model, prompt[:, : min(context, 256)], None)  # warms kernels and threads
    _synchronize(device)
    start = time.perf_counter()
    carry: list[Carry] | None = None
    token = prompt[:, :1]
    for part in prompt.split(segment, dim=1):
        token, carry = _read(model, part, carry)
    _synchronize(device)
    prefill_seconds = time.perf_counter() - start
    # The first token grows the cache of full attention, once for many that follow.
    token, carry = _read(model, token, carry)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(tokens):
        token, carry = _read(model, token, carry)
    _synchronize(device)
    return ReadingCost(
        prefill_seconds=prefill_seconds,
        decode_tokens_per_second=tokens / (time.perf_counter() - start),
        carry_bytes=sum(x.nbytes for layer in carry or [] for x in layer),
        peak_memory_bytes=peak_memory_bytes(device) - idle,
        idle_memory_bytes=idle,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_bytes(device: torch.device) -> int:
    """What the process holds before the model: libraries, mostly. Nothing on a GPU."""
    return 0 if device.type == "cuda" else peak_memory_bytes(device)


def _read(model: Stack, inputs: Tensor, carry: list[Carry] | None) -> tuple[Tensor, list[Carry]]:
    """What a model would read next, [B, 1] or a frame as the last with the action it takes."""
    read, carry = model(inputs, carry, readout=_last)
    if not model.config.of_frames:
        return read.argmax(dim=-1), carry
    width = model.config.action_width
    return torch.cat([read.tanh().to(inputs.dtype), inputs[:, -1:, width:]], dim=-1), carry


def _last(hidden: Tensor, weight: Tensor) -> Tensor:
    """What the head makes of the last step alone."""
    return hidden[:, -1:] @ weight.T
