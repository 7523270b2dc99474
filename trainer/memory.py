"""The memory of a worker: how it is kept, and how much it was."""

import ctypes
import resource

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Have the C library keep freed blocks for the next allocation instead of returning them.

    A training step allocates the same large tensors again and again. glibc gives each back to the
    kernel, which must then map and clear new pages at the first touch of the next one: the touch
    costs several times the arithmetic. Call it once per process, before the first large tensor;
    with another C library it does nothing. For workers only: a process keeps its peak to its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: of the GPU's allocator, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
