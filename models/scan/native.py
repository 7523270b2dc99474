"""The CPU backend: kernels/scan.cpp around a recurrence's own gates in C++, built at first use.

The library of a recurrence is compiled by g++ (or $CXX) in some seconds and cached under
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from models.scan.backend import Grads, Scanned
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.span import Span

SOURCE = Path(__file__).parent / "kernels" / "scan.cpp"
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
# The numbers by which scan.cpp knows dtypes and kernels, and its limit on inputs.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD = range(4)
MOST_INPUTS = 4

LARGE_BYTES, PAGE, MADV_HUGEPAGE = 4 << 20, 4096, 14  # of madvise(2)
_LIBC = ctypes.CDLL(None)
if hasattr(_LIBC, "madvise"):
    _LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Arguments(ctypes.Structure):
    """scan.cpp's struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "width")),
        *((name, ctypes.c_void_p * MOST_INPUTS) for name in ("x", "out")),
        *(
            (name, ctypes.c_void_p)
            for name in ("reset", "h", "grad_h", "state_in", "h_in", "state")
        ),
        *((name, ctypes.c_void_p) for name in ("span_decay", "span_state")),
        ("threads", ctypes.c_int32),
    ]


asks_autograd = False


def fault(recurrence: Recurrence, device: str, dtype: torch.dtype) -> str | None:
    """Why the library cannot run it on this machine; builds it if need be."""
    if device != "cpu" or dtype not in DTYPES:
        return f"it is not made for {dtype} on {device}"
    if recurrence.native_gates is None:
        return f"{recurrence.name} has no gates in C++"
    if unfit := recurrence.kernel_fault():
        return unfit
    try:
        _library_of(recurrence)
    except (OSError, RuntimeError) as error:  # no compiler, or no home for its cache
        return str(error)
    return None


def empty(problem: Problem) -> tuple[Span, Scanned]:
    """Nothing of size T is kept."""
    return problem.new_span(), Scanned(problem.new_output(), problem.new_state())


def summarize(problem: Problem) -> Span:
    """Reads the inputs once."""
    span = problem.new_span()
    _Call(problem).run(SUMMARIZE, span_decay=span.decay, span_state=span.state)
    return span


def forward(problem: Problem, h_in: Tensor, span: Span | None) -> Scanned:
    """In one pass; a span is not needed."""
    scanned = empty(problem)[1]
    _in_large_pages(scanned.y)
    _Call(problem, out=(scanned.y,)).run(FORWARD, state_in=h_in, state=scanned.h_last)
    return scanned


def summarize_backward(problem: Problem, grad_y: Tensor) -> Span:
    """Reads the gradient, and what the decay is made of."""
    span = problem.new_span()
    spans = {"span_decay": span.decay, "span_state": span.state}
    _Call(problem).run(SUMMARIZE_BACKWARD, grad_h=grad_y, **spans)
    return span


def backward(
    problem: Problem, scanned: Scanned, grads: Grads, span: Span | None
) -> tuple[Inputs, Tensor]:
    """In one pass; a span is not needed."""
    grad_y, grad_out = grads
    gradients = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem.inputs
    )
    for gradient in gradients:
        _in_large_pages(gradient)
    grad_h_in = problem.new_state()
    _Call(problem, out=gradients).run(
        BACKWARD,
        h=scanned.y,
        grad_h=grad_y,
        state_in=grad_out,
        h_in=scanned.h_last,
        state=grad_h_in,
    )
    return gradients, grad_h_in


def _in_large_pages(x: Tensor) -> None:
    """Ask Linux for pages of 2 MiB under a large new tensor, where it gives them on request.

    Its pages are mapped and cleared when they are first written, which in 4 KiB takes several times
    as long as the scan. Advice: where it is not taken nothing is lost.
    """
    if x.nbytes < LARGE_BYTES or not hasattr(_LIBC, "madvise"):
        return
    first = -(-x.data_ptr() // PAGE) * PAGE
    _LIBC.madvise(first, (x.data_ptr() + x.nbytes - first) // PAGE * PAGE, MADV_HUGEPAGE)


@dataclass(frozen=True)
class _Call:
    """A call of the library. Tensors it writes are new and contiguous; others are made so."""

    problem: Problem
    out: Inputs = ()

    def run(self, kernel: int, **tensors: Tensor) -> None:
        problem = self.problem
        if problem.reset is not None:
            tensors["reset"] = problem.reset.to(torch.uint8)
        inputs = [x.contiguous() for x in problem.inputs]  # alive until the call has ended
        alive = {name: x.contiguous() for name, x in tensors.items()}
        pointers = ctypes.c_void_p * MOST_INPUTS
        arguments = _Arguments(
            batch=problem.batch,
            steps=problem.steps,
            width=problem.width,
            x=pointers(*(x.data_ptr() for x in inputs)),
            out=pointers(*(x.data_ptr() for x in self.out)),
            threads=torch.get_num_threads(),
            **{name: x.data_ptr() for name, x in alive.items()},
        )
        library = _library_of(problem.recurrence)
        library.longhaul_scan(kernel, DTYPES[inputs[0].dtype], ctypes.byref(arguments))


def _library_of(recurrence: Recurrence) -> ctypes.CDLL:
    assert recurrence.native_gates is not None
    header, gates = recurrence.native_gates
    # what the gates say of their inputs is held to what the recurrence says
    defined = {"GATES": gates, "TENSORS_GIVEN": recurrence.tensors, "PARTS_GIVEN": recurrence.parts}
    return _library(header, tuple(f"-D{name}={value}" for name, value in defined.items()))


@cache
def _library(header: Path, defined: tuple[str, ...]) -> ctypes.CDLL:
    """The compiled library. Raises OSError with the reason where it cannot be built or loaded."""
    compiler = os.environ.get("CXX", "g++")
    flags = [*FLAGS, *defined, f'-DGATES_HEADER="{header}"']
    headers = {*SOURCE.parents[1].rglob("*.h"), *header.parent.glob("*.h")}
    sources = sorted({SOURCE, header, *headers})
    texts = [path.read_text() for path in sources]
    described = (*texts, compiler, *FLAGS, *defined, platform.machine(), _processor())
    key = hashlib.sha256("\0".join(described).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = home / "longhaul" / f"scan-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _build([compiler, *flags], path)
    return ctypes.CDLL(str(path))


def _build(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(built), str(SOURCE)], capture_output=True, text=True
            )
        except FileNotFoundError:
            raise OSError(f"no compiler {command[0]!r}: install g++, or name one in CXX") from None
        if done.returncode:
            reason = done.stderr.strip()[-2000:]
            raise OSError(f"{command[0]} cannot build {SOURCE.name}: {reason}")
        built.replace(path)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
