"""What workers are told of their world, and what a launcher refuses, without a Ray."""

import signal
import subprocess
import sys
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launch.__main__ import main
from launch.compare.file import ComparisonFile
from launch.driver import GangEnd, Outcome, Refused, _Gang
from launch.gang import LaunchError, NoRoom, Place, _interface_of, environments, find_room
from launch.rank import Rank
from launch.ray_job import (
    Jobs,
    _Driver,
    _first_cause,
    _shared_message,
    _Tally,
    place_faults,
    run_job,
)
from tests.launch.conftest import ROOT, without_ray
from trainer.config import Config, LaunchConfig, load_config
from trainer.events import Stop, Warned
from trainer.goodput import Submission
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
        timeout=300,
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
        ends[:] = [GangEnd([Outcome(0, "crash", "out of memory")])]
        with pytest.raises(LaunchError, match="out of memory: not started again, as it was asked"):
            jobs.run(two, told.append, lambda: True)
    assert closed == started


def test_what_the_watcher_raises_is_not_a_lost_driver():
    """A closed pipe of the person's, or a log on a full disk: it ends there, and nobody waits."""
    driver: Any = object.__new__(_Driver)
    driver._connected = True
    driver._pipe, theirs = Pipe()
    theirs.send(Warned("something"))

    def closed(_: object) -> None:
        raise BrokenPipeError("Broken pipe")

    with pytest.raises(BrokenPipeError):
        driver.run(Config(), Submission("a", 0.0), closed, lambda: False)
    theirs.close()
    assert driver.run(Config(), Submission("a", 0.0), closed, lambda: False) is None


def test_a_driver_that_does_not_end_is_ended():
    driver: Any = object.__new__(_Driver)
    driver._process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(99)"],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
    )
    driver._end(0.1)
    assert driver._process.returncode == -signal.SIGHUP


def test_a_machine_that_leaves_is_left_though_more_room_is_waited_for(monkeypatch):
    ours, _ = Pipe()
    gang: Any = _Gang(Config(), Submission("a", 0.0), ours)
    monkeypatch.setattr("launch.driver.check_own_ray", lambda: None)
    monkeypatch.setattr("launch.driver.draining", lambda: {"first", "other"})
    gang.stop, gang.end.moved = Stop.AT_CHECKPOINT, "there is room for 4 workers"
    gang._look_around(SimpleNamespace(nodes=("first", "second"), workers=2))
    assert gang.stop == Stop.NOW
    assert gang.end.moved == "machine first is to be taken away"


def test_machines_are_asked_for_until_the_waiting_ends(monkeypatch):
    """However it ends: an autoscaler keeps what was asked for."""
    asked: list[int] = []
    monkeypatch.setattr("launch.gang.rooms", lambda _: {})
    monkeypatch.setattr("launch.gang.check_own_ray", lambda: None)
    monkeypatch.setattr("launch.gang.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("launch.gang._ask_for_machines", lambda _, count: asked.append(count))
    config = Config(launch=LaunchConfig(workers=3, wait_seconds=0.5))
    assert find_room(config, lambda _: None, lambda: bool(asked)) is None
    assert asked == [3, 0]
    with pytest.raises(NoRoom):
        find_room(config, lambda _: None, lambda: False)
    assert asked == [3, 0, 3, 0]


def test_a_machine_that_lacks_a_package_is_told_by_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "trainer.guard", None)
    board = SimpleNamespace(beat=SimpleNamespace(remote=lambda *_: None))
    environment = {"RANK": "0", "OMP_NUM_THREADS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # which it sets in its process: taken back afterwards
    kind, message = Rank.run(object.__new__(Rank), Config(), environment, board, None)
    assert kind == "fault"
    assert "cannot import what a run needs: " in message
    assert "trainer.guard" in message


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
    subprocess.run("setsid sleep 300 & setsid sleep 301 & echo $! && sleep 1", shell=True)
    print("up", flush=True)
    time.sleep(float(sys.argv[1]))
run_below(child)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["its own end", "its parent's", "a wish"])
def test_nothing_below_a_reaper_outlives_it(how):
    """Not even what has left its process group and lost its parent."""
    seconds = "5" if how == "its own end" else "300"
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
    _, left = psutil.wait_procs(below, timeout=60)
    assert not left
    parent.wait()
