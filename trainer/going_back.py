"""checkpoint.resume_step: back to the checkpoint of a step, once; what is later is put aside.

That it was done is noted in the run's folder and where its checkpoints are kept besides, so that
the same command, and every restart of it, goes on from there.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint import Saved
from trainer.config import Config
from trainer.run_folder import Line, RunFolder, add_line, read_lines
from trainer.storage import Mirror, place_of
from trainer.worker import Worker

NOTE = "went_back.json"  # at the mirror


def asked(config: Config) -> str:
    """What is to be trained, of a start that goes back: not on what workers, nor for how long."""
    described = asdict(config)
    for section in ("launch", "parallel", "run"):
        del described[section]
    for name in ("stop_after", "micro_batch_size", "segment_len", "keep_segments"):
        del described["train"][name]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def went_back(worker: Worker, folder: RunFolder, mirror: Mirror | None) -> Line | None:
    """The note of the same wish, where there is something to go on from; every worker's the same.

    Another wish than the last one's is a new one.
    """

    def find() -> Line | None:
        lines = read_lines(folder.went_back)[-1:]
        if not lines and mirror and (kept := mirror.note(NOTE)):
            lines = [json.loads(kept)]
        known = bool(lines) and lines[0]["asked_sha256"] == asked(worker.config)
        return lines[0] if known and (folder.saved() or (mirror and mirror.saved())) else None

    note = worker.topology.gather_objects(worker.topology.together(find))[0]
    if note and worker.topology.first:
        worker.warn(
            f"checkpoint.resume_step {note['step']}: it went back there before, and goes on; "
            f"to go back again, set something else too, or start once without it"
        )
    return note


def go_back(
    worker: Worker, folder: RunFolder, mirror: Mirror | None, brought: set[str]
) -> list[Path]:
    """Put aside what is later than the wanted checkpoint, fetched if it is not here.

    The folders by their names before, on rank 0. Raises ValueError where there is none.
    """
    topology, wanted = worker.topology, _wanted(worker)
    left: list[Path] = []

    path = folder.checkpoint(wanted)

    def take_back() -> None:
        aside = path.with_suffix(checkpoint.LEFT)
        if not path.exists() and aside.is_dir():
            aside.rename(path)
            worker.warn(f"{path} had been put aside before, and is back")

    def leave_later() -> None:
        here = folder.saved()
        if not path.is_dir():
            names = ", ".join(each.name for each in here) or "none"
            raise ValueError(
                f"checkpoint.resume_step {wanted}: {folder.checkpoints} has no checkpoint of that "
                f"step (it has {names})"
            )
        left.extend(each for each in here if checkpoint.place(each.name) > (wanted, 0))
        for each in left:
            checkpoint.put_aside(each)

    topology.on_first(take_back)
    if mirror:
        checkpoint.fetch(folder, mirror, topology, brought, path.name)
    topology.on_first(leave_later)
    return left


def settle(
    worker: Worker,
    folder: RunFolder,
    mirror: Mirror | None,
    saved: Saved | None,
    left: list[Path],
) -> None:
    """Note that it went back to `saved`, which is whole: later ones count at the mirror no more.

    Where it was not, what is later is as before. Raises ValueError.
    """
    wanted = _wanted(worker)

    def undo() -> None:
        for path in left:
            path.with_suffix(checkpoint.LEFT).rename(path)

    def note() -> None:
        for path in left:
            worker.warn(f"going back to step {wanted}: {path} is put aside")
        bad = len(read_lines(folder.bad_steps))
        line = {"step": wanted, "asked_sha256": asked(worker.config), "bad_steps": bad}
        if mirror:
            later = [n for n in mirror.saved() if (place_of(n) or (0, 0)) > (wanted, 0)]
            for name in later:
                mirror.withdraw(name)
            mirror.keep_note(NOTE, json.dumps(line))
        add_line(folder.went_back, line)  # last: what is cut off before is done again

    if saved is None or (saved.manifest.step, saved.manifest.runs) != (wanted, 0):
        worker.topology.on_first(undo)
        raise ValueError(
            f"checkpoint.resume_step {wanted}: the checkpoint of that step is damaged; what is "
            f"later stays as it was"
        )
    worker.topology.on_first(note)


def forget(folder: RunFolder, mirror: Mirror | None) -> None:
    """A start without the wish: the next one with it goes back again."""
    folder.went_back.unlink(missing_ok=True)
    if mirror:
        mirror.forget_note(NOTE)


def withdraw_left(folder: RunFolder, mirror: Mirror) -> None:
    """What was put aside here counts at the mirror no more, which may have been out of reach then.

    One of the same step that is another, as another machine may have made, does.
    """
    for name in mirror.saved():
        here = folder.checkpoints / name
        left = here.with_suffix(checkpoint.LEFT) / checkpoint.MANIFEST
        if left.is_file() and not here.exists():
            with suppress(ValueError):  # of what cannot be read nobody knows
                if json.loads(left.read_text()) == mirror.manifest(name):
                    mirror.withdraw(name)


def _wanted(worker: Worker) -> int:
    step = worker.config.checkpoint.resume_step
    assert step is not None
    return step
