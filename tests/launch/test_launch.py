"""What a person types: train, stop, resume, generate, and a job submitted from outside."""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed import free_port
from tests.test_readme import job_command
from tests.trainer.runs import figures
from tests.trainer.runs import run as run_ranks
from trainer.run_folder import read_lines

ROOT = Path(__file__).parents[2]
METRICS = {
    "step",
    "loss",
    "tokens",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "tokens_per_second_per_worker",
    "step_seconds",
    "data_seconds",
    "exchange_seconds",
    "peak_memory_bytes",
    "mfu",
    "eta_seconds",
}
TRAIN = [sys.executable, "-m", "launch", "train"]


def _environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, **extra}


def _launch(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_environment(),
        timeout=timeout,
    )


def _wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def _steps(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in _steps(run)]


def _uninterrupted(config_file: Path, options: list[str]) -> list[float]:
    """The losses of the same run on two plain processes, without Ray and without a stop."""
    events = run_ranks(config_file, 2, *options, f"run.dir={config_file.parent / 'straight'}")
    return [loss for loss, _ in figures(events)]


def test_train_reports_and_generate_continues(config_file):
    """The run's folder is complete, and its figures are those that DESIGN.md names."""
    run = config_file.parent / "run"
    done = _launch("train", str(config_file), "launch.workers=2", "parallel.sp=2")
    assert done.returncode == 0, done.stderr
    assert "96 tokens of every sequence per worker" in done.stdout
    assert re.search(r"bigram +\d\.\d{4} nats +\d\.\d{4} bits per byte", done.stdout)
    assert "tensorboard --logdir" in done.stdout
    for name in ("config.yaml", "report.md", "loss.png", "samples.txt", "evaluation.json"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    lines = _steps(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert set(lines[0]) == METRICS
    assert lines[-1]["tokens"] == 5 * 2 * 192
    assert 0 < lines[-1]["exchange_seconds"] < lines[-1]["step_seconds"]

    prompt = config_file.parent / "prompt.txt"
    prompt.write_text("carry scan shard " * 1000)  # longer than one segment
    made = _launch("generate", str(run), "--prompt-file", str(prompt), "--max-tokens", "20")
    assert made.returncode == 0, made.stderr
    again = _launch("generate", str(run), "--prompt-file", str(prompt), "--max-tokens", "20")
    assert made.stdout == again.stdout
    assert len(made.stdout) > 1


def test_generate_says_what_is_wrong(tmp_path):
    done = _launch("generate", str(tmp_path), "--prompt", "x")
    assert done.returncode == 1
    assert "is not the folder of a run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_the_run_is_one_message(config_file):
    """It reaches the person without a traceback, and the run is not tried again."""
    options = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "optim.clip=0"]
    done = _launch("train", str(config_file), *options, "launch.workers=2", "parallel.sp=2")
    assert done.returncode == 1
    assert len(re.findall(r"is nan at step|is inf at step", done.stderr)) == 1
    assert "(worker 0, 1)" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_then_resumed_equals_uninterrupted(config_file):
    """Ctrl-C stops after a checkpoint; the same command goes on, to the bit."""
    options = ["launch.workers=2", "parallel.sp=2", "train.steps=150", "evaluate.sequences=0"]
    command = [*TRAIN, str(config_file), *options]
    run = config_file.parent / "run"
    driver = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True
    )
    _wait_for(lambda: len(_steps(run)) >= 5)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert "stopped in good order" in output
    stopped_at = len(_steps(run))
    assert 5 <= stopped_at < 150
    assert _launch("train", str(config_file), *options).returncode == 0
    assert _losses(run) == _uninterrupted(config_file, options)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_lost_worker_is_named_and_replaced(config_file, how):
    """Dead or hung: the gang starts again from the last checkpoint, and goes on to the bit."""
    options = ["launch.workers=2", "parallel.sp=2", "train.steps=80", "evaluate.sequences=0"]
    options += ["checkpoint.every=10", "parallel.timeout_seconds=6"]
    run = config_file.parent / "run"
    driver = subprocess.Popen(
        [*TRAIN, str(config_file), *options],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: len(_steps(run)) >= 25)
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [p for p in children if "_Worker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(how)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert "starting all workers again from the last checkpoint (1 of 3)" in errors
    said = "its process was lost" if how == signal.SIGKILL else "did not answer for"
    assert re.search(rf"warning: worker [01]: {said}", errors)
    assert _losses(run) == _uninterrupted(config_file, options)


@pytest.fixture
def head(tmp_path):
    """A Ray head of our own on loopback, with token authentication."""
    environment = _environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # else it binds to the network's address
        RAY_USAGE_STATS_ENABLED="0",
        # the cluster's Python is this one
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    port, dashboard = free_port(), free_port()
    ray = str(Path(sys.executable).parent / "ray")
    command = f"{ray} start --head --block --port={port} --ray-client-server-port={free_port()} "
    command += f"--dashboard-host=127.0.0.1 --dashboard-port={dashboard} --num-cpus=2 "
    command += "--include-dashboard=true --object-store-memory=100000000 --disable-usage-stats"
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command.split(), env=environment, stdout=log, stderr=log)
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        listing = [ray, "job", "list"]
        _wait_for(
            lambda: subprocess.run(listing, env=environment, capture_output=True).returncode == 0
        )
        yield environment
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_job_submitted_from_outside(head, config_file, dataset):
    """The command of the README trains on the cluster; a relative run folder is refused."""
    environment = head
    run = config_file.parent / "run"
    written = job_command().replace("configs/demo.yaml", str(config_file))
    written = written.replace("/shared/runs/demo", str(run))
    command = [*shlex.split(written.replace("/shared/data/stdlib", str(dataset)))]
    command += ["launch.workers=2", "parallel.sp=2"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(_steps(run)) == 5
    assert json.loads((run / "evaluation.json").read_text())["step"] == 5

    refused = subprocess.run(
        [*command, "run.dir=runs/here"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode != 0
    assert "give an absolute path on storage that all of them share" in refused.stdout
