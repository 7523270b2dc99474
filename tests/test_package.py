"""pip install . gives the rooms, the kernels' sources and a command."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def _pip(*arguments: str, source: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_installed_it_scans_trains_and_has_a_command(tmp_path):
    """In a folder of its own, without this checkout on the path."""
    ignored = shutil.ignore_patterns(".*", "data", "runs", "tests", "__pycache__")
    source = Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignored))
    building = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    _pip("wheel", *building, ".", source=source)
    (wheel,) = tmp_path.glob("longhaul-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    rooms = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert rooms == {"models", "trainer", "launch", "data_prep"}
    for name in ("kernels/scan.cpp", "kernels/vectors.h", "recurrences/mingru/gates.h"):
        assert f"models/scan/{name}" in names
    _pip(
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
        source=source,
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    scan = (
        "import torch, models\n"
        "from models.scan import mingru_scan\n"
        "print(models.__file__, mingru_scan(torch.ones(1, 3, 4), backend='native')[0].shape)\n"
    )
    found = f"{tmp_path / 'site'}/models/__init__.py torch.Size([1, 3, 2])"
    for command, said in (
        ([sys.executable, "-c", scan], found),
        ([str(tmp_path / "site" / "bin" / "longhaul"), "--help"], "usage: longhaul"),
        ([sys.executable, "-m", "launch", "--help"], "usage: python -m launch"),
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_what_a_job_uploads_is_small():
    """Ray refuses 500 MB: code and results go, whatever is installed, prepared or trained stays."""
    ignored = [set((ROOT / name).read_text().split()) for name in (".gitignore", ".rayignore")]
    assert ignored[0] - {"*.pyc"} <= ignored[1]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split("\0")[:-1]
    assert 0 < sum((ROOT / name).stat().st_size for name in names) < 20e6
