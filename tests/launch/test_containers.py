"""make test-containers: docker/ as it is, a cluster of two machines with a network of their own.

With Docker where its engine answers, else with podman.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import RAY, ROOT, wait_for, without_ray

pytestmark = [pytest.mark.slow, pytest.mark.soak]

TRAIN = "python -m launch train configs/demo.yaml data.path=/shared/data model.layers=2"
OPTIONS = [
    "train.seq_len=4096",
    "train.steps=1000000",
    "checkpoint.every=20",
    "evaluate.sequences=0",
    "train.dtype=fp32",
    "launch.min_workers=1",
    "launch.wait_seconds=3",
    "launch.silence_seconds=10",
]
# Where containers are nested in another one, crun and podman's own limits ask for too much; and
# containers find each other by name with netavark and aardvark-dns alone.
PODMAN_SETTINGS = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
[network]
network_backend = "netavark"
"""


class Cluster:
    """What compose.yaml stands up, and jobs that are submitted to it."""

    def __init__(self, folder: Path) -> None:
        docker = shutil.which("docker")
        if docker and not subprocess.run([docker, "info"], capture_output=True).returncode:
            self.engine, compose = "docker", ["docker", "compose"]
        else:
            self.engine, compose = "podman", [sys.executable, "-m", "podman_compose"]
        self.compose = [*compose, "--file", "docker/compose.yaml"]
        self.token = secrets.token_hex(32)
        self.environment = without_ray(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=self.token,
            RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265",
        )
        if self.engine == "podman" and shutil.which("runc") and "CONTAINERS_CONF" not in os.environ:
            settings = folder / "containers.conf"
            settings.write_text(PODMAN_SETTINGS)
            self.environment["CONTAINERS_CONF"] = str(settings)
        extra = shlex.split(os.environ.get("LONGHAUL_BUILD", ""))
        for target in ("cpu", "gpu"):
            tag = ["--target", target, "--tag", f"longhaul:{target}"]
            build = [self.engine, "build", *extra, "--file", "docker/Dockerfile", *tag, "."]
            self.run(build, seconds=1800)
        self.run([*self.compose, "up", "--detach", "--no-build"])
        wait_for(lambda: self.submit("true").returncode == 0, 120)
        nodes = "import ray; ray.init(); print('alive', sum(n['Alive'] for n in ray.nodes()))"
        wait_for(lambda: "alive 2" in self.inside(f'RAY_ADDRESS=auto python -c "{nodes}"'), 60)

    def run(self, command: list[str], seconds: float = 300) -> str:
        done = self._run(command, seconds)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, command: str, seconds: float = 300, **extra: str) -> Any:
        job = [RAY, "job", "submit", "--working-dir", ".", "--", *command.split()]
        return self._run(job, seconds, **extra)

    def start(self, command: str) -> str:
        """Submit a job and go on; its id."""
        job = [RAY, "job", "submit", "--no-wait", "--working-dir", ".", "--", *command.split()]
        found = re.search(r"raysubmit_\w+", self.run(job))
        assert found
        return found[0]

    def ended(self, job: str) -> str:
        """What a job has printed, when it has ended."""

        def over() -> bool:
            said = self.run([RAY, "job", "status", job])
            return any(word in said for word in ("succeeded", "failed", "stopped"))

        wait_for(over, 120)
        return self.run([RAY, "job", "logs", job])

    def inside(self, command: str, machine: str = "head") -> str:
        return self.run([self.engine, "exec", self._name(machine), "sh", "-c", command])

    def lines(self, path: str) -> list[dict[str, Any]]:
        """Of a .jsonl file on the shared volume; none while there is no file."""
        return [json.loads(line) for line in self.inside(f"cat {path} || true").splitlines()]

    def machine(self, verb: str) -> None:
        """Kill or start the container that is not the head."""
        self.run([self.engine, verb, self._name("machine")])

    def stop(self) -> None:
        self._run([*self.compose, "down", "--volumes"], 120)

    def _name(self, service: str) -> str:
        return ("-" if self.engine == "docker" else "_").join(("longhaul", service, "1"))

    def _run(self, command: list[str], seconds: float, **extra: str) -> Any:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **extra},
            capture_output=True,
            text=True,
            timeout=seconds,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("containers"))
    try:
        prepared = cluster.submit("python -m data_prep stdlib --out /shared/data --held-out 0.05")
        assert prepared.returncode == 0, prepared.stdout + prepared.stderr
        yield cluster
    finally:
        cluster.stop()


