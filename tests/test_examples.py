"""The examples of the documents run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def example(page: str) -> str:
    """The one Python block of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return code


def run(code: str, tmp_path: Path, *command: str) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [*(command or (sys.executable,)), str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
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
