"""Kernels in C++: built at first use, and memory for what they write.

A library is compiled by g++ (or $CXX) in some seconds and cached under $XDG_CACHE_HOME/longhaul, by
source, flags and processor. Workers that start together build it once: each waits for the lock of
the one that builds, and a finished library appears by a rename.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from torch import Tensor

HOME = Path(__file__).parent
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
LARGE_BYTES, PAGE, MADV_HUGEPAGE = 4 << 20, 4096, 14  # of madvise(2)
_LIBC = ctypes.CDLL(None)
if hasattr(_LIBC, "madvise"):
    _LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def in_large_pages(x: Tensor) -> None:
    """Ask Linux for pages of 2 MiB under a large new tensor, where it gives them on request.

    Its pages are mapped and cleared when they are first written, which in 4 KiB takes several times
    as long as the scan. Advice: where it is not taken nothing is lost.
    """
    if x.nbytes < LARGE_BYTES or not hasattr(_LIBC, "madvise"):
        return
    first = -(-x.data_ptr() // PAGE) * PAGE
    _LIBC.madvise(first, (x.data_ptr() + x.nbytes - first) // PAGE * PAGE, MADV_HUGEPAGE)


@cache
def library(source: Path, defined: tuple[str, ...] = (), header: Path | None = None) -> ctypes.CDLL:
    """The compiled library of a source, and of a header that it is given.

    Raises OSError with the reason where it cannot be built or loaded.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX") or "g++")
    except ValueError as error:
        raise OSError(f"CXX is no command ({error})") from None
    flags, headers = [*FLAGS, *defined], {*HOME.rglob("*.h"), *source.parent.glob("*.h")}
    if header:
        flags.append(f'-DGATES_HEADER="{header}"')
        near = header.parent, header.parent.parent  # where its own includes lie
        headers |= {header, *(other for folder in near for other in folder.glob("*.h"))}
    sources = sorted({source, *headers})
    texts = [path.read_text(errors="replace") for path in sources]
    described = (*texts, *compiler, *FLAGS, *defined, *platform.libc_ver(), platform.machine())
    described = (*described, _processor())
    key = hashlib.sha256("\0".join(described).encode()).hexdigest()[:16]
    path = _cache_home() / "longhaul" / f"scan-{key}.so"
    with suppress(OSError):  # not there, or empty, of a machine that died
        return ctypes.CDLL(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError):  # of another who built it meanwhile
            return ctypes.CDLL(str(path))
        _build([*compiler, *flags], source, path)
    return ctypes.CDLL(str(path))


def _cache_home() -> Path:
    """Raises OSError where there is none, as for a user whom no file of the machine knows."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"{error} Set XDG_CACHE_HOME to a folder that may be written to.") from None


def _build(command: list[str], source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(built), str(source)], capture_output=True, text=True
            )
        except FileNotFoundError:
            raise OSError(f"no compiler {command[0]!r}: install g++, or name one in CXX") from None
        if done.returncode:
            reason = done.stderr.strip()[-2000:]
            raise OSError(f"{command[0]} cannot build {source.name}: {reason}")
        built.replace(path)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
