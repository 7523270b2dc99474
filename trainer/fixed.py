"""What a run may not change between two starts: the numbers would no longer be one run's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from models.bounds import Fault
from trainer.checks import data_fingerprint
from trainer.run_folder import RunFolder
from trainer.settings import get, leaves_of

if TYPE_CHECKING:
    from trainer.config import Config

FIXED_KEYS = (
    "model",
    "run.seed",
    "data.reset_state",
    "data.shift",
    "deepspeed.zero_stage",
    "train.dtype",
    "train.seq_len",
    "train.curriculum",
    "train.curriculum_steps",
)


def fixed_values(config: Config) -> dict[str, Any]:
    """What a run may not change between two starts, key by key."""
    return {
        name: get(config, name)
        for name, _ in leaves_of(type(config))
        if name in FIXED_KEYS or name.partition(".")[0] in FIXED_KEYS
    }


def resume_faults(folder: RunFolder, before: Config, now: Config) -> Iterator[Fault]:
    """(key, what is wrong) where `now` cannot go on with the run that `before` configured."""
    for name, value in fixed_values(now).items():
        if get(before, name) != value:
            yield (
                name,
                f"{value!r} differs from {get(before, name)!r} of the run in "
                f"{folder.path}, which would resume: keep it, or choose another run.dir",
            )
    manifest = folder.newest_manifest() if now.checkpoint.resume_step is None else None
    if manifest and manifest["step"] > now.train.steps:
        yield (
            "train.steps",
            f"{now.train.steps} is below step {manifest['step']}, which the run in {folder.path} "
            f"has reached: raise it, or choose another run.dir",
        )
    data = data_fingerprint(now)
    if manifest and data and data != manifest["data_fingerprint"]:
        yield (
            "data.path",
            f"{now.data.path} is not the data that the run in {folder.path} was trained on: its "
            f"order would be another; give back the same data, or choose another run.dir",
        )
