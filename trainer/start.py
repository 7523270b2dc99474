"""What a start finds: what was changed in the run's folder, the checkpoint, what scans run on."""

import shutil
import time
import warnings
from dataclasses import asdict, replace
from functools import partial

import torch

from models.scan import choose_backend
from trainer import checkpoint, going_back
from trainer.checkpoint import Manifest, Saved
from trainer.config import Config, dump_config, load_dumped
from trainer.data import TokenStream
from trainer.engine import Engine
from trainer.fixed import faults_beside
from trainer.optim import learning_rate
from trainer.run_folder import RunFolder, add_line, read_lines
from trainer.settings import get, leaves_of
from trainer.storage import Mirror
from trainer.worker import Worker

OF_ONE_START = ("checkpoint.resume_step", "train.stop_after")


def open_folder(worker: Worker) -> None:
    """Make the folder. Files in it that cannot be read are set aside, and told.

    Raises ValueError where it cannot be written or is not seen by all.
    """
    folder = RunFolder(worker.config.run.dir)

    def write() -> None:
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            for told in folder.mend():
                worker.warn(told)
        except OSError as error:
            raise folder.unwritable(error) from None

    def check() -> None:
        if not folder.path.is_dir():
            raise ValueError(
                f"run.dir {folder.path} is not visible to worker {worker.topology.rank}: "
                f"use a folder that all workers share"
            )

    worker.topology.on_first(write)
    worker.topology.together(check)


def note_start(worker: Worker, data: TokenStream) -> list[str]:
    """What the folder's readers need of a start that goes on; on rank 0, what it has changed."""
    folder, config = RunFolder(worker.config.run.dir), worker.config
    changed: list[str] = []

    def write() -> None:
        try:
            changed.extend(_changes(folder, config))
            dump_config(_to_go_on_with(config), folder.config)
            for copy in (folder.data, folder.tokenizer):
                if (original := data.folder / copy.name).exists():
                    shutil.copy(original, copy)  # with its permissions
        except OSError as error:
            raise folder.unwritable(error) from None

    worker.topology.on_first(write)
    return changed


def _to_go_on_with(config: Config) -> Config:
    """Without what was asked of one start."""
    settings = replace(config.checkpoint, resume_step=None)
    return replace(config, checkpoint=settings, train=replace(config.train, stop_after=None))


def _changes(folder: RunFolder, config: Config) -> list[str]:
    """Settings that are not those of the last start, old and new; the history has all of them."""
    before = load_dumped(folder.config) if folder.resumes() else None
    names = [name for name, _ in leaves_of(Config) if name not in OF_ONE_START]
    different = [n for n in names if before and get(before, n) != get(config, n)]
    if before is None or different or not folder.history.exists():
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        add_line(folder.history, {"at": at, "config": asdict(config)})
    return [f"{name} {get(before, name)} -> {get(config, name)}" for name in different]


def redrawn(folder: RunFolder, config: Config, step: int) -> str | None:
    """Where the learning rate jumps, because its schedule was changed between two starts."""
    lines = read_lines(folder.metrics)
    if not lines or step >= config.train.steps:
        return None
    before = lines[-1]["learning_rate"]
    steps = config.train.steps
    now = learning_rate(step, steps, config.optim)
    follows = abs(now - learning_rate(step - 1, steps, config.optim))
    if abs(now - before) <= 2 * follows + 1e-3 * before:
        return None
    return (
        f"the schedule of the learning rate was changed: it is {now:.3g} from here on, and was "
        f"{before:.3g} at step {step}"
    )


