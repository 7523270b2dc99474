"""What one cell of a comparison costs: training steps on all workers, or reading on one.

A cell is measured in a process of its own, so that its peak of memory is its own and a cell that
runs out of memory or time takes nothing else with it.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from models.lm import LanguageModel
from models.mixer import Carry
from trainer.config import Config
from trainer.data import MicroBatch
from trainer.engine import Engine
from trainer.memory import keep_freed_memory, peak_memory_bytes
from trainer.metrics import peak_flops
from trainer.parallel.topology import Topology, initialize_distributed
from trainer.provenance import processor
from trainer.step import accumulate_gradients, prepare_model

Result = dict[str, Any]

OUT_OF_MEMORY = "out of memory"
OUT_OF_TIME = "out of time"
STOPPED = "stopped"  # because another worker had failed


def measure_training(config: Config, steps: int, seconds: float) -> Result:
    """Time up to `steps` optimizer steps on random tokens, as many as fit into `seconds`, at least
    one, after one that is not timed. Every worker calls it; memory and bytes are this worker's.

    The model, engine and step are the trainer's own; only the reading of data is left out.
    """
    keep_freed_memory()
    device = _device(config)
    topology = Topology(config.parallel.sp, config.parallel.timeout_seconds)
    idle = _resident_bytes(device)
    torch.manual_seed(config.run.seed)
    model = LanguageModel(config.model)
    prepare_model(model, config, topology)
    engine = Engine(model, config, topology, device)
    generator = torch.Generator().manual_seed(topology.rank)
    shape = config.train.micro_batch_size, config.shard_tokens + 1
    tokens = [
        torch.randint(config.model.vocab_size, shape, generator=generator)
        for _ in range(config.accumulation)
    ]
    batches = [MicroBatch(t[:, :-1], t[:, 1:], None) for t in tokens]

    def step() -> float:
        """Wall time, to the end of the slowest worker's."""
        start = time.perf_counter()
        accumulate_gradients(engine, batches, config, device)
        engine.step(config.optim.learning_rate)
        _synchronize(device)
        mine = torch.tensor([time.perf_counter() - start], device=device)
        return float(topology.gather(mine).max())

    step()
    topology.sequence.meter.take()
    timed = [step()]
    while len(timed) < steps and sum(timed) < seconds:
        timed.append(step())
    exchange_seconds, sent_bytes = topology.sequence.meter.take()
    return {
        "step_seconds": timed,
        "peak_flops": peak_flops(device),
        "exchange_seconds": exchange_seconds / len(timed),
        "exchange_bytes": sent_bytes // len(timed),
        "peak_memory_bytes": peak_memory_bytes(device) - idle,
        "idle_memory_bytes": idle,
    }


@torch.inference_mode()
def measure_reading(config: Config, context: int, tokens: int, segment: int) -> Result:
    """Read a prompt of `context` random tokens in segments, then decode `tokens`, one by one."""
    keep_freed_memory()
    device = _device(config)
    idle = _resident_bytes(device)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    torch.manual_seed(config.run.seed)
    model = LanguageModel(config.model).to(device, dtype).eval()
    prompt = torch.randint(config.model.vocab_size, (1, context), device=device)
    model(prompt[:, : min(context, 256)], readout=_likeliest)  # warms kernels and threads
    _synchronize(device)
    start = time.perf_counter()
    carry: list[Carry] | None = None
    token = prompt[:, :1]
    for part in prompt.split(segment, dim=1):
        token, carry = model(part, carry, readout=_likeliest)
    _synchronize(device)
    prefill_seconds = time.perf_counter() - start
    # The first token grows the cache of full attention, once for many that follow.
    token, carry = model(token, carry, readout=_likeliest)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(tokens):
        token, carry = model(token, carry, readout=_likeliest)
    _synchronize(device)
    return {
        "prefill_seconds": prefill_seconds,
        "decode_tokens_per_second": tokens / (time.perf_counter() - start),
        "carry_bytes": sum(x.nbytes for layer in carry or [] for x in layer),
        "peak_memory_bytes": peak_memory_bytes(device) - idle,
        "idle_memory_bytes": idle,
    }


MEASURES: dict[str, Callable[..., Result]] = {
    "training": measure_training,
    "reading": measure_reading,
}


class Cell:
    """A measurement in a child process, with an end: of its own, or by `stop`.

    The child is forked from a server that has imported the heavy libraries, once per worker.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        config: Config,
        arguments: tuple[Any, ...],
        environment: dict[str, str],
        memory_bytes: int | None = None,
    ) -> None:
        if not config.launch.gpus_per_worker:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when the server imports DeepSpeed
        self._stopped = False
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "trainer.measure"])
        self._answer, theirs = context.Pipe(duplex=False)
        self._child = context.Process(
            target=_child,
            args=(theirs, function, (config, *arguments), environment, memory_bytes),
            daemon=True,
        )
        # A child would import the program that started this one; it needs nothing of it.
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._child.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()

    def wait(self, seconds: float) -> Result:
        """What was measured, or {"failed": why}; a child that takes longer is killed."""
        try:
            if not self._answer.poll(seconds):
                return {"failed": OUT_OF_TIME}
            return self._answer.recv()
        except EOFError:  # it died without a word
            if self._stopped:
                return {"failed": STOPPED}
            self._child.join(5)
            if self._child.exitcode == -signal.SIGKILL:
                return {"failed": OUT_OF_MEMORY}  # Linux ends a process so when memory is out
            return {"failed": f"ended with exit status {self._child.exitcode}"}
        finally:
            self._child.kill()
            self._child.join()

    def stop(self) -> None:
        """End the child, whatever it does; `wait`, in another thread, then says so."""
        self._stopped = True
        self._child.kill()


def _child(
    answer: Connection,
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    memory_bytes: int | None,
) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    with suppress(OSError):  # where memory is out, Linux shall end this and nothing else
        Path("/proc/self/oom_score_adj").write_text("1000")
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    try:
        answer.send(function(*arguments))
    except (RuntimeError, MemoryError) as error:
        answer.send({"failed": OUT_OF_MEMORY if _is_memory(error) else traceback.format_exc()})
    except Exception:  # told to whoever compares, who goes on with other cells
        answer.send({"failed": traceback.format_exc()})
    answer.close()
    sys.stdout.flush()
    os._exit(0)  # other workers may be waited for in vain by libraries that clean up


def hardware(use_gpu: bool) -> str:
    """What a measurement ran on, for people: the GPU, or the processor and its cores."""
    if use_gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # of the CPU's allocator, C++, CUDA outside torch's allocator, cuBLAS, NCCL
    words = (
        "can't allocate memory|not enough memory|bad_alloc|out of memory|ALLOC_FAILED|CUDA calloc"
    )
    return any(word in str(error) for word in words.split("|"))


def _device(config: Config) -> torch.device:
    use_gpu = config.launch.gpus_per_worker > 0
    return initialize_distributed(config.parallel.timeout_seconds, use_gpu)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_bytes(device: torch.device) -> int:
    """What the process holds before the model: libraries, mostly. Nothing on a GPU."""
    return 0 if device.type == "cuda" else peak_memory_bytes(device)


def _likeliest(hidden: Tensor, weight: Tensor) -> Tensor:
    """The next token [B, 1], without logits of any step but the last."""
    return (hidden[:, -1:] @ weight.T).argmax(dim=-1)
