"""A measurement in a child process: its peak of memory is its own, and it has an end.

A cell that runs out of memory or time takes nothing else with it. The process that starts it
imports nothing heavy: what is called goes by name, what it returns is passed on as it was pickled.
"""

import multiprocessing
import os
import pickle
import resource
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from threading import Thread
from types import ModuleType
from typing import Any

from trainer.config import Config

OUT_OF_MEMORY = "out of memory"
OUT_OF_TIME = "out of time"
STOPPED = "stopped"  # because another worker had failed


@dataclass(frozen=True)
class Failed:
    """Why there is no cost."""

    why: str


@dataclass(frozen=True)
class Call:
    """function(config, *arguments), within limits."""

    function: str  # module:name
    config: Config
    arguments: tuple[Any, ...] = ()
    seconds: float = 60.0
    memory_bytes: int | None = None


class Child:
    """A call in a process of its own.

    It is forked from a server that has imported the heavy libraries, once per worker.
    """

    def __init__(self, call: Call, environment: dict[str, str]) -> None:
        if not call.config.launch.gpus_per_worker:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when the server imports DeepSpeed
        self._seconds, self._stopped = call.seconds, False
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "trainer.measure"])
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(theirs, call, environment), daemon=True)
        # A child would import the program that started this one; it needs nothing of it.
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()

    def wait(self) -> Any:
        """What the call returned, or `Failed`; a child that takes longer is killed."""
        return pickle.loads(self.wait_pickled())

    def wait_pickled(self) -> bytes:
        """The same, for somebody else to read."""
        try:
            if not self._answer.poll(self._seconds):
                return pickle.dumps(Failed(OUT_OF_TIME))
            return self._answer.recv_bytes()
        except EOFError:  # it died without a word
            if self._stopped:
                return pickle.dumps(Failed(STOPPED))
            self._process.join(5)
            if self._process.exitcode == -signal.SIGKILL:
                # Linux ends a process so when memory is out
                return pickle.dumps(Failed(OUT_OF_MEMORY))
            return pickle.dumps(Failed(f"ended with exit status {self._process.exitcode}"))
        finally:
            self._process.kill()
            self._process.join()

    def stop(self) -> None:
        """End the child, whatever it does; `wait`, in another thread, then says so."""
        self._stopped = True
        self._process.kill()


def _run(answer: Connection, call: Call, environment: dict[str, str]) -> None:
    import torch

    Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    with suppress(OSError):  # where memory is out, Linux shall end this and nothing else
        Path("/proc/self/oom_score_adj").write_text("1000")
    if call.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (call.memory_bytes, call.memory_bytes))
    try:
        answer.send(resolve_name(call.function)(call.config, *call.arguments))
    except (RuntimeError, MemoryError) as error:
        answer.send(Failed(OUT_OF_MEMORY if _is_memory(error) else traceback.format_exc()))
    except Exception:  # told to whoever compares, who goes on with other cells
        answer.send(Failed(traceback.format_exc()))
    answer.close()
    sys.stdout.flush()
    os._exit(0)  # other workers may be waited for in vain by libraries that clean up


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _is_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # of the CPU's allocator, C++, CUDA outside torch's allocator, cuBLAS, NCCL
    words = (
        "can't allocate memory|not enough memory|bad_alloc|out of memory|ALLOC_FAILED|CUDA calloc"
    )
    return any(word in str(error) for word in words.split("|"))
