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
    back = now.checkpoint.resume_step
    manifest = folder.newest_manifest() if back is None else None
    yield from faults_beside(
        now,
        f"in {folder.path}",
        fixed={name: get(before, name) for name in fixed_values(now)},
        step=manifest["step"] if manifest else back or 0,
        data=(data_fingerprint(now), manifest["data_fingerprint"] if manifest else None),
    )


def faults_beside(
    now: Config,
    where: str,
    fixed: dict[str, Any],
    step: int,
    data: tuple[str | None, str | None],
) -> Iterator[Fault]:
    """The same of the run that is `where`, as far as it is known: `fixed` values, the step it has
    reached, and fingerprints of today's data and of its."""
    another = "choose another run.dir, and another checkpoint.remote if there is one"
    for name, value in fixed_values(now).items():
        if fixed.get(name, value) != value:
            yield (
                name,
                f"{value!r} differs from {fixed[name]!r} of the run {where}, which would resume: "
                f"keep it, or {another}",
            )
    if step > now.train.steps:
        yield (
            "train.steps",
            f"{now.train.steps} is below step {step}, which the run {where} has reached: raise it, "
            f"or {another}",
        )
    if all(data) and data[0] != data[1]:
        yield (
            "data.path",
            f"{now.data.path} is not the data that the run {where} was trained on: its order would "
            f"be another; give back the same data, or {another}",
        )
