"""How workers find each other."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from data_prep.blocks import DataError
from tests.distributed import run_distributed
from tests.trainer.runs import train_here, warnings
from trainer import train as train_module
from trainer.config import load_config
from trainer.run_folder import RunFolder, read_lines
from trainer.worker import Worker


def _listening() -> set[str]:
    dist.barrier()
    connections = psutil.Process().net_connections()
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_local_workers_listen_on_loopback_alone():
    """Neither the store nor gloo is to be reached from another machine."""
    assert run_distributed(_listening, 2, fresh=True) == [{"127.0.0.1"}] * 2


def _read(config_file: Path, error: type[Exception]) -> str:
    """What a rank is told where the last one cannot read."""
    worker = Worker.join(load_config(config_file, ["parallel.sp=1"], workers=2))

    def read() -> int:
        if worker.topology.rank == 1:
            raise error("the disk is gone")
        return 7

    try:
        return str(worker.read_together(read))
    except Exception as told:
        return f"{type(told).__name__}: {told}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError, ["DataError: the disk is gone"] * 2),
        (
            MemoryError,
            ["RuntimeError: MemoryError: the disk is gone", "MemoryError: the disk is gone"],
        ),
    ],
)
def test_no_worker_waits_for_one_that_cannot_read(config_file, error, told):
    assert run_distributed(_read, 2, config_file, error) == told


def _told(config_file: Path) -> list[int]:
    """How often it is said, on a processor that has bf16 and on one that has not."""
    counts = []
    for has in (True, False):
        train_module.multiplies_in_bf16 = lambda device, has=has: has
        folder = f"run.dir={config_file.parent / str(has)}"
        options = ["train.dtype=bf16", "train.steps=1", "evaluate.sequences=0", folder]
        told = warnings(train_here(config_file, options))
        counts.append(sum("train.dtype=fp32" in message for message in told))
    return counts


def test_bf16_without_instructions_for_it_is_told(config_file):
    """Or a run takes an hour for a minute's work, and nobody knows why."""
    assert run_distributed(_told, 1, config_file, fresh=True) == [[0, 1]]


@pytest.mark.slow
def test_without_ray_too_time_is_a_limit_and_a_run_goes_on(config_file):
    """As under torchrun: it stops after a step or two, saved; the same command goes on there."""
    options = ["train.steps=20", "evaluate.sequences=0"]
    command = [sys.executable, "-m", "trainer", str(config_file), *options]
    folder, reached = RunFolder(config_file.parent / "run"), [0]
    for limit in (["run.max_seconds=0.001"], ["run.max_seconds=0.001"], []):
        done = subprocess.run([*command, *limit], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        reached.append(int(folder.saved()[0].name.removeprefix("step-")))
    assert 0 < reached[1] < reached[2] < 20
    assert [line["step"] for line in read_lines(folder.metrics)] == list(range(1, 21))
