"""The CPU backend: native.cpp, built at first use, with chunked.py's four functions.

The library is compiled by g++ (or $CXX) in about ten seconds and cached under
$XDG_CACHE_HOME/longhaul, by source, flags and processor. Workers that start together build it once:
each waits for the lock of the one that builds, and a finished library appears by a rename.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from models.scan.recurrence import Inputs, Recurrence, Span, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
HEADER = Path(__file__).with_name("native_gates.h")
# -ffast-math is not among them: it would change denormals for the whole process.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
]
# The numbers by which native.cpp knows recurrences, dtypes and kernels.
RECURRENCE_NUMBERS = {"linear": 0, "mingru": 1, "minlstm": 2, "minlstm-unnormalized": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD = range(4)


class _Arguments(ctypes.Structure):
    """native.cpp's struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "width")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "y",
                "reset",
                "h",
                "grad_h",
                "state_in",
                "h_in",
                "out",
                "out_y",
                "decay",
                "state",
            )
        ),
        ("threads", ctypes.c_int32),
    ]


def supports(device: str, dtype: torch.dtype) -> bool:
    """Whether the library takes inputs of this device and dtype."""
    return device == "cpu" and dtype in DTYPES


def unavailable() -> str | None:
    """Why the library cannot be used on this machine; None when it can. Builds it if need be."""
    try:
        _library()
    except (OSError, RuntimeError) as error:  # no compiler, or no home for its cache
        return str(error)
    return None


def chunk_count(recurrence: Recurrence, inputs: Inputs) -> int:
    """How many chunk maps a span of these inputs keeps."""
    return 0


def summarize(recurrence: Recurrence, inputs: Inputs, reset: Tensor | None) -> Span:
    """As chunked.summarize; reads the inputs once and keeps nothing of size T."""
    span = _new_span(recurrence, inputs)
    _run(SUMMARIZE, recurrence, inputs, reset, decay=span.decay, state=span.state)
    return span


def forward(
    recurrence: Recurrence,
    inputs: Inputs,
    h_in: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Tensor, Tensor]:
    """As chunked.forward, in one pass; a span is not needed."""
    h = inputs[0].new_empty(recurrence.state_shape(inputs))
    h_last = torch.empty_like(h_in, memory_format=torch.contiguous_format)
    _run(FORWARD, recurrence, inputs, reset, state_in=h_in, out=h, state=h_last)
    return h, h_last


def summarize_backward(
    recurrence: Recurrence, inputs: Inputs, grad_h: Tensor, reset: Tensor | None
) -> Span:
    """As chunked.summarize_backward."""
    span = _new_span(recurrence, inputs)
    _run(
        SUMMARIZE_BACKWARD,
        recurrence,
        inputs,
        reset,
        grad_h=grad_h,
        decay=span.decay,
        state=span.state,
    )
    return span


def backward(
    recurrence: Recurrence,
    inputs: Inputs,
    h: Tensor,
    h_in: Tensor,
    grad_h: Tensor,
    grad_out: Tensor,
    reset: Tensor | None,
    span: Span | None = None,
) -> tuple[Inputs, Tensor]:
    """As chunked.backward, in one pass."""
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    grad_h_in = torch.empty_like(h_in, memory_format=torch.contiguous_format)
    _run(
        BACKWARD,
        recurrence,
        inputs,
        reset,
        h=h,
        grad_h=grad_h,
        state_in=grad_out,
        h_in=h_in,
        out=grads[0],
        out_y=grads[1] if len(grads) > 1 else None,
        state=grad_h_in,
    )
    return grads, grad_h_in


def _new_span(recurrence: Recurrence, inputs: Inputs) -> Span:
    """Uninitialised."""
    batch, _, width = recurrence.state_shape(inputs)
    shapes = (batch, width), (batch, width), (2, batch, 0, width)
    return Span(*(inputs[0].new_empty(shape, dtype=state_dtype(inputs)) for shape in shapes))


def _run(
    kernel: int,
    recurrence: Recurrence,
    inputs: Inputs,
    reset: Tensor | None,
    **tensors: Tensor | None,
) -> None:
    """Call the library. Tensors it writes are new and contiguous; those it reads are made so."""
    batch, steps, width = recurrence.state_shape(inputs)
    named = {
        "x": inputs[0],
        "y": inputs[1] if len(inputs) > 1 else None,
        "reset": None if reset is None else reset.to(torch.uint8),
        **tensors,
    }
    alive = {name: x.contiguous() for name, x in named.items() if x is not None}
    arguments = _Arguments(
        batch=batch,
        steps=steps,
        width=width,
        threads=torch.get_num_threads(),
        **{name: x.data_ptr() for name, x in alive.items()},
    )
    index = RECURRENCE_NUMBERS.get(recurrence.name)
    if index is None:
        raise ValueError(f"native.cpp has no kernel for {recurrence.name!r}: use 'chunked'")
    dtype = DTYPES[inputs[0].dtype]
    _library().longhaul_scan(kernel, index, dtype, ctypes.byref(arguments))


@cache
def _library() -> ctypes.CDLL:
    """The compiled library. Raises OSError with the reason where it cannot be built or loaded."""
    compiler = os.environ.get("CXX", "g++")
    sources = SOURCE.read_text(), HEADER.read_text()
    described = (*sources, compiler, *FLAGS, platform.machine(), _processor())
    key = hashlib.sha256("\0".join(described).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = home / "longhaul" / f"scan-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _build(compiler, path)
    return ctypes.CDLL(str(path))


def _build(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        try:
            done = subprocess.run(
                [compiler, *FLAGS, "-o", str(built), str(SOURCE)], capture_output=True, text=True
            )
        except FileNotFoundError:
            raise OSError(f"no compiler {compiler!r}: install g++, or name one in CXX") from None
        if done.returncode:
            raise OSError(f"{compiler} cannot build {SOURCE.name}: {done.stderr.strip()[-2000:]}")
        built.replace(path)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
