"""Saves beside the training: what a full disk, a second place and a second start do."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tests.distributed import run_distributed
from tests.trainer.runs import figures, run, started_at, train_here, warnings
from trainer import checkpoint
from trainer.parallel.topology import Topology
from trainer.run_folder import RunFolder, read_lines
from trainer.storage import Mirror

pytestmark = pytest.mark.slow

BASE = ["parallel.sp=2", "train.steps=6", "checkpoint.every=2", "evaluate.sequences=0"]


def _with_full_disk(config_file: Path, overrides: list[str], step: int) -> list:
    """The last rank that writes finds the disk full at the checkpoint of a step."""
    writer = "0" if "deepspeed.zero_stage=0" in overrides else "1"
    seal = checkpoint._seal

    def full(path: Path) -> dict[str, Any]:
        if f"step-{step:06d}" in str(path) and os.environ["RANK"] == writer:
            raise OSError(28, "No space left on device", str(path))
        return seal(path)

    checkpoint._seal = full
    try:
        return train_here(config_file, overrides)
    finally:
        checkpoint._seal = seal


@pytest.mark.parametrize("stage", [0, 2])
def test_a_full_disk_costs_that_save_and_no_more(config_file, stage):
    options = [*BASE, f"deepspeed.zero_stage={stage}"]
    events = run_distributed(_with_full_disk, 2, config_file, options, 4)[0]
    (warning,) = warnings(events)
    assert "the checkpoint of step 4 was not written" in warning
    assert "No space left on device" in warning
    folder = config_file.parent / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000006"]


def test_a_full_disk_ends_the_run_where_that_was_asked_for_or_at_its_end(config_file):
    base = [*BASE, "deepspeed.zero_stage=1"]
    asked = [*base, "checkpoint.on_failure=stop"]
    with pytest.raises(AssertionError, match="the checkpoint of step 2 was not written"):
        run_distributed(_with_full_disk, 2, config_file, asked, 2)
    with pytest.raises(AssertionError, match="the checkpoint of step 6 was not written"):
        run_distributed(_with_full_disk, 2, config_file, base, 6)
    assert started_at(run(config_file, 2, *base)) == 4


def test_what_is_lost_here_is_fetched_from_the_second_place(config_file, tmp_path):
    """Another machine, whose disk is empty, goes on to the bit."""
    remote = tmp_path / "bucket"
    options = [*BASE, f"checkpoint.remote=file://{remote}", "checkpoint.keep=1"]
    straight = run(config_file, 2, *BASE, f"run.dir={tmp_path / 'straight'}")
    first = run(config_file, 2, *options, "train.stop_after=4")
    assert Mirror(f"file://{remote}").saved() == ["step-000004"]
    assert [p.name for p in remote.iterdir()] == ["step-000004"]  # older ones are gone
    shutil.rmtree(RunFolder(config_file.parent / "run").checkpoints)
    second = run(config_file, 2, *options)
    assert started_at(second) == 4
    assert figures(first) + figures(second) == figures(straight)


@pytest.mark.parametrize("lost", ["disk", "newest", "nothing"])
def test_a_damaged_checkpoint_is_made_good_by_the_second_place(config_file, tmp_path, lost):
    """Its own newest, or, where that is damaged there, the one before it."""
    remote = tmp_path / "bucket"
    options = [*BASE, f"checkpoint.remote=file://{remote}", "train.stop_after=4"]
    run(config_file, 2, *options)
    here = RunFolder(config_file.parent / "run").checkpoints
    spoiled = remote if lost == "disk" else here
    if lost == "disk":
        shutil.rmtree(here)
    elif lost == "newest":
        shutil.rmtree(here / "step-000002")
    victim = spoiled / "step-000004" / checkpoint.WEIGHTS
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    again = run(config_file, 2, *options)
    assert any("step-000004 is not used" in told for told in warnings(again))
    assert started_at(again) == (2 if lost == "disk" else 4)


def _unforeseen(rank: int) -> str:
    topology = Topology(1, 60.0)

    def act() -> None:
        if topology.rank == rank:
            raise KeyError("a slip")

    with pytest.raises((KeyError, RuntimeError)) as caught:
        topology.together(act)
    return f"{caught.type.__name__}: {caught.value}"


def test_what_nobody_foresaw_leaves_no_worker_waiting():
    mine, others = run_distributed(_unforeseen, 2, 0)
    assert mine == "KeyError: 'a slip'"
    assert others == "RuntimeError: KeyError: 'a slip'"


def test_what_safetensors_says_of_a_full_disk_is_one(tmp_path):
    def write(path: Path) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"cannot be written, .* MiB are free: No space left"):
        checkpoint._write_all(tmp_path, {"model.safetensors": write})


def test_a_second_place_that_fails_is_told_and_the_first_stands(config_file, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(AssertionError, match=r"is in .*step-000002 alone: checkpoint.remote"):
        run(config_file, 2, *BASE, f"checkpoint.remote=file://{blocked}", "train.stop_after=2")
    assert (config_file.parent / "run" / "checkpoints" / "step-000002").is_dir()


def test_a_run_folder_has_one_run(config_file):
    folder = RunFolder(config_file.parent / "run")
    lock = folder.hold(0)
    try:
        with pytest.raises(ValueError, match=rf"is in use: process {os.getpid()} of .* trains in"):
            folder.hold(0.3)
    finally:
        os.close(lock)
    os.close(folder.hold(0))


def test_a_folder_that_a_lost_worker_of_the_same_submission_holds_is_waited_for(
    config_file, monkeypatch
):
    """Network storage frees what a lost machine held after a while; another run's is refused."""
    monkeypatch.setattr("trainer.run_folder.LEASE_SECONDS", 0.6)
    folder = RunFolder(config_file.parent / "run")
    lock = folder.hold(0, "mine")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"in use: process \d+ of .* UTC, and lost, still"):
        folder.hold(0, "mine")
    assert time.monotonic() - began > 0.6
    with pytest.raises(ValueError, match="wait for its end"):
        folder.hold(0, "another")
    monkeypatch.setattr("trainer.run_folder.LEASE_SECONDS", 60)
    threading.Timer(0.2, os.close, [lock]).start()
    os.close(folder.hold(0, "mine"))


def test_storage_without_locks_is_told(config_file, monkeypatch):
    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ValueError, match=r"cannot be locked .Function not implemented.: choose"):
        RunFolder(config_file.parent / "run").hold(0)


def test_a_save_holds_up_one_step_and_sequences_are_told(config_file):
    run(config_file, 2, *BASE)
    folder = RunFolder(config_file.parent / "run")
    lines = read_lines(folder.metrics)
    # of the last save no step is left to tell
    assert [line["step"] for line in lines if line["save_seconds"] > 0] == [3, 5]
    told = read_lines(folder.sequences)
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]
    assert all(len(line["begins"]) == 2 for line in told)
