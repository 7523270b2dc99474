"""The examples of the documents run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.trainer.runs import run as train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def example(page: str, number: int = 0) -> str:
    """A Python block of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[number]


def run(code: str, tmp_path: Path, *command: str) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [*(command or (sys.executable,)), str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_scan_in_a_script(tmp_path):
    run(example("models/scan/README.md"), tmp_path)


def test_a_mixer_in_a_model_of_ones_own_and_sharded_over_two_processes(tmp_path):
    model = example("models/README.md")
    run(model, tmp_path)
    sharded = f"{model}\n{example('trainer/parallel/README.md')}"
    assert len(example("trainer/parallel/README.md").splitlines()) <= 30
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    run(sharded, tmp_path, *torchrun, *address)


def test_a_model_of_ones_own_streams(tmp_path):
    streamed = example("models/README.md", 1)
    assert len(streamed.splitlines()) <= 35
    run(f"{example('models/README.md')}\n{streamed}", tmp_path)


def test_the_weights_of_a_run_alone(config_file, tmp_path):
    """In fp32 though it was trained in bf16; they are those that the optimizer holds."""
    train(config_file, 1, "train.steps=2", "train.dtype=bf16", "evaluate.sequences=0")
    path = config_file.parent / "run/checkpoints/step-000002/model.safetensors"
    written = example("models/README.md", 2)
    code = re.sub(r'path = "[^"]*"', f'path = "{path}"', written)
    code += "assert all(p.dtype.itemsize == 4 for p in model.parameters())\n"
    code += "assert any((p != p.bfloat16()).any() for p in model.parameters())\n"
    run(code, tmp_path)
