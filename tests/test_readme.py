"""Every command that the README shows is run, made small."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = (
    "train.steps=3 train.seq_len=512 model.width=16 model.layers=1 evaluate.sequences=2 "
    "checkpoint.every=3 optim.warmup_steps=1"
)
SMALL_COMPARISON = (
    "compare.lengths=[256] compare.tokens_per_step=256 compare.repetitions=1 compare.steps=1 "
    "compare.decode_tokens=2 compare.cell_timeout_seconds=300 compare.tasks={} "
    "compare.mixers=[attention,mingru] "
    "model.width=32 model.window=16"
)
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    """The lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def job_command() -> str:
    (command,) = [c for c in commands() if c.startswith("ray job submit")]
    return command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a newcomer has it: no data, no runs."""
    folder = tmp_path_factory.mktemp("checkout") / "longhaul"
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def run(command: str, folder: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept["PATH"] = f"{BIN}:{kept['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=kept, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def small(command: str) -> str:
    """The same command on a run of three steps, or on cells of 256 tokens."""
    if "launch compare" in command:
        return f"{command} {SMALL_COMPARISON}"
    return f"{command} {SMALL}" if "configs/" in command else command


def test_every_command_is_known():
    """A command that no test runs must not stand in the README.

    The job is submitted in tests/launch/test_launch.py, the others below.
    """
    known = ("make train", "make test", "python -m ", "torchrun ", "ray job submit ", "tensorboard")
    found = commands()
    assert len(found) >= 8
    for command in found:
        assert command.startswith(known), command
    assert found[:2] == ["make train", "make test"]


def test_make_targets_run_what_the_readme_says():
    """`make train` is its two steps, both run below; `make test` is this test run."""
    recipe = run("make -n train VENV=.v", ROOT)
    assert "python -m data_prep stdlib --out data/stdlib" in recipe
    assert "python -m launch train configs/demo.yaml" in recipe
    recipe = run("make -n test VENV=.v", ROOT)
    assert ".v/bin/python -m pytest" in recipe
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_commands_work_in_the_order_of_the_page(checkout):
    """From a fresh checkout: prepare, verify, train, generate, torchrun."""
    ran = 0
    for command in commands():
        if command.startswith(("python -m ", "torchrun ")):
            ran += 1
            shown = run(small(command), checkout)
            if "-m launch train" in command:
                assert "bits per byte" in shown
            if "-m launch compare" in command:
                assert "mingru trains faster than attention" in shown
    assert ran >= 5
    tensorboard = next(c for c in commands() if c.startswith("tensorboard"))
    folder = shlex.split(tensorboard)[-1]
    assert any("tfevents" in path.name for path in (checkout / folder).rglob("*"))
    assert run("tensorboard --version_tb", checkout)
