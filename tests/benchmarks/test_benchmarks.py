"""The benchmarks run, refuse what is wrong, and their model of the exchange keeps its promises."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.scan import backend
from tests.benchmarks import bench_exchange, bench_scan
from tests.benchmarks.bench_exchange import Device, Layer, Network

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("bench_scan", 6),
        ("bench_exchange", 6),
        ("bench_llama", 2),
        ("bench_before HEAD", 12),
        ("bench_precision", 6),
        ("bench_relay", 3),
        ("bench_states", 6),
        ("bench_context", 6),
        ("bench_sharding", 1),
    ],
)
def test_quick_run_prints_a_table(command, lines):
    done = subprocess.run(
        [sys.executable, "-m", *f"tests.benchmarks.{command} --quick".split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n| ") >= lines
    assert "nan" not in done.stdout


def test_nothing_is_timed_where_a_result_is_wrong(monkeypatch):
    right = backend.forward

    def wrong(*args, **kwargs):
        scanned = right(*args, **kwargs)
        return replace(scanned, y=scanned.y * 1.001)

    monkeypatch.setattr(backend, "forward", wrong)
    with pytest.raises(SystemExit, match="wrong by"):
        bench_scan.gate()


def test_share_counts_every_byte_once():
    case = bench_scan.Case("linear", torch.float32, (1, 16, 8))
    one = 16 * 8 * 4
    assert case.bytes_moved("forward") == 3 * one  # a, b; h
    assert case.bytes_moved("backward") == 5 * one  # a, h, its gradient; two gradients
    case = bench_scan.Case("minlstm", torch.bfloat16, (1, 16, 8))
    assert case.bytes_moved("forward") == 4 * one // 2
    assert case.bytes_moved("backward") == 8 * one // 2


def test_predicted_exchange_is_the_formula_at_infinite_bandwidth_and_at_zero_latency():
    layer, device = Layer(4096), Device()
    silent = {"launch": 0.0, "hop_inside": 0.0, "hop_between": 0.0}
    free = Network("", inside=float("inf"), between=float("inf"))
    _, latency = layer.recurrent(8, free, device)
    assert latency == pytest.approx(2 * (10e-6 + 7e-6) + 2 * (10e-6 + 4e-6))
    _, transfer = layer.recurrent(8, Network("", **silent), device)
    gathered, halo = 7 * 3 * 4096 * 8 / 450e9, 2 * 3 * 4096 * 2 / 50e9
    assert transfer == pytest.approx(gathered + halo)
    assert layer.ulysses(64, free, device) is None
    rows = bench_exchange.predicted()
    assert len(rows) == 16
