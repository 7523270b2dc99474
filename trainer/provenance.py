"""What a result was measured by and on. For benchmarks on bare machines too: Python alone."""

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

UNKNOWN = "unknown"


@cache
def commit() -> str:
    """Of the code that measures, as it was when this was first asked."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # nor of a repository around the environment it is in
        return UNKNOWN  # a working directory that Ray has uploaded, an installed package
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def hardware(use_gpu: bool) -> str:
    """What a measurement ran on, for people: the GPU, or the processor and its cores."""
    if use_gpu:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The processor's own name, where Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    line = re.search(r"model name\s*:\s*(.*)", text)
    return line[1] if line else platform.processor()
