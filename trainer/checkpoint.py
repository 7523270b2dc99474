"""Checkpoints that exist only when their manifest does.

A save holds up the training for a copy of what is to be written. Beside the training, every worker
writes, hashes and syncs its files in step-N.tmp; rank 0 writes the manifest and renames the folder.
A worker killed at any moment leaves the last checkpoint as it was. DeepSpeed's `latest` file is not
used: it is written before the checkpoint is complete.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError

from data_prep.files import file_sha256, sync_to_disk, write_whole
from trainer.order import Position
from trainer.parallel.topology import Peers, Topology
from trainer.run_folder import RunFolder, add_line, read_lines
from trainer.storage import MANIFEST, Mirror, kept, place_of

# ends of the names of checkpoints that were put aside, and of what else a killed process leaves
LEFT, DAMAGED = ".left", ".damaged"
UNFINISHED = "*.tmp", "*.universal"
WEIGHTS = "model.safetensors"
Files = dict[str, Callable[[Path], None]]  # what writes a file, by its name in a checkpoint


@dataclass
class Manifest:
    """What a checkpoint holds, and where the run stood. `files` maps a path to size and sha256."""

    step: int
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    epoch: int  # of the first source of the data
    consumed_in_epoch: int  # its sequences
    sequences_consumed: int  # since the run began
    data_fingerprint: str
    positions: list[tuple[int, int]] = field(default_factory=list)  # both, of every source
    # of a segment, done for the next step; and how that goes through them (trainer/midstep.py)
    runs: int = 0
    way: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)  # what may not change (trainer/fixed.py)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, topology: Topology, places: list[Position], **known: Any) -> "Manifest":
        """Of these workers, and of where they stand in every source."""
        positions = [(each.epoch, each.consumed_in_epoch) for each in places]
        (epoch, consumed), *_ = positions
        return cls(
            world_size=topology.world_size,
            dp=topology.dp_size,
            sp=topology.sp_size,
            epoch=epoch,
            consumed_in_epoch=consumed,
            positions=positions,
            **known,
        )


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class SaveFault:
    """What went wrong with a save; whether the checkpoint is in the run's folder all the same."""

    message: str
    is_here: bool


