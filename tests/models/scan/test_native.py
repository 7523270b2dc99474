"""The native library: built once, whoever asks first, and missed in words where it cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.scan.library import library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SCAN = """
import torch, warnings
from models.scan import mingru_scan
warnings.simplefilter("always")
torch.manual_seed(0)
for _ in range(2):
    print(mingru_scan(torch.randn(1, 9, 8), backend={backend!r})[0].sum().item())
"""


def start(backend: str, cache: Path, compiler: Path | str) -> subprocess.Popen:
    """A process that scans twice, with a cache and a compiler of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SCAN.format(backend=backend)],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(compiler)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_workers_that_start_together_build_once(tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho built >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    workers = [start("native", tmp_path / "cache", compiler) for _ in range(3)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs[0][1]
    assert len({out for out, _ in outputs}) == 1
    assert log.read_text() == "built\n"
    again = start("native", tmp_path / "cache", compiler)
    assert again.communicate(timeout=300)[0] == outputs[0][0]
    assert log.read_text() == "built\n"
    (built,) = (tmp_path / "cache" / "longhaul").glob("*.so")
    built.write_bytes(b"")  # as after the power went
    again = start("native", tmp_path / "cache", compiler)
    assert again.communicate(timeout=300)[0] == outputs[0][0]
    assert log.read_text() == "built\n" * 2
    options = start("native", tmp_path / "cache", f"{compiler} -g0")
    assert options.communicate(timeout=300)[0] == outputs[0][0]
    assert log.read_text() == "built\n" * 3


def test_a_compiler_that_fails_is_told_once_and_leaves_nothing(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "disk full" >&2\nexit 1\n')
    compiler.chmod(0o755)
    worker = start("auto", tmp_path / "cache", compiler)
    out, err = worker.communicate(timeout=300)
    assert worker.returncode == 0
    assert len(out.split()) == 2
    assert err.count("many times slower") == 1
    assert "disk full" in err
    worker = start("native", tmp_path / "cache", compiler)
    assert "'native' cannot be used" in worker.communicate(timeout=300)[1]
    assert worker.returncode != 0
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_headers_beside_a_source_are_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "own.cpp", tmp_path / "own.h"
    source.write_text('#include "own.h"\nextern "C" int number() { return NUMBER; }\n')
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        library.cache_clear()
        assert library(source).number() == number
