"""What workers are told of their world, and what a launcher refuses, without a Ray."""

import subprocess
import sys

import pytest

from launch.driver import Outcome
from launch.gang import Place, environments
from launch.ray_job import _shared_message, place_faults
from tests.launch.conftest import ROOT, without_ray


def test_ranks_find_each_other():
    places = [
        Place("n1", "10.0.0.1", 4001),
        Place("n1", "10.0.0.1", 4002),
        Place("n2", "10.0.0.2", 9),
    ]
    told = environments(places, cpus=2.5)
    assert [e["RANK"] for e in told] == ["0", "1", "2"]
    assert [e["LOCAL_RANK"] for e in told] == ["0", "1", "0"]
    assert [e["LOCAL_WORLD_SIZE"] for e in told] == ["2", "2", "1"]
    assert {e["WORLD_SIZE"] for e in told} == {"3"}
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in told} == {("10.0.0.1", "4001")}
    assert {e["OMP_NUM_THREADS"] for e in told} == {"2"}
    assert environments(places[:1], cpus=0.5)[0]["OMP_NUM_THREADS"] == "1"


def test_relative_paths_are_refused_on_a_cluster_alone(monkeypatch):
    paths = [("run.dir", "runs/x"), ("data.path", "/shared/data"), ("data.path", "s3://bucket/x")]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert place_faults(paths) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (fault,) = place_faults(paths)
    assert fault.startswith("run.dir: runs/x is relative")


def test_ranks_that_say_the_same_say_it_once():
    faults = [Outcome(1, "fault", "disk full"), Outcome(0, "fault", "disk full")]
    faults.append(Outcome(2, "fault", "no data"))
    assert _shared_message(faults) == "disk full (worker 0, 1)\nno data (worker 2)"


@pytest.mark.slow
def test_no_cluster_at_the_address_is_told(config_file):
    """In a process of its own: Ray keeps what it saw of the environment when it was imported."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "train", str(config_file)],
        cwd=ROOT,
        env=without_ray(RAY_ADDRESS="not an address"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "no Ray cluster answers at RAY_ADDRESS=not an address" in done.stderr
