"""What a person types: train, stop, resume, generate, and a job submitted from outside."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.launch.conftest import RAY, ROOT, Head, wait_for, without_ray
from tests.test_readme import job_command
from tests.trainer.runs import figures
from tests.trainer.runs import run as run_ranks
from trainer.run_folder import read_lines

pytestmark = pytest.mark.slow

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
    "seq_len",
    "exchange_seconds",
    "save_seconds",
    "elapsed_seconds",
    "goodput",
    "restarts",
    "skipped_steps",
    "peak_memory_bytes",
    "mfu",
    "eta_seconds",
}
TRAIN = [sys.executable, "-m", "launch", "train"]


@pytest.fixture
def launch(head, monkeypatch, capfd):
    """`python -m launch` in this process, which has imported what it needs, on the tests' Ray.

    Returns the exit status, what it printed, and what it wrote to stderr.
    """
    for name, value in head.joined.items():
        if name.startswith("RAY_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the verbs would take them

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        return status, *capfd.readouterr()

    return run


def _steps(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in _steps(run)]


def _uninterrupted(config_file: Path, options: list[str]) -> list[float]:
    """The losses of the same run on two plain processes, without Ray and without a stop."""
    events = run_ranks(config_file, 2, *options, f"run.dir={config_file.parent / 'straight'}")
    return [loss for loss, _ in figures(events)]


def test_train_reports_and_generate_continues(config_file, launch):
    """The run's folder is complete, and every step has all its figures."""
    run = config_file.parent / "run"
    status, out, err = launch("train", str(config_file), "launch.workers=2", "parallel.sp=2")
    assert status == 0, err
    assert "96 tokens of every sequence per worker" in out
    assert re.search(r"bigram +\d\.\d{4} nats +\d\.\d{4} bits per byte", out)
    assert "tensorboard --logdir" in out
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
    asked = ("generate", str(run), "--prompt-file", str(prompt), "--max-tokens", "20")
    status, made, err = launch(*asked)
    assert status == 0, err
    assert launch(*asked)[1] == made
    assert len(made) > 1


def test_generate_says_what_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch", "generate", str(tmp_path), "--prompt", "x"],
        cwd=ROOT,
        env=without_ray(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "is not the folder of a run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_the_run_is_one_message(config_file, launch):
    """It reaches the person without a traceback, and the run is not tried again."""
    options = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "optim.clip=0"]
    status, _, err = launch(
        "train", str(config_file), *options, "launch.workers=2", "parallel.sp=2"
    )
    assert status == 1
    assert len(re.findall(r"is nan at step|is inf at step", err)) == 1
    assert "(worker 0, 1)" in err
    assert "Traceback" not in err


def test_interrupted_then_resumed_equals_uninterrupted(config_file, head, launch):
    """Ctrl-C stops after a checkpoint; the same command goes on, to the bit."""
    options = ["launch.workers=2", "parallel.sp=2", "train.steps=120", "evaluate.sequences=0"]
    command = [*TRAIN, str(config_file), *options]
    run = config_file.parent / "run"
    driver = subprocess.Popen(command, cwd=ROOT, env=head.joined, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(_steps(run)) >= 5)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0
    assert "stopped in good order" in output
    stopped_at = len(_steps(run))
    assert 5 <= stopped_at < 120
    assert launch("train", str(config_file), *options)[0] == 0
    assert _losses(run) == _uninterrupted(config_file, options)


def test_lost_workers_are_named_and_replaced(config_file, head):
    """Dead, then hung: the gang starts again from the last checkpoint, and goes on to the bit."""
    options = ["launch.workers=2", "parallel.sp=2", "train.steps=120", "evaluate.sequences=0"]
    options += ["checkpoint.every=10", "parallel.timeout_seconds=15"]
    run = config_file.parent / "run"
    driver = subprocess.Popen(
        [*TRAIN, str(config_file), *options],
        cwd=ROOT,
        env=head.joined,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for how, step in ((signal.SIGKILL, 15), (signal.SIGSTOP, 35)):
        wait_for(lambda step=step: len(_steps(run)) >= step)
        workers = head.processes("ray::Rank")
        assert len(workers) == 2
        workers[1].send_signal(how)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    for told in ("its process was lost", "did not answer for"):
        # a new checkpoint lies between the two, so each is the first
        again = r"starting all workers again from the last checkpoint \(1 of 3\)"
        assert re.search(rf"warning: worker [01] on \S+ after step \d+: {told}.*{again}", errors)
    assert _losses(run) == _uninterrupted(config_file, options)


def test_job_submitted_from_outside(head: Head, config_file, dataset):
    """The command of the README trains on the cluster."""
    environment = head.environment
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
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(_steps(run)) == 5
    assert json.loads((run / "evaluation.json").read_text())["step"] == 5
    token = head.environment["RAY_AUTH_TOKEN"]
    assert token not in done.stdout + done.stderr
    for written_file in (p for p in run.rglob("*") if p.is_file()):
        assert token.encode() not in written_file.read_bytes(), written_file


def test_a_job_without_the_token_is_refused(head: Head):
    for wrong in ("not the token", ""):
        job = [RAY, "job", "submit", "--", "true"]
        refused = subprocess.run(
            job,
            env={**head.environment, "RAY_AUTH_TOKEN": wrong},
            capture_output=True,
            text=True,
        )
        assert refused.returncode != 0
        assert "authentication" in (refused.stdout + refused.stderr).lower()


def test_a_relative_run_folder_is_refused_on_a_cluster(config_file, launch):
    """Workers start in folders of their own, which Ray deletes."""
    status, _, err = launch("train", str(config_file), "run.dir=runs/here")
    assert status == 1
    assert "give an absolute path on storage that all of them share" in err
    here = [f"run.dir={config_file.parent / 'run'}", "data.cache=cache"]
    status, _, err = launch("train", str(config_file), *here)
    assert status == 1
    assert "data.cache" in err