class Saver:
    """Writes checkpoints beside the training, one at a time, on groups of their own.

    Every worker makes every call. A save that fails leaves nothing behind but `fault`.
    """

    def __init__(self, run: RunFolder, keep: int, peers: Peers, mirror: Mirror | None) -> None:
        self._run, self._keep, self._peers, self._mirror = run, keep, peers, mirror
        self._thread: Thread | None = None
        self.fault: SaveFault | None = None  # of the last save that has ended

    def start(self, manifest: Manifest, files: Files) -> None:
        """Begin to write this worker's `files`, when the save before has ended."""
        self.wait()
        self._thread = Thread(target=self._write, args=(manifest, files), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last save has ended, well or not."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, manifest: Manifest, files: Files) -> None:
        peers, final = self._peers, self._run.checkpoint(manifest.step, manifest.runs)
        partial = final.with_suffix(".tmp")
        try:
            peers.on_first(lambda: _clear(partial))
            sealed = peers.together(lambda: _write_all(partial, files))
            for share in peers.gather_objects(sealed):
                manifest.files |= share
            peers.on_first(lambda: self._commit(partial, final, manifest))
        except Exception as error:  # told to the run, which decides; a lost peer is one too
            told = f"the checkpoint of step {manifest.step} was not written: {error}"
            self.fault = SaveFault(told, is_here=False)
            if peers.first:
                shutil.rmtree(partial, ignore_errors=True)  # its room is needed
            return
        if self._mirror:
            mirror = self._mirror
            try:
                peers.together(lambda: mirror.upload(final, list(sealed)))
                peers.on_first(lambda: mirror.commit(final, self._keep))
            except Exception as error:
                told = f"the checkpoint of step {manifest.step} is in {final} alone: {error}"
                self.fault = SaveFault(told, is_here=True)

    def _commit(self, partial: Path, final: Path, manifest: Manifest) -> None:
        write_whole(partial / MANIFEST, json.dumps(asdict(manifest), indent=1))
        _record(self._run, partial, manifest.step)
        _replace(partial, final)
        there = self._run.saved()
        stay = kept([path.name for path in there], self._keep, final.name)
        for old in there:
            if old.name not in stay:
                shutil.rmtree(old)


def _record(run: RunFolder, folder: Path, step: int) -> None:
    """Keep the digest of a manifest apart from it: what lies there is what was written."""
    new = not run.manifests.exists()
    add_line(run.manifests, {"step": step, "sha256": file_sha256(folder / MANIFEST)})
    sync_to_disk(run.manifests)  # without its line the checkpoint would be refused
    if new:
        sync_to_disk(run.path)


def _replace(partial: Path, final: Path) -> None:
    """Give a folder that is complete its name, for good."""
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        sync_to_disk(folder)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_to_disk(final.parent)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_all(folder: Path, files: Files) -> dict[str, dict[str, Any]]:
    """Write files and seal them: size and digest by name."""
    sealed = {}
    for name, write in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        try:
            write(path)
        except (RuntimeError, SafetensorError) as error:  # what these say of a full disk
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(f"{path} cannot be written, {free:,.0f} MiB are free: {error}") from None
        sealed[name] = _seal(path)
    return sealed


def mirrored(mirror: Mirror) -> Manifest | None:
    """The manifest of the newest checkpoint there; None where there is none, or it is damaged."""
    newest = mirror.saved()[:1]
    try:
        return Manifest(**mirror.manifest(newest[0])) if newest else None
    except (TypeError, ValueError):
        return None


def fetch(
    run: RunFolder, mirror: Mirror, topology: Topology, brought: set[str], wanted: str | None = None
) -> bool:
    """Bring the newest checkpoint of the mirror here, if none here is as new; whether it did.

    Of those in `brought`, to which it is added, none is brought again: it was found damaged.
    With `wanted` that one, if it is not here.
    """

    def missing() -> str | None:
        there = [name for name in mirror.saved() if name not in brought]
        if wanted is not None:
            return wanted if wanted in there and not (run.checkpoints / wanted).is_dir() else None
        here = [path.name for path in run.saved()[:1]]
        newer = bool(there) and (not here or place(there[0]) > place(here[0]))
        return there[0] if newer else None

    names = topology.gather_objects(topology.together(missing))
    name = names[0]
    if name is None:
        return False
    brought.add(name)
    partial = run.checkpoints / f"{name}.tmp"
    topology.on_first(lambda: _clear(partial))
    files = topology.gather_objects(topology.together(lambda: mirror.files(name)))[0]
    mine = files[topology.rank :: topology.world_size]
    topology.together(lambda: mirror.download(name, mine, partial))
    topology.on_first(lambda: _record(run, partial, place(name)[0]))
    topology.on_first(lambda: _replace(partial, partial.with_suffix("")))
    return True


def place(name: str) -> tuple[int, int]:
    """The step of a checkpoint's name, and the runs of segments amid the next."""
    found = place_of(name)
    assert found, name
    return found


def put_aside(path: Path) -> Path:
    """A checkpoint that counts no more; its new name."""
    aside = path.with_suffix(LEFT)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return path


def note_bad_steps(run: RunFolder, since: int, on_bad_step: str) -> None:
    """Keep that steps from `since` on ended the run, and the checkpoints that led to them.

    Those are the newest one, and any that was saved in between.
    """
    led = [p for i, p in enumerate(run.saved()) if i == 0 or place(p.name)[0] >= since - 1]
    digests = [file_sha256(path / MANIFEST) for path in led]
    line = {"since": since, "manifests_sha256": digests, "on_bad_step": on_bad_step}
    add_line(run.bad_steps, line)


def leave_bad(run: RunFolder, on_bad_step: str) -> tuple[list[Path], int]:
    """Put aside what led to the bad steps that ended the run: the checkpoints, and the first step.

    Not the only one, and not where such steps have since come to be left out.
    """
    lines = read_lines(run.bad_steps)
    if not lines or (on_bad_step == "skip" and lines[-1]["on_bad_step"] != "skip"):
        return [], 0
    led = lines[-1]["manifests_sha256"]
    left = [put_aside(p) for p in run.saved()[:-1] if file_sha256(p / MANIFEST) in led]
    if left:  # once: made anew, to the bit, such a checkpoint may have led farther
        add_line(run.bad_steps, {**lines[-1], "manifests_sha256": []})
    return left, lines[-1]["since"]


def find(run: RunFolder, topology: Topology, warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint whose every file is as its manifest says; None where there is none.

    The workers share the hashing. A checkpoint that is damaged is reported through `warn`, renamed
    to *.damaged, and the one before it tried. Raises ValueError where only damaged ones are left,
    rather than start again from nothing.
    """
    if topology.first:  # of saves that were killed
        for pattern in UNFINISHED:
            for unfinished in run.checkpoints.glob(pattern):
                shutil.rmtree(unfinished)
    candidates = topology.gather_objects([str(p) for p in run.saved()])[0]
    for candidate in map(Path, candidates):
        manifest, faults = _read_manifest(candidate)
        if manifest:
            faults = _foreign(run, candidate, manifest)
            names = list(manifest.files)[topology.rank :: topology.world_size]
            faults = faults + damage(candidate, manifest, names)
        faults = [fault for share in topology.gather_objects(faults) for fault in share]
        if manifest and not faults:
            return Saved(candidate, manifest)
        if topology.first:
            warn(f"checkpoint {candidate} is not used: {'; '.join(sorted(set(faults)))}")
            aside = candidate.with_suffix(DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            candidate.rename(aside)
    if candidates:
        raise ValueError(
            f"no checkpoint in {run.checkpoints} is intact: restore one from a copy, or choose "
            f"another run.dir to start again"
        )
    return None


def _foreign(run: RunFolder, folder: Path, manifest: Manifest) -> list[str]:
    """What of a checkpoint this run has not written: DeepSpeed's files are pickles, which run."""
    listed = {*manifest.files, MANIFEST}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    faults = [f"{folder / name} is not in its manifest" for name in sorted(there - listed)]
    if run.manifests.exists():  # else the run is of an older version
        known = [line["sha256"] for line in read_lines(run.manifests)]
        if file_sha256(folder / MANIFEST) not in known:
            faults.append(f"{folder / MANIFEST} is not one that this run has written")
    return faults


def find_weights(run: RunFolder) -> tuple[Path, Manifest]:
    """The weights file of the newest intact checkpoint, for one process that only reads it."""
    faults = []
    for candidate in run.saved():
        manifest, wrong = _read_manifest(candidate)
        if manifest and not (wrong := damage(candidate, manifest, [WEIGHTS])):
            return candidate / WEIGHTS, manifest
        faults += wrong
    shown = "; ".join(faults) or "there is none yet"
    raise ValueError(f"no checkpoint in {run.checkpoints} can be loaded: {shown}")


def damage(folder: Path, manifest: Manifest, names: list[str]) -> list[str]:
    """What is wrong with the named files of a checkpoint; sizes first, they are cheap."""
    faults = []
    for name in names:
        path, stated = folder / name, manifest.files.get(name)
        if stated is None or not path.is_file():
            faults.append(f"{path} is missing")
        elif (size := path.stat().st_size) != stated["bytes"]:
            faults.append(f"{path} has {size} bytes instead of {stated['bytes']}")
        elif file_sha256(path) != stated["sha256"]:
            faults.append(f"{path} does not have the sha256 of its manifest")
    return faults


def _read_manifest(folder: Path) -> tuple[Manifest | None, list[str]]:
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text())), []
    except FileNotFoundError:
        return None, [f"{folder} has no {MANIFEST}, it was never finished"]
    except (OSError, ValueError, TypeError) as error:
        return None, [f"{folder / MANIFEST} cannot be read ({error})"]


def _seal(path: Path) -> dict[str, Any]:
    """Size and digest of a file, which is on disk when this returns."""
    sync_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
