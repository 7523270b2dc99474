"""A run's folder: the names of its files, what is finished, what may resume. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import file_sha256, write_whole
from data_prep.schema import INFO_NAME, TOKENIZER_NAME
from trainer.storage import MANIFEST, place_of

Line = dict[str, Any]  # of a .jsonl file

# What every line of a .jsonl file has; of figures the steps do not fall.
RISING = {
    "metrics.jsonl": ("step", "loss", "step_seconds", "elapsed_seconds", "learning_rate"),
    "sequences.jsonl": ("step", "begins"),
    "evaluations.jsonl": ("step", "loss", "bits_per_byte"),
}
LINES: dict[str, tuple[str, ...]] = RISING | {
    "starts.jsonl": ("step", "submission", "base_seconds", "restart", "lost_steps"),
    "configurations.jsonl": ("at", "config"),
    "manifests.jsonl": ("step", "sha256"),
    "bad_steps.jsonl": ("since", "manifests_sha256", "on_bad_step"),
    "went_back.jsonl": ("step", "asked_sha256"),
    "behind.jsonl": ("step", "elapsed_seconds"),
}
LEASE_SECONDS = 120.0  # after which NFS frees what a lost machine held (90, unless set otherwise)
RESULT_KEYS = ("step", "loss", "bits_per_byte", "tokens", "baselines", "by_position")


class RunFolder:
    """Everything that a run writes, and that readers of it find."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.data = self.path / INFO_NAME  # of what it was trained on
        self.tokenizer = self.path / TOKENIZER_NAME  # where it is not plain bytes
        self.metrics = self.path / "metrics.jsonl"
        self.progress = self.path / "progress.json"  # of a streamed step that is under way
        self.sequences = self.path / "sequences.jsonl"  # the first token of each, by step
        self.starts = self.path / "starts.jsonl"  # trainer.goodput
        # the last step before a start that goes back behind it, until it has taken one
        self.behind = self.path / "behind.jsonl"
        self.history = self.path / "configurations.jsonl"  # each that a start has changed
        self.manifests = self.path / "manifests.jsonl"  # digests of the checkpoints' manifests
        self.bad_steps = self.path / "bad_steps.jsonl"  # that ended a start, and where it stood
        self.went_back = self.path / "went_back.jsonl"  # to checkpoint.resume_step, and who asked
        self.lock = self.path / "lock"
        self.evaluations = self.path / "evaluations.jsonl"
        self.result = self.path / "evaluation.json"  # of the last step
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.md"
        self.curve = self.path / "loss.png"
        self.samples = self.path / "samples.txt"

    def checkpoint(self, step: int, runs: int = 0) -> Path:
        """The folder of a step's checkpoint; it exists when its manifest does.

        `runs` of a segment were done for the next step, if that was under way.
        """
        return self.checkpoints / (f"step-{step:06d}" + (f"-{runs:06d}" if runs else ""))

    def saved(self) -> list[Path]:
        """Checkpoint folders, newest first; unfinished and damaged ones have other names."""
        named = ((place_of(p.name), p) for p in self.checkpoints.glob("step-*") if p.is_dir())
        return [path for _, path in sorted(each for each in named if each[0])[::-1]]

    def newest_manifest(self) -> Line | None:
        """What the newest checkpoint says of itself, if it can be read."""
        newest = self.saved()[:1]
        return _object(newest[0] / MANIFEST, ("step", "data_fingerprint")) if newest else None

    def hold(self, patience_seconds: float, submission: str = "", most: float = math.inf) -> int:
        """Be the only one that writes here, until this process ends; the open lock.

        The system frees it with the process, however that ends, and network storage does so too
        (NFS since Linux 2.6.12), though of a lost machine only after a while. One that is just
        ending is waited for. Raises ValueError that names who else is at it, and RuntimeError
        where that is a lost worker of the same submission.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self.unwritable(error) from None
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                found = os.pread(handle, 400, 0).decode(errors="replace")
                holder, _, its = found.partition("\n")
                waited, own = time.monotonic() - began, bool(submission) and its == submission
                if waited > (min(LEASE_SECONDS, most) if own else patience_seconds):
                    os.close(handle)
                    used = f"run.dir {self.path} is in use: {holder or 'another process'}"
                    if own:
                        lost = "and lost, still holds it"
                        raise RuntimeError(f"{used} {lost} after {waited:.0f} s") from None
                    raise ValueError(
                        f"{used} trains in it; wait for its end, stop it, or choose another run.dir"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                os.close(handle)
                raise ValueError(
                    f"run.dir {self.path} cannot be locked ({error.strerror}): choose storage "
                    f"that has flock"
                ) from None
        os.ftruncate(handle, 0)
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        holder = f"process {os.getpid()} of {socket.gethostname()}, since {at},"
        os.pwrite(handle, f"{holder}\n{submission}".encode(), 0)
        return handle

    def unwritable(self, error: OSError) -> ValueError:
        """What a person is told."""
        reason = f"{error.strerror}: {error.filename}"
        return ValueError(f"run.dir {self.path} cannot be written: {reason}")

    def resumes(self) -> bool:
        """Whether a start here goes on with what another has begun."""
        return self.config.is_file() and bool(self.saved())

    def read_result(self, step: int) -> Line | None:
        """The final evaluation, if it is there and of this step."""
        result = _object(self.result, RESULT_KEYS) if self.result.exists() else None
        return result if result and result["step"] == step else None

    def forget_after(self, step: int) -> None:
        """What is of a later step is not this run's any more, nor what was made of it."""
        for path in (self.metrics, self.sequences, self.evaluations):
            truncate_after(path, step)
        if self.result.exists() and not self.read_result(step):
            for path in (self.result, self.report, self.curve, self.samples):
                path.unlink(missing_ok=True)

    def mend(self) -> list[str]:
        """Set aside what of its files cannot be read, and keep the lines that can; what was done.

        Figures are no reason not to go on: the weights are in the checkpoints.
        """
        told = []
        for path, keys in LINES.items():
            if fault := _mend_lines(self.path / path, keys):
                told.append(fault)
                if path == self.manifests.name:
                    self._vouch_for_saved()
        if self.result.exists() and not _object(self.result, RESULT_KEYS):
            aside = _set_aside(self.result)
            told.append(f"{self.result} could not be read: it is {aside.name} now, and made again")
        return told

    def _vouch_for_saved(self) -> None:
        """For those there are, once the file that did is set aside: the next save begins one."""
        for folder in self.saved()[::-1]:
            if (folder / MANIFEST).is_file():
                step = (place_of(folder.name) or (0,))[0]
                add_line(self.manifests, {"step": step, "sha256": file_sha256(folder / MANIFEST)})

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
        try:
            existing = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        except OSError as error:  # a name that is too long
            yield "run.dir", f"{str(self.path)[:60]}... cannot be made: {error.strerror}"
            return
        if not existing.is_dir():
            yield "run.dir", f"{self.path} cannot be made: {existing} is not a folder"
        elif not os.access(existing, os.W_OK):
            yield "run.dir", f"{self.path} cannot be written: no permission in {existing}"


