"""Checkpoints that exist only when their manifest does.

DeepSpeed writes step-N.tmp; every worker hashes and syncs its share of the files; rank 0 writes the
manifest and renames the folder. A worker killed at any moment leaves the last checkpoint as it was.
DeepSpeed's `latest` file is not used: it is written before the checkpoint is complete.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import file_sha256, sync_to_disk, write_whole
from trainer.parallel.topology import Topology
from trainer.run_folder import RunFolder

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


@dataclass
class Manifest:
    """What a checkpoint holds, and where the run stood. `files` maps a path to size and sha256."""

    step: int
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    epoch: int
    consumed_in_epoch: int  # sequences
    sequences_consumed: int  # since the run began
    data_fingerprint: str
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    folder: Path
    manifest: Manifest


def save(
    run: RunFolder,
    manifest: Manifest,
    write: Callable[[Path], None],
    keep: int,
    topology: Topology,
) -> None:
    """Write a checkpoint with `write(folder)`, commit it, and drop all but the newest `keep`.

    Every worker must call it; it returns when the checkpoint exists for all.
    """
    final = run.checkpoint(manifest.step)
    partial = final.with_suffix(".tmp")

    def start() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit() -> None:
        write_whole(partial / MANIFEST, json.dumps(asdict(manifest), indent=1))
        for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
            sync_to_disk(folder)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_to_disk(final.parent)
        for old in run.saved()[keep:]:
            shutil.rmtree(old)

    topology.on_first(start)
    topology.together(lambda: write(partial))
    manifest.files = _seal_all(partial, topology)
    topology.on_first(commit)


def _seal_all(folder: Path, topology: Topology) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, each worker sealing its share."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = topology.gather_objects(names)[0]  # storage may show each worker another listing
    mine = names[topology.rank :: topology.world_size]
    sealed = topology.together(lambda: {name: _seal(folder / name) for name in mine})
    shares = topology.gather_objects(sealed)
    return {name: share[name] for share in shares for name in sorted(share)}


def find(run: RunFolder, topology: Topology, warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint whose every file is as its manifest says; None where there is none.

    The workers share the hashing. A checkpoint that is damaged is reported through `warn`, renamed
    to *.damaged, and the one before it tried. Raises ValueError where only damaged ones are left,
    rather than start again from nothing.
    """
    candidates = topology.gather_objects([str(p) for p in run.saved()])[0]
    for candidate in map(Path, candidates):
        manifest, faults = _read_manifest(candidate)
        if manifest:
            names = list(manifest.files)[topology.rank :: topology.world_size]
            faults = faults + damage(candidate, manifest, names)
        faults = [fault for share in topology.gather_objects(faults) for fault in share]
        if manifest and not faults:
            return Saved(candidate, manifest)
        if topology.first:
            warn(f"checkpoint {candidate} is not used: {'; '.join(sorted(set(faults)))}")
            aside = candidate.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            candidate.rename(aside)
    if candidates:
        raise ValueError(
            f"no checkpoint in {run.checkpoints} is intact: restore one from a copy, or choose "
            f"another run.dir to start again"
        )
    return None


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
