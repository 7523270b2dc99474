"""Every test starts from the same seed, one CPU thread, and memory filled with NaN."""

import os
import shutil

if not os.path.exists("/dev/nvidiactl"):
    # Without a GPU, Triton's kernels run in its interpreter; it asks when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 << 30:
    # Every checkpoint waits until it is on disk, which takes seconds on a busy one: in memory, none
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings as examples

from data_prep.sources import Selection
from data_prep.write import Settings, prepare
from tests.benchmarks import results

FUZZED = 3  # tests that count what they tried
# `make fuzz` asks for more
examples.register_profile(
    "tests", max_examples=int(os.environ.get("LONGHAUL_FUZZ", "25")), deadline=None
)
examples.load_profile("tests")


@pytest.fixture(scope="session")
def fuzz_counts(request: pytest.FixtureRequest) -> Iterator[list[dict[str, object]]]:
    """What was tried: the rows of results/fuzz_*.md, if `make fuzz` ran whole and none failed."""
    rows: list[dict[str, object]] = []
    circumstances = results.circumstances().splitlines()[1:]
    yield rows
    whole = "LONGHAUL_FUZZ" in os.environ and len(rows) == FUZZED
    if whole and not request.session.testsfailed:
        said = ["# Inputs made at random", "", "- command: `make fuzz`", *circumstances, ""]
        results.result_path("fuzz", ".md").write_text("\n".join([*said, results.table(rows)]))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # torch.empty() gives NaN under these two, so a kernel that reads what it never wrote is caught.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder: 60 documents of pseudo-text, with structure to learn."""
    folder = tmp_path_factory.mktemp("data")
    words = random.Random(0).choices(["carry", "scan", "shard", "halo", "span", "a", "b"], k=20000)
    with (folder / "text.jsonl").open("w") as f:
        for begin in range(0, len(words), 333):
            f.write(json.dumps({"text": " ".join(words[begin : begin + 333]) + "\n"}) + "\n")
    settings = Settings(held_out=0.2, block_size=128, shard_bytes=1 << 14)
    selection = Selection((str(folder / "text.jsonl"),))
    prepare(selection, folder / "set", settings, workers=1, tell=None)
    return folder / "set"


@pytest.fixture
def config_file(tmp_path: Path, dataset: Path) -> Path:
    return write_config(tmp_path, dataset)


def write_config(folder: Path, dataset: Path) -> Path:
    """The smallest run that has everything: convolution, gate, MLP, resets, evaluation."""
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
run: {{dir: {folder / "run"}}}
data: {{path: {dataset}, reset_state: true}}
model: {{layers: 2, width: 16, expansion: 1.5, memory_tokens: 64}}
deepspeed: {{persistence_threshold: 0}}
train: {{steps: 5, seq_len: 192, batch_size: 2, loss_tile_tokens: 50}}
optim: {{warmup_steps: 2, clip: 0.5}}
checkpoint: {{every: 100}}
evaluate: {{sequences: 3}}
"""
    )
    return path