def add_line(path: Path, line: Line) -> None:
    """Append to a .jsonl file, in place of a line that a full disk has torn."""
    with path.open("ab+") as f:
        if end := f.tell():
            f.seek(end - 1)
            if f.read(1) != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(line).encode() + b"\n")


def truncate_after(path: Path, step: int) -> None:
    """Keep the lines of a .jsonl file whose step is at most `step`; a torn last line goes too."""
    if path.exists():
        _write_lines(path, [line for line in read_lines(path) if line["step"] <= step])


def _write_lines(path: Path, lines: list[Line]) -> None:
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def _set_aside(path: Path) -> Path:
    """Under another name, which no reader takes for it."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    return aside


def _object(path: Path, keys: tuple[str, ...]) -> Line | None:
    """What a file of JSON holds; None where it is not a line of these keys."""
    try:
        return _line(path.read_text(), keys)
    except (OSError, UnicodeDecodeError):
        return None


def _line(text: str, keys: tuple[str, ...]) -> Line | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or any(key not in value for key in keys):
        return None
    return value if "step" not in keys or type(value["step"]) is int else None


def _mend_lines(path: Path, keys: tuple[str, ...]) -> str | None:
    """Keep the lines that can be read and follow each other; what was wrong."""
    if not path.exists():
        return None
    try:
        texts = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    lines = [_line(text, keys) for text in texts]
    if lines and not lines[-1] and not texts[-1].endswith("\n"):
        lines.pop()  # torn, which is no damage
    read = [line for line in lines if line]
    kept = _rising(read) if path.name in RISING else read
    bad = len(lines) - len(kept)
    if not bad:
        if texts and not texts[-1].endswith("\n"):  # or the next line would go on in it
            _write_lines(path, kept)
        return None
    aside = _set_aside(path)
    if path.name == "manifests.jsonl":  # with some of them gone, good checkpoints would be refused
        return (
            f"{path} could not be read: it is {aside.name} now, checkpoints are taken as they are"
        )
    _write_lines(path, kept)
    return (
        f"{path} had {bad} lines that cannot be read: it is {aside.name} now, and goes on with the "
        f"other {len(kept)}"
    )


def _rising(lines: list[Line]) -> list[Line]:
    """The most of them whose steps rise from each to the next: a wrong one costs itself alone."""
    ends: list[int] = []  # of the best run of each length, the place of its last line
    before: list[int] = []  # of each line, the place of the one before it in such a run
    for place, line in enumerate(lines):
        length = bisect_left(ends, line["step"], key=lambda end: lines[end]["step"])
        before.append(ends[length - 1] if length else -1)
        ends[length : length + 1] = [place]
    kept, place = [], ends[-1] if ends else -1
    while place >= 0:
        kept.append(lines[place])
        place = before[place]
    return kept[::-1]


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a .jsonl file; what a killed writer left half-written is not one.

    None where there is no file.
    """
    if not path.exists():
        return []
    texts = path.read_text().splitlines(keepends=True)
    return [json.loads(text) for text in texts if text.endswith("\n")]
