"""Object storage: checkpoints kept there, data read from there, and a store that fails."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.distributed import free_port, run_distributed
from tests.trainer.runs import (
    figures,
    of_kind,
    refused,
    run,
    started_at,
    train_here,
    warnings,
)
from trainer.config import load_config
from trainer.events import Event, Stepped, Stop
from trainer.run_folder import RunFolder
from trainer.storage import MANIFEST, Mirror
from trainer.train import train


class Store:
    """An S3 server of our own, on loopback. It keeps all in memory: killed, it forgets."""

    def __init__(self, port: int) -> None:
        self.port = port
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                bucket = f"http://127.0.0.1:{self.port}/bucket"
                make = urllib.request.Request(bucket, method="PUT", data=b"")
                urllib.request.urlopen(make, timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)

    @staticmethod
    def environment(port: int) -> dict[str, str]:
        """What clients read."""
        address = f"http://127.0.0.1:{port}"
        return {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store(free_port())
    for name, value in Store.environment(store.port).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one of another store's address
    try:
        yield store
    finally:
        store.stop()


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}"
    (path / "deepspeed").mkdir(parents=True)
    (path / "deepspeed" / "state.pt").write_bytes(os.urandom(1000 + step))
    (path / "model.safetensors").write_bytes(os.urandom(500))
    (path / MANIFEST).write_text("{}")
    return path


NAMES = ["deepspeed/state.pt", "model.safetensors"]


@pytest.mark.slow
def test_a_checkpoint_counts_at_an_address_when_all_of_it_is_there(store, tmp_path):
    mirror = Mirror("s3://bucket/runs/a")
    assert mirror.saved() == []
    folders = [_checkpoint(tmp_path, step) for step in (2, 10, 30)]
    for folder in folders:
        mirror.upload(folder, NAMES)
        mirror.commit(folder, keep=2)
    assert mirror.saved() == ["step-000030", "step-000010"]
    assert mirror.files("step-000030") == [*NAMES[:1], MANIFEST, *NAMES[1:]]
    mirror.download("step-000030", NAMES, tmp_path / "back")
    for name in NAMES:
        assert (tmp_path / "back" / name).read_bytes() == (folders[2] / name).read_bytes()

    # what an upload that was cut off has left there, of more workers, is none of its files
    again = _checkpoint(tmp_path, 35)
    (again / "deepspeed" / "rank-3.pt").write_bytes(b"left")
    mirror.upload(again, [*NAMES, "deepspeed/rank-3.pt"])
    (again / "deepspeed" / "rank-3.pt").unlink()
    mirror.upload(again, NAMES)
    mirror.commit(again, keep=2)
    assert mirror.files("step-000035") == [*NAMES[:1], MANIFEST, *NAMES[1:]]
    mirror.withdraw("step-000035")
    mirror.upload(folders[1], NAMES)
    mirror.commit(folders[1], keep=2)

    half = _checkpoint(tmp_path, 40)
    mirror.upload(half, NAMES[:1])
    with pytest.raises(OSError, match=r"step-000040/model.safetensors has 0 of 500 bytes"):
        mirror.commit(half, keep=2)
    assert mirror.saved() == ["step-000030", "step-000010"]


def _train(config_file: Path, overrides: list[str], port: int, fault: tuple[str, int]) -> list:
    """In this rank, with the store at `port`, which fails amid the save of step 4 by `fault`.

    It is slow for a while, or it is killed, forgets, and is started again by rank 0.
    """
    upload, again = Mirror.upload, []

    def failing(self: Mirror, folder: Path, names: list[str]) -> None:
        (how, pid), (first, *others) = fault, names
        if folder.name != "step-000004" or os.environ["RANK"] != "0" or not others or not how:
            return upload(self, folder, names)
        upload(self, folder, [first])
        if how == "slow":
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(4, lambda: os.kill(pid, signal.SIGCONT)).start()
        else:
            os.kill(pid, signal.SIGKILL)
            threading.Timer(2, lambda: again.append(Store(port))).start()
        upload(self, folder, others)

    os.environ.update(Store.environment(port))
    Mirror.upload = failing
    events = train_here(config_file, overrides)
    if again:  # what it keeps at the end
        kept, mirror = RunFolder(config_file.parent / "kept"), Mirror("s3://bucket/run")
        kept.checkpoints.mkdir(parents=True)
        for name in mirror.saved():
            mirror.download(name, mirror.files(name), kept.checkpoints / name)
        again[0].stop()
    return events


def _run(
    config_file: Path, store: Store, ranks: int, *options: str, fault: str = ""
) -> list[Event]:
    arguments = config_file, list(options), store.port, (fault, store.process.pid)
    return run_distributed(_train, ranks, *arguments, fresh=True)[0]


SAVED = [
    *("parallel.sp=2", "train.steps=6", "checkpoint.every=2", "evaluate.sequences=0"),
    *("deepspeed.zero_stage=1", "checkpoint.remote=s3://bucket/run"),
]


@pytest.mark.slow
def test_a_store_that_is_slow_amid_a_save_costs_nothing(store, config_file, tmp_path):
    """And what is lost here is had from it."""
    elsewhere = ["checkpoint.remote=null", f"run.dir={tmp_path / 'other'}"]
    straight = run(config_file, 2, *SAVED, *elsewhere)
    first = _run(config_file, store, 2, *SAVED, "train.stop_after=4", fault="slow")
    assert not warnings(first)
    assert Mirror("s3://bucket/run").saved() == ["step-000004", "step-000002"]
    shutil.rmtree(RunFolder(config_file.parent / "run").checkpoints)
    second = _run(config_file, store, 2, *SAVED)
    assert started_at(second) == 4
    assert figures(first) + figures(second) == figures(straight)


@pytest.mark.slow
def test_a_store_that_is_killed_amid_a_save_and_forgets_it_costs_that_save(store, config_file):
    """Half a checkpoint never counts, the folder here has all, the next save is whole again."""
    (warning,) = warnings(_run(config_file, store, 2, *SAVED, fault="killed"))
    assert "the checkpoint of step 4 is in " in warning
    assert "alone: checkpoint.remote s3://bucket/run: " in warning
    here = RunFolder(config_file.parent / "run")
    assert [path.name for path in here.saved()] == ["step-000006", "step-000004"]
    kept = RunFolder(config_file.parent / "kept")
    assert [path.name for path in kept.saved()] == ["step-000006"]
    for path in here.checkpoint(6).rglob("*.*"):
        twin = kept.checkpoint(6) / path.relative_to(here.checkpoint(6))
        assert path.read_bytes() == twin.read_bytes()


@pytest.mark.slow
def test_another_run_does_not_go_on_from_what_a_run_keeps_elsewhere(config_file, dataset, tmp_path):
    """Nor does it prune that: the folder is another, the address is the same."""
    there = ["train.steps=3", "evaluate.sequences=0", f"checkpoint.remote=file://{tmp_path}/kept"]
    run(config_file, 1, *there)
    mine = f"run.dir={tmp_path / 'mine'}"
    for other, said in (
        ("run.seed=7", "run.seed 7 differs from 0 of the run kept at checkpoint.remote file:"),
        ("model.width=24", "model.width 24 differs from 16"),
        ("train.steps=2", "train.steps 2 is below step 3, which the run kept at"),
    ):
        assert said in refused(config_file, 1, *there, mine, other)
        assert not list(RunFolder(tmp_path / "mine").checkpoints.iterdir())
    run(config_file, 1, *there, mine, "run.seed=7", "checkpoint.remote=null", "train.steps=4")
    said = refused(config_file, 1, *there, mine, "run.seed=7", "train.steps=5")
    assert "run.seed 7 differs from 0" in said  # though what is here is newer
    shutil.rmtree(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step-000003"]
    assert started_at(run(config_file, 1, *there, mine, "train.steps=4")) == 3


@pytest.mark.slow
def test_data_at_an_address_trains_as_data_here_does(store, config_file, dataset, tmp_path):
    fsspec.filesystem("s3").put(str(dataset), "bucket/data", recursive=True)
    options = ["train.steps=2", "evaluate.sequences=2"]
    address = ["data.path=s3://bucket/data", f"data.cache={tmp_path / 'cache'}"]
    there = _run(config_file, store, 1, *options, *address, f"run.dir={tmp_path / 'other'}")
    assert len(figures(there)) == 2
    assert figures(there) == figures(run(config_file, 1, *options))


def _cut_off(config_file: Path, overrides: list[str], when: str) -> list[Event]:
    """In this rank, stopped after a step, with a store that does not answer at start or stop."""
    asked, away = Mirror._try, [when == "start"]

    def call(self: Mirror, *given: Any, **options: Any) -> Any:
        if away[0]:
            raise OSError("checkpoint.remote: nobody answers")
        return asked(self, *given, **options)

    Mirror._try = call
    config = load_config(config_file, overrides, workers=1)
    events: list[Event] = []

    def report(event: Event) -> Stop:
        events.append(event)
        away[0] = isinstance(event, Stepped) and when == "stop"
        return Stop.NOW if isinstance(event, Stepped) else Stop.NO

    train(config, report)
    return events


@pytest.mark.slow
def test_an_address_that_is_out_of_reach_at_a_start_or_a_stop_costs_no_run(config_file, tmp_path):
    """What is here is enough to go on from; without it the address is needed."""
    kept = ["train.steps=9", "evaluate.sequences=0", f"checkpoint.remote=file://{tmp_path}/kept"]
    kept += ["checkpoint.every=1"]

    def cut_off(when: str) -> list[Event]:
        return run_distributed(_cut_off, 1, config_file, kept, when, fresh=True)[0]

    stopped = cut_off("stop")
    assert any(
        "alone: checkpoint.remote: nobody answers; it goes on from here" in told
        for told in warnings(stopped)
    )
    on = cut_off("start")
    assert started_at(on) == of_kind(stopped, Stepped)[-1].step
    assert any("nobody answers: going on from what is in" in told for told in warnings(on))
    shutil.rmtree(RunFolder(config_file.parent / "run").path)
    with pytest.raises(AssertionError, match="nobody answers"):
        cut_off("start")
