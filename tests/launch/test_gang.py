"""What workers are told of their world, and what a launcher refuses, without a Ray."""

import argparse
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from launch.__main__ import main
from launch.compare.file import ComparisonFile
from launch.driver import GangEnd, Outcome, Refused
from launch.gang import LaunchError, Place, _interface_of, environments
from launch.ray_job import Jobs, _first_cause, _shared_message, _Tally, place_faults, run_job
from launch.stop import PREEMPTED, StopWatch
from launch.verbs import train as verb
from tests.launch.conftest import ROOT, without_ray
from trainer.config import Config, LaunchConfig, load_config
from trainer.settings import described, leaves_of


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
    launch = LaunchConfig()
    assert place_faults(paths, launch) == []
    launch.gpus_per_worker = 4.0
    (fault,) = place_faults(paths, launch)
    assert "4 for each of 1 workers, but this machine has " in fault
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (fault,) = place_faults(paths, launch)
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


@pytest.mark.slow
def test_a_stop_while_ray_starts_is_a_stop_in_good_order(config_file):
    """Not a cluster that does not answer: what is pre-empted then is to be started again too."""
    config = load_config(config_file, [])
    assert run_job(config, lambda _: None, lambda: True) is False


def test_one_ray_serves_several_runs(monkeypatch):
    """Until it is lost, refuses, or has room for other workers. compare on Ray does so for real."""
    ends, started, closed = [], [], []

    class Driver:
        def __init__(self) -> None:
            started.append(self)

        def run(self, *_: object) -> GangEnd | Refused | None:
            return ends.pop(0)

        def last_words(self) -> str:
            return "gone"

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("launch.ray_job._Driver", Driver)
    one, two = Config(), Config(launch=LaunchConfig(workers=2))
    one.launch = LaunchConfig(workers=1)
    told = []
    with Jobs() as jobs:

        def train(config: Config, *answers: GangEnd | Refused | None) -> int:
            """How many have been started after it."""
            ends[:] = answers
            assert jobs.run(config, told.append, lambda: False)
            return len(started)

        done = GangEnd([Outcome(0, "done")], finished=True)
        assert [train(one, done), train(one, done)] == [1, 1]
        assert train(one, None, done) == 2
        assert "Ray itself was lost (gone): starting all workers again" in str(told[0])
        assert train(two, done) == 3
        with pytest.raises(LaunchError, match="no room"):
            train(two, Refused("no room"))
        assert train(two, done) == 4
    assert closed == started


def _end(*outcomes: Outcome) -> GangEnd:
    return GangEnd(list(outcomes))


def test_the_first_cause_is_told_not_what_others_saw_of_it():
    cut = Outcome(0, "cut", "gloo: Connection closed by peer", "a", 40)
    lost = Outcome(1, "lost", "its process was lost while computing", "b", 40)
    crash = Outcome(2, "crash", "Traceback ... ZeroDivisionError", "c", 40)
    assert _first_cause(_end(cut, lost)) == f"worker 1 on b after step 40: {lost.message}"
    assert _first_cause(_end(cut, crash)) == f"worker 2 on c after step 40: {crash.message}"
    assert _first_cause(_end(cut)) == f"worker 0 on a after step 40: {cut.message}"
    with pytest.raises(LaunchError, match=r"disk full \(worker 2\)"):
        _first_cause(_end(cut, lost, Outcome(2, "fault", "disk full")))


def test_failures_are_counted_since_the_last_new_checkpoint():
    tally = _Tally(2)
    # each pair of failures, then a new checkpoint, one amid a step too
    for resumed_at in ((0, 0), (0, 0), (10, 0), (10, 0), (10, 70), (10, 70), (20, 0)):
        tally.started_at(*resumed_at)
        tally.fail("lost")
    tally.fail("lost")
    assert str(tally) == "2 of 2"
    with pytest.raises(LaunchError, match=r"lost \(launch.max_failures 2 restarts brought no new"):
        tally.fail("lost")


def test_an_address_has_its_interface():
    assert _interface_of("127.0.0.1") == "lo"
    assert _interface_of("203.0.113.9") == ""


def test_what_a_user_sets_of_the_collectives_is_passed_on(monkeypatch):
    place = Place("n1", "10.0.0.1", 4001, "host", "eth7")
    assert environments([place], 1)[0]["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib1")
    told = environments([place], 1)[0]
    assert (told["NCCL_SOCKET_IFNAME"], told["GLOO_SOCKET_IFNAME"]) == ("ib0", "ib1")


@pytest.mark.parametrize(
    ("number", "preempted"),
    [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)],
)
def test_a_person_stops_and_a_machine_preempts(number, preempted, capsys):
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        watch = StopWatch("stopping")
        assert not watch()
        os.kill(os.getpid(), number)
        assert watch()
        assert watch.preempted == preempted
        assert "stopping" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for wish, handler in kept.items():
            signal.signal(wish, handler)


def test_time_is_a_limit_too(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    watch = StopWatch("stopping", max_seconds=0.05)
    assert not watch()
    time.sleep(0.06)
    assert watch()
    assert watch.preempted
    assert "run.max_seconds have passed" in capsys.readouterr().out


@pytest.mark.parametrize("preempted", [True, False])
def test_train_exits_with_75_where_a_machine_preempts(config_file, monkeypatch, capsys, preempted):
    """And as a run that ended where a person asked; the wish is heard, and the time limit known."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    limits: list[float] = []

    def run_job(config: Config, on_event: Any, should_stop: StopWatch) -> bool:
        limits.append(should_stop._deadline - time.monotonic())
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM if preempted else signal.SIGINT)
        return not should_stop()

    monkeypatch.setattr("launch.verbs.train.run_job", run_job)
    command = argparse.Namespace(config=str(config_file), overrides=["run.max_seconds=60"])
    try:
        assert verb.run(command) == (PREEMPTED if preempted else 0)
    finally:
        for wish, handler in kept.items():
            signal.signal(wish, handler)
    assert "stopped in good order" in capsys.readouterr().out
    assert 50 < limits[0] <= 60


def test_every_key_is_told(capsys):
    said = {row[0] for row in described(ComparisonFile)}
    assert said == {name for name, _ in leaves_of(ComparisonFile)}
    assert main(["keys", "seq_len"]) == 0
    out = capsys.readouterr().out
    assert "train.seq_len=16384\n    int, above 0: tokens per sequence" in out
    assert "compare.dir" not in out
    assert main(["keys", "no_such_key"]) == 1


_CHILD = """
import os, subprocess, sys, time
from launch.reaper import run_below
def child():
    # loses its parent, and is in a session of its own
    subprocess.run("setsid sleep 300 & setsid sleep 301 & echo $! && sleep 0.2", shell=True)
    print("up", flush=True)
    time.sleep(float(sys.argv[1]))
run_below(child)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["its own end", "its parent's", "a wish"])
def test_nothing_below_a_reaper_outlives_it(how):
    """Not even what has left its process group and lost its parent."""
    seconds = "0.5" if how == "its own end" else "300"
    reaper = [sys.executable, "-c", _CHILD, seconds]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({reaper!r})"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    assert parent.stdout.readline().strip().isdigit()
    assert parent.stdout.readline() == "up\n"
    below = psutil.Process(parent.pid).children(recursive=True)
    assert {"300", "301"} <= {process.cmdline()[-1] for process in below}
    if how == "its parent's":
        parent.kill()
    if how == "a wish":
        below[0].send_signal(signal.SIGHUP)
    _, left = psutil.wait_procs(below, timeout=5)
    assert not left
    parent.wait()
