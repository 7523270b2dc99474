"""A run's folder: the names of its files, what is finished, what may resume. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
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
        self.sequences = self.path / "sequences.jsonl"  # the first token of each, by step
        self.starts = self.path / "starts.jsonl"  # trainer.goodput
        self.lock = self.path / "lock"
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

    def hold(self, patience_seconds: float) -> int:
        """Be the only one that writes here, until this process ends; the open lock.

        The system frees it with the process, however that ends, and network storage does so too
        (NFS since Linux 2.6.12). One that is just ending is waited for. Raises ValueError that
        names who else is at it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self.unwritable(error) from None
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(handle, 200, 0).decode() or "another process"
                    os.close(handle)
                    raise ValueError(
                        f"run.dir {self.path} is in use: {holder} trains in it; wait for its end, "
                        f"stop it, or choose another run.dir"
                    ) from None
                time.sleep(0.2)
        os.ftruncate(handle, 0)
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        os.pwrite(
            handle, f"process {os.getpid()} of {socket.gethostname()}, since {at},".encode(), 0
        )
        return handle

    def unwritable(self, error: OSError) -> ValueError:
        """What a person is told."""
        reason = f"{error.strerror}: {error.filename}"
        return ValueError(f"run.dir {self.path} cannot be written: {reason}")

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
        add_line(self.evaluations, line)

    def faults(self) -> Iterator[tuple[str, str]]:
        """Why nothing could be written here."""
        if ":/" in str(self.path):  # what a Path makes of ://
            yield (
                "run.dir",
                f"{self.path} is an address: a run writes into a folder, and keeps its checkpoints "
                f"at an address too where checkpoint.remote names one",
            )
            return
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


def add_line(path: Path, line: Line) -> None:
    """Append to a .jsonl file."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


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