def find_checkpoint(worker: Worker, data: TokenStream) -> tuple[Saved | None, Mirror | None]:
    """The checkpoint to go on from, and where others are kept.

    Raises ValueError where what is there cannot be gone on from.
    """
    topology, config = worker.topology, worker.config
    folder, settings = RunFolder(config.run.dir), config.checkpoint
    worker.pulse.now("looking for a checkpoint")
    remote = settings.remote
    mirror = topology.together(lambda: Mirror(remote)) if remote else None

    unreachable: list[str] = []  # where what is here is enough

    def is_ours(mirror: Mirror) -> None:
        try:
            there = checkpoint.mirrored(mirror)
        except OSError as error:
            if not folder.saved():
                raise
            unreachable.append(str(error))
            worker.warn(f"{error}: going on from what is in {folder.checkpoints}")
            return
        if there:  # a save would prune it, if nothing else
            _check_resume(there, f"kept at checkpoint.remote {remote}", config, data)

    if mirror:
        topology.on_first(partial(is_ours, mirror))
    cut_off = bool(topology.gather_objects(unreachable)[0])
    brought: set[str] = set()
    wish = settings.resume_step is not None
    note = going_back.went_back(worker, folder, mirror) if wish else None
    if wish and note is None:
        left = going_back.go_back(worker, folder, mirror, brought)
        try:
            saved = _newest_intact(worker, folder, None, brought)
        except ValueError:
            saved = None
        going_back.settle(worker, folder, mirror, saved, left)
    else:
        reached = None if cut_off else mirror
        if reached:
            topology.on_first(partial(going_back.withdraw_left, folder, reached))
            checkpoint.fetch(folder, reached, topology, brought)
        if not wish and not cut_off:
            topology.on_first(partial(going_back.forget, folder, mirror))
        _leave_bad(worker, folder, reached, note["bad_steps"] if note else 0)
        saved = _newest_intact(worker, folder, reached, brought)
    if saved:
        _check_resume(saved.manifest, f"in {config.run.dir}", config, data)
    return saved, mirror


def _leave_bad(worker: Worker, folder: RunFolder, mirror: Mirror | None, known: int) -> None:
    """Put aside what led to a bad step that ended the run; but for the first `known` of them."""

    def leave() -> None:
        if len(read_lines(folder.bad_steps)) <= known:
            return
        left, since = checkpoint.leave_bad(folder, worker.config.guard.on_bad_step)
        for path in left:
            worker.warn(f"{path} is put aside, for it led to the bad step {since}: going back")
            if mirror:
                mirror.withdraw(path.name)

    worker.topology.on_first(leave)


def _newest_intact(
    worker: Worker, folder: RunFolder, mirror: Mirror | None, brought: set[str]
) -> Saved | None:
    """The checkpoint to go on from; where one is damaged, the mirror's, or an older one there."""
    topology = worker.topology
    while True:
        newest = topology.gather_objects([path.name for path in folder.saved()[:1]])[0]
        try:
            saved, fault = checkpoint.find(folder, topology, worker.warn), None
        except ValueError as error:
            saved, fault = None, error
        if not mirror or (not fault and ([saved.folder.name] if saved else []) == newest):
            break
        try:
            if not checkpoint.fetch(folder, mirror, topology, brought):
                break
        except ValueError as error:
            worker.warn(f"checkpoint.remote has no better one that can be read: {error}")
            break
    if fault:
        raise fault
    return saved


def scan_backends(engine: Engine, worker: Worker) -> str:
    """What runs the model's scans; the reason of a slow one is told."""
    dtype = torch.bfloat16 if worker.config.train.dtype == "bf16" else torch.float32
    with warnings.catch_warnings(record=True) as caught:
        backends = {
            choose_backend("auto", recurrence, worker.device.type, dtype)
            for recurrence in engine.recurrences()
        }
    for warning in caught:
        worker.warn(str(warning.message))
    return " and ".join(sorted(backends)) or "no"


def _check_resume(manifest: Manifest, where: str, config: Config, data: TokenStream) -> None:
    """Raises ValueError where `config` cannot go on with the run that is `where`."""
    prints = data.fingerprint, manifest.data_fingerprint
    back = config.checkpoint.resume_step
    step = manifest.step if back is None else min(manifest.step, back)
    for key, message in faults_beside(config, where, manifest.fixed, step, prints):
        raise ValueError(f"{key} {message}")
