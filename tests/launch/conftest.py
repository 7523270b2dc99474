"""One Ray for all tests of this room: a head on loopback with token authentication."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.distributed import free_port

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
# `ray start` has fixed ports for these: two Rays of one machine would meet there.
PORTS = (
    "port",
    "object-manager-port",
    "node-manager-port",
    "ray-client-server-port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


def without_ray(**extra: str) -> dict[str, str]:
    """This process's environment, knowing of no Ray."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, **extra}


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


class Head:
    """A Ray head of our own, and what a process needs to join it or to submit jobs to it."""

    def __init__(self, log: Path) -> None:
        ports = {name: free_port() for name in PORTS}
        self.environment = without_ray(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # else it binds to the network's address
            RAY_USAGE_STATS_ENABLED="0",
            # the cluster's Python is this one
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        command = [RAY, "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--num-cpus=4"]
        command += ["--include-dashboard=true", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats", *(f"--{name}={port}" for name, port in ports.items())]
        with log.open("w") as f:
            self.process = subprocess.Popen(command, env=self.environment, stdout=f, stderr=f)
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.joined = {**self.environment, "RAY_ADDRESS": f"127.0.0.1:{ports['port']}"}
        # the last to come up is the agent that starts jobs: try one
        wait_for(lambda: self.submit("true").returncode == 0)

    def submit(self, command: str) -> subprocess.CompletedProcess[str]:
        job = [RAY, "job", "submit", "--", command]
        return subprocess.run(job, env=self.environment, capture_output=True, text=True)

    def processes(self, named: str) -> list[psutil.Process]:
        """Those below the head whose command line has the name."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended, or is a zombie
                if named in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=120)


class Machines:
    """A cluster of machines with one CPU each, on loopback: each a raylet, added and killed."""

    _SERVER = """
import sys
from ray.cluster_utils import Cluster
size = {"num_cpus": 1, "object_store_memory": 100_000_000}
cluster, added = Cluster(), []
cluster.add_node(include_dashboard=False, **size)
print("cluster", cluster.address, flush=True)
for line in sys.stdin:
    if line == "add\\n":
        added.append(cluster.add_node(**size))
    elif line == "name\\n":
        print("named", added[-1].node_id, flush=True)
        continue
    else:
        cluster.remove_node(added.pop(), allow_graceful=False)
    print("done", flush=True)
"""

    def __init__(self) -> None:
        self.environment = without_ray(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_USAGE_STATS_ENABLED="0",
        )
        self._server = subprocess.Popen(
            [sys.executable, "-c", self._SERVER],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.environment["RAY_ADDRESS"] = self._answer("cluster").split()[1]

    def ask(self, word: str) -> None:
        """`add` a machine, or `kill` the last that was added."""
        self._write(word)
        self._answer("done")

    def _write(self, word: str) -> None:
        assert self._server.stdin
        self._server.stdin.write(f"{word}\n")
        self._server.stdin.flush()

    def drain(self) -> None:
        """Tell the cluster that the last machine that was added is to be taken away."""
        self._write("name")
        node = self._answer("named").split()[1]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        deadline = ["--deadline-remaining-seconds", "600"]
        command = [RAY, "drain-node", "--node-id", node, *reason, *deadline]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def _answer(self, word: str) -> str:
        assert self._server.stdout
        while not (line := self._server.stdout.readline()).startswith(word):
            assert line, "the cluster has ended"
        return line

    def stop(self) -> None:
        below = psutil.Process(self._server.pid).children(recursive=True)
        for process in [psutil.Process(self._server.pid), *below]:
            process.kill()


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("ray") / "head.log")
    try:
        yield head
    finally:
        head.stop()