def test_a_user_without_rights_with_a_compiler(cluster):
    assert cluster.inside("id -u").strip() == "1000"
    assert cluster.inside("g++ --version", "machine").startswith("g++")


def test_a_job_without_the_token_is_refused(cluster):
    for wrong in (secrets.token_hex(32), ""):
        refused = cluster.submit("true", RAY_AUTH_TOKEN=wrong)
        assert refused.returncode != 0
        assert "authenticat" in (refused.stdout + refused.stderr).lower()


def test_the_doctor_finds_both_machines_fit(cluster):
    doctor = cluster.submit(
        "python -m launch doctor configs/demo.yaml data.path=/shared/data run.dir=/shared/runs/d"
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    print(doctor.stdout)
    for said in (
        r"ok +cluster: 2 machines, 2 with room; 2 workers, dp=1 x sp=2, would run on 2",
        r"ok +ports: every machine reaches",
        r"ok +run.dir: all see what each writes",
        r"ok +data.path: /shared/data is the same on all machines",
        r"ok +network: \w+ - \w+: [\d,]+ µs, [\d.]+ GB/s",
        r"ok +trial: 2 steps with dp=1 x sp=2, native scan",
        r"fit for this run",
    ):
        assert re.search(said, doctor.stdout), said
    assert "doctor" not in cluster.inside("ls /shared/runs || true")


def test_a_machine_is_killed_and_comes_back(cluster):
    """The run goes on with the other, takes it in again, and is the run that would have been."""
    run, alone = "/shared/runs/run", "/shared/runs/alone"
    job = cluster.start(f"{TRAIN} run.dir={run} {' '.join(OPTIONS)}")

    def steps() -> int:
        return len(cluster.lines(f"{run}/metrics.jsonl"))

    def workers() -> list[int]:
        return [line["workers"] for line in cluster.lines(f"{run}/starts.jsonl")]

    wait_for(lambda: steps() > 40, 120)
    began = time.monotonic()
    cluster.machine("kill")
    wait_for(lambda: workers()[-1:] == [1], 120)
    print(f"machine killed: first new step after {time.monotonic() - began:.1f} s")
    at = steps()
    wait_for(lambda: steps() > at + 20)
    began = time.monotonic()
    cluster.machine("start")
    wait_for(lambda: workers()[-1] == 2, 120)
    print(f"machine back: taken in after {time.monotonic() - began:.1f} s")
    assert cluster.lines(f"{run}/starts.jsonl")[-1]["lost_steps"] == 0
    at = steps()
    wait_for(lambda: steps() > at + 20)
    cluster.run([RAY, "job", "stop", job])
    said = cluster.ended(job)
    assert "stopped in good order" in said, said

    lines = cluster.lines(f"{run}/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert f"step-{len(lines):06d}" in cluster.inside(f"ls {run}/checkpoints")
    undisturbed = cluster.submit(
        f"{TRAIN} run.dir={alone} {' '.join(OPTIONS)} train.stop_after={len(lines)}"
    )
    assert undisturbed.returncode == 0, undisturbed.stdout
    for mine, theirs in zip(lines, cluster.lines(f"{alone}/metrics.jsonl"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3), mine["step"]
    assert cluster.lines(f"{run}/sequences.jsonl") == cluster.lines(f"{alone}/sequences.jsonl")


def test_the_token_is_in_no_file(cluster):
    """After all jobs: not in logs, runs, configurations or what Ray keeps."""
    for machine in ("head", "machine"):
        where = "/shared /tmp /home /opt/longhaul/bin"
        found = cluster.inside(f"grep -rlF {cluster.token} {where} 2>/dev/null || true", machine)
        assert not found, found
