"""A run's folder: the names of its files, what is finished, what may resume. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import write_whole
from data_prep.schema import TOKENIZER_NAME
from trainer.settings import get, leaves_of

if TYPE_CHECKING:
    from trainer.config import Config

Line = dict[str, Any]  # of a .jsonl file

# What a run may not change between two starts: the numbers would no longer be one run's.
FIXED_KEYS = (
    "model",
    "run.seed",
    "data.reset_state",
    "data.shift",
    "deepspeed.zero_stage",
    "train.dtype",
    "train.seq_len",
)


class RunFolder:
    """Everything that a run writes, and that readers of it find."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / TOKENIZER_NAME  # where it is not plain bytes
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.result = self.path / "evaluation.json"  # of the last step
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.md"
        self.curve = self.path / "loss.png"
        self.samples = self.path / "samples.txt"

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint; it exists when its manifest does."""
        return self.checkpoints / f"step-{step:06d}"

    def saved(self) -> list[Path]:
        """Checkpoint folders, newest first; unfinished and damaged ones have other names."""
        folders = [p for p in self.checkpoints.glob("step-*") if p.is_dir() and not p.suffix]
        return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)

    def resumes(self) -> bool:
        """Whether a start here goes on with what another has begun."""
        return self.config.is_file() and any(self.checkpoints.glob("step-*"))

    def read_result(self, step: int) -> Line | None:
        """The final evaluation, if it is there and of this step."""
        result = json.loads(self.result.read_text()) if self.result.exists() else None
        return result if result and result["step"] == step else None

    def write_result(self, result: Line) -> None:
        write_whole(self.result, json.dumps(result, indent=1) + "\n")

    def add_evaluation(self, line: Line) -> None:
        with self.evaluations.open("a") as f:
            f.write(json.dumps(line) + "\n")

    def faults(self) -> Iterator[tuple[str, str]]:
        """Why nothing could be written here."""
        existing = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        if not existing.is_dir():
            yield "run.dir", f"{self.path} cannot be made: {existing} is not a folder"
        elif not os.access(existing, os.W_OK):
            yield "run.dir", f"{self.path} cannot be written: no permission in {existing}"

    def resume_faults(self, before: Config, now: Config) -> Iterator[tuple[str, str]]:
        """What `now` changes of the configuration of the run here, and may not."""
        for name, _ in leaves_of(type(now)):
            fixed = name in FIXED_KEYS or name.partition(".")[0] in FIXED_KEYS
            if fixed and get(before, name) != get(now, name):
                yield (
                    name,
                    f"{get(now, name)!r} differs from {get(before, name)!r} of the run in "
                    f"{self.path}, which would resume: keep it, or choose another run.dir",
                )


def truncate_after(path: Path, step: int) -> None:
    """Keep the lines of a .jsonl file whose step is at most `step`; a torn last line goes too."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a .jsonl file; what a killed writer left half-written is not one.

    None where there is no file.
    """
    if not path.exists():
        return []
    texts = path.read_text().splitlines(keepends=True)
    return [json.loads(text) for text in texts if text.endswith("\n")]
