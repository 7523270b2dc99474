"""What a person is told of a cluster before a long run."""

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from launch import doctor
from launch.doctor import _Patients, same
from launch.gang import Place
from tests.distributed import run_distributed
from tests.launch.conftest import ROOT, Head, without_ray
from trainer import probe
from trainer.config import Config
from trainer.run_folder import RunFolder

DOCTOR = [sys.executable, "-m", "launch", "doctor"]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_pair_meets_once_and_none_is_in_two_at_a_time(n):
    rounds = probe.rounds(n)
    assert len(rounds) <= n
    assert sorted(pair for pairs in rounds for pair in pairs) == [
        (a, b) for a in range(n) for b in range(a + 1, n)
    ]
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))


def _measure() -> tuple[list[probe.Link], probe.Collectives]:
    return probe.measure(Config())


def test_every_pair_and_all_together_are_measured():
    for links, together in run_distributed(_measure, 3):
        assert sorted(link.ranks for link in links) == [(0, 1), (0, 2), (1, 2)]
        assert all(0 < link.latency_seconds < 1 for link in links)
        assert all(link.bytes_per_second > 1e6 for link in links)
        assert together.gather_seconds > 0
        assert together.reduce_bytes_per_second > 1e6


def test_what_another_machine_wrote_is_seen_whole_or_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "SEEN_SECONDS", 0.3)
    monkeypatch.setattr(probe, "MARK_BYTES", 1 << 20)
    assert probe.leave_mark(str(tmp_path / "run"), "0.mark") > 0
    (tmp_path / "run/1.mark").write_bytes(b"not all of it")
    missing = probe.missing_marks(str(tmp_path / "run"), ["0.mark", "1.mark", "2.mark"])
    assert missing == ["1.mark", "2.mark"]


def test_a_closed_port_is_told():
    door = probe.Door("127.0.0.1")
    assert probe.unreachable([door.address]) == {}
    door._socket.close()
    faults = probe.unreachable([door.address])
    assert re.search(f"port {door.address[1]}: .*refused", faults[0])


def test_storage_that_does_not_keep_what_it_is_given_is_told(tmp_path, monkeypatch):
    assert probe.remote_seconds(f"file://{tmp_path}/kept", "doctor") < 1
    assert not list((tmp_path / "kept").iterdir())
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"checkpoint\.remote"):
        probe.remote_seconds(f"file://{tmp_path}/file/below", "doctor")
    monkeypatch.setattr(LocalFileSystem, "cat_file", lambda *_, **__: b"something else")
    with pytest.raises(OSError, match=r"checkpoint\.remote .*does not read as written"):
        probe.remote_seconds(f"file://{tmp_path}/forgets", "doctor")


def test_a_machine_that_differs_is_named():
    assert same("software", {"a": "torch 2", "b": "torch 2"}).level == "ok"
    finding = same("software", {"a": "torch 2", "b": "torch 1", "c": "torch 2"})
    assert finding.level == "fault"
    assert "b has torch 1; 2 of 3 have torch 2" in finding.said


class Sick(_Patients):
    """Two machines, a and b, that answer as a test says: by question, (value, fault) of each."""

    def __init__(self, **answers: list[tuple[Any, str]]) -> None:
        def probe(number: int) -> SimpleNamespace:
            ask = SimpleNamespace(remote=lambda name, *_, **__: answers[name][number])
            door = SimpleNamespace(remote=lambda address: (address, 7))
            return SimpleNamespace(ask=ask, open_door=door)

        places = [Place("1", "10.0.0.1", 1, "a"), Place("2", "10.0.0.2", 1, "b")]
        super().__init__(Config(), [probe(0), probe(1)], places)

    def collect(self, waiting: list[Any]) -> tuple[dict[str, Any], dict[str, str]]:
        both = list(zip(self.names, waiting, strict=True))
        answers = {name: value for name, (value, fault) in both if not fault}
        return answers, {name: fault for name, (_, fault) in both if fault}


@pytest.mark.parametrize(
    ("examination", "answers", "said"),
    [
        ("_machines", {"describe": [(None, "no answer"), (None, "torch is lacking")]}, "b: torch"),
        (
            "_ports",
            {"unreachable": [({1: "port 7: refused"}, ""), ({}, "")]},
            "a: does not reach b",
        ),
        ("_storage", {"leave_mark": [(1.0, ""), (None, "read-only")]}, "b: read-only"),
        (
            "_storage",
            {"leave_mark": [(1.0, "")] * 2, "missing_marks": [(["1.mark"], ""), ([], "")]},
            "a: does not see in runs/demo.doctor what b wrote",
        ),
        ("_data", {"data_identity": [("this", ""), ("that", "")]}, "not the same on all machines"),
        ("_data", {"data_identity": [("this", ""), (None, "is not there")]}, "b: is not there"),
        ("_remote", {"remote_seconds": [(0.1, ""), (None, "no access")]}, "b: no access"),
        ("_network", {"measure": [(None, "timed out"), (None, "timed out")]}, "a: timed out"),
    ],
)
def test_what_is_wrong_with_a_machine_is_a_fault_by_its_name(
    examination, answers, said, monkeypatch
):
    monkeypatch.setattr("ray.get", lambda waiting, **_: waiting)
    patients = Sick(**answers)
    patients.config.run.dir, patients.config.checkpoint.remote = "runs/demo", "s3://there"
    findings = list(getattr(doctor, examination)(patients))
    assert sum(each.level == "fault" and said in each.said for each in findings) == 1
    assert not any("all see" in each.said or "every machine" in each.said for each in findings)


@pytest.mark.parametrize(("free", "level"), [(10 << 30, "ok"), (1 << 10, "fault")])
def test_a_disk_without_room_for_checkpoints_is_a_fault(tmp_path, monkeypatch, free, level):
    config = Config()
    config.run.dir = str(tmp_path / "run")
    saved = tmp_path / "run.doctor/checkpoints/step-000001"
    saved.mkdir(parents=True)
    (saved / "weights").write_bytes(bytes(5000))
    monkeypatch.setattr(RunFolder, "saved", lambda _: [saved])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    (finding,) = doctor._room_for_checkpoints(config)
    assert finding.level == level


@pytest.mark.slow
def test_a_cluster_is_examined(head: Head, config_file):
    """All is well; and a run for which there is no room is told at once."""

    def examined(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*DOCTOR, str(config_file), "launch.workers=2", "parallel.sp=2", *options],
            cwd=ROOT,
            env=without_ray(**head.joined),
            capture_output=True,
            text=True,
        )

    left = config_file.parent / "run.doctor"  # of a doctor that was killed
    left.mkdir()
    (left / "config.yaml").write_text("model: {width: 8}")
    fit = examined(f"checkpoint.remote=file://{config_file.parent}/remote")
    assert fit.returncode == 0, fit.stdout + fit.stderr
    subjects = [line.split()[1].rstrip(":") for line in fit.stdout.splitlines()[:-1]]
    assert subjects == [
        *("cluster", "machine", "software", "clocks", "ports", "run.dir", "data.path"),
        *("checkpoint.remote", "network", "trial", "checkpoints"),
    ]
    assert fit.stdout.splitlines()[-1] == "fit for this run"
    assert not list(config_file.parent.glob("run*"))

    large = examined("launch.workers=64", "train.batch_size=64")
    assert large.returncode == 1
    assert "not fit for this run: cluster" in large.stdout
