"""Where benchmarks write: results/<theme>_<hardware>_<yyyymm>.csv, .md and .png."""

import csv
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trainer.provenance import commit, processor

FOLDER = Path(__file__).parent / "results"


def hardware() -> str:
    """A short name for file names: the GPU, or the processor's family and its cores."""
    if torch.cuda.is_available():
        return re.sub(r"\W+", "", torch.cuda.get_device_name().lower().replace("nvidia", ""))
    words = re.findall(r"epyc|xeon|ryzen|core|neoverse", processor().lower())
    return f"{words[0] if words else platform.machine()}{os.cpu_count()}core"


def result_path(theme: str, suffix: str) -> Path:
    FOLDER.mkdir(exist_ok=True)
    return FOLDER / f"{theme}_{hardware()}_{datetime.now(UTC):%Y%m}{suffix}"


def circumstances() -> str:
    """Markdown lines that say by what, where and from which commit a result was measured."""
    spec = sys.modules["__main__"].__spec__
    command = " ".join([spec.name if spec else "?", *sys.argv[1:]])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return (
        f"- command: `python -m {command}`\n- commit: {commit()}\n"
        f"- hardware: {device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n"
        f"- torch {torch.__version__}, Python {platform.python_version()}\n"
    )


def write_csv(theme: str, rows: Sequence[dict[str, Any]]) -> None:
    with result_path(theme, ".csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [["" if x is None else str(x) for x in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
