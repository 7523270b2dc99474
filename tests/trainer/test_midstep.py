"""A step that ends in the middle, by a stop or a kill, goes on there, to the bit."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.trainer.runs import figures, of_kind, run, started_at, train_here, warnings
from trainer import midstep as midstep_module
from trainer import train as train_module
from trainer.config import load_config
from trainer.events import Ended, Event, Started, Stop, Streamed
from trainer.midstep import Midstep
from trainer.run_folder import RunFolder
from trainer.segments import Position, Shelf
from trainer.storage import kept

HYBRID = ("model.mixer=[mingru,window]", "model.window=10", "model.dropout=0.1")
# two micro-batches of four segments, the last of them shorter: seven runs each
CUT = ("train.segment_len=56", "parallel.sp=2", "evaluate.sequences=0", *HYBRID)
CASES: dict[str, tuple[str, ...]] = {
    "zero 0": (),
    "zero 1": ("deepspeed.zero_stage=1",),
    "zero 2": ("deepspeed.zero_stage=2",),
    "zero 3": ("deepspeed.zero_stage=3",),
    "bf16 zero 0": ("train.dtype=bf16",),
    "bf16 zero 1": ("train.dtype=bf16", "deepspeed.zero_stage=1"),
    "bf16 zero 2": ("train.dtype=bf16", "deepspeed.zero_stage=2"),
    "bf16 zero 3": ("train.dtype=bf16", "deepspeed.zero_stage=3"),
    "attention": ("model.mixer=[attention,lstm]",),
    "kept": ("train.keep_segments=2",),
    "truncated": ("train.truncate=true",),
}


def _stopped_at(config_file: Path, options: list[str], step: int, asked_at: int) -> list[Event]:
    """A run that is asked to stop when so many segments of a step are run."""
    midstep_module.TELL_SECONDS = -1
    config = load_config(config_file, options, workers=dist.get_world_size())
    events: list[Event] = []

    def report(event: Event) -> Stop:
        events.append(event)
        amid = isinstance(event, Streamed) and (event.step, event.run) == (step, asked_at)
        return Stop.NOW if amid else Stop.NO

    train_module.train(config, report)
    return events


def _every_case(config_file: Path) -> dict[str, Any]:
    """On every rank: each case whole, and stopped three times in its steps."""
    result = {}
    for name, case in CASES.items():
        folder = config_file.parent / name.replace(" ", "-")
        whole = [*CUT, *case, "train.steps=2", f"run.dir={folder}-whole"]
        cut = [*whole[:-1], f"run.dir={folder}"]
        parts = [
            _stopped_at(config_file, cut, 1, 2),  # on the way there, in the first micro-batch
            _stopped_at(config_file, cut, 1, 5),  # on the way back; in the same step
            _stopped_at(config_file, cut, 2, 1 + (4 if "truncated" in name else 7)),
            train_here(config_file, cut),
        ]
        result[name] = figures(train_here(config_file, whole)), parts
    return result


@pytest.mark.slow
def test_a_stopped_step_goes_on_to_the_bit(config_file):
    """At every stage: losses and gradient norms are those of a run that nobody stopped."""
    for name, (whole, parts) in run_distributed(_every_case, 2, config_file, fresh=True)[0].items():
        assert [step for part in parts for step in figures(part)] == whole, name
        starts = [of_kind(part, Started)[0] for part in parts]
        assert [start.step for start in starts] == [0, 0, 0, 1], name
        assert all(start.runs for start in starts[1:]), name
        assert not any(warnings(part) for part in parts if "bf16" not in name), name
        ended = of_kind(parts[0], Ended)[0]
        assert ended.step == 0, name
        of = {"truncated": 8, "kept": 12}.get(name, 14)
        told = str(of_kind(parts[0], Streamed)[0])
        assert told.startswith(f"step 1: segment 1 of {of}, "), name


def test_what_passes_through_is_saved_once(tmp_path):
    """Pieces of a cache are in the carry of every later segment, and small ones share memory."""
    shelf, entering = Shelf(), [[()]]
    for _ in range(20):
        passed = entering[-1]
        entering.append(shelf.put_carry([(*passed[0], torch.randn(8, 1024))], passed))
    worker: Any = SimpleNamespace(topology=SimpleNamespace(rank=0))
    engine: Any = SimpleNamespace(accumulated=list)
    (save,) = Midstep(worker, 0, here=Position(20, entering)).files(engine).values()
    save(tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 1.2 * 20 * 8 * 1024 * 4
    saved = torch.load(tmp_path / "saved.pt")["entering"]
    for one, next_one, made in zip(saved, saved[1:], entering[1:], strict=False):
        assert all(x is y for x, y in zip(one[0], next_one[0], strict=False))
        assert torch.equal(next_one[0][-1], made[0][-1])


@pytest.mark.slow
def test_another_way_through_the_step_begins_it_anew(config_file):
    """Other segments, or workers, take the weights of the step before, and say so."""
    # dropout's masks are those of a segment and a rank, which become others
    options = [*CUT, "deepspeed.zero_stage=2", "model.dropout=0"]
    whole = figures(run(config_file, 2, *options))
    for change in ("train.segment_len=64", "parallel.sp=1"):
        folder = config_file.parent / change
        to = [*options, f"run.dir={folder}"]
        first = run_distributed(_stopped_at, 2, config_file, to, 3, 9, fresh=True)[0]
        assert len(figures(first)) == 2
        saved = RunFolder(folder).saved()[0]
        assert saved.name == "step-000002-000009"
        held = (saved / "midstep" / "rank-00000.pt").stat().st_size
        assert held < Shelf.SLABS[0] / 2  # carries and gradients, without what they lie in
        progress = RunFolder(folder).progress
        assert json.loads(progress.read_text()).items() >= {"step": 3, "run": 9}.items()
        events = run(config_file, 2, *to, change)
        assert not progress.exists()
        assert "that step is begun anew" in " ".join(warnings(events))
        assert started_at(events) == 2
        for got, want in zip(figures(events), whole[2:], strict=True):
            assert got == pytest.approx(want, rel=1e-5)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_first_step_is_begun_anew_by_other_workers(config_file, stage):
    """A checkpoint amid it holds no state of Adam, which has taken no step; its weights count."""
    options = [*CUT, f"deepspeed.zero_stage={stage}", "model.dropout=0", "train.steps=2"]
    begun = config_file.parent / "begun"
    run(config_file, 2, *options, f"run.dir={begun}", "run.seed=3", "train.steps=1")
    options.append(f"train.init_from={begun}")
    whole = figures(run(config_file, 2, *options, f"run.dir={config_file.parent / 'whole'}"))
    stopped = run_distributed(_stopped_at, 2, config_file, options, 1, 3, fresh=True)[0]
    assert not figures(stopped)
    events = run(config_file, 1, *options[:-1], "parallel.sp=1")
    assert "that step is begun anew" in " ".join(warnings(events))
    for got, want in zip(figures(events), whole, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def _killed_amid(config_file: Path, options: list[str]) -> None:
    """Saves at every segment, and dies in the middle of the third step."""
    midstep_module.TELL_SECONDS = -1
    config = load_config(config_file, options, workers=dist.get_world_size())

    def report(event: Event) -> Stop:
        if isinstance(event, Streamed) and (event.step, event.run) == (3, 6):
            os.kill(os.getpid(), signal.SIGKILL)
        return Stop.NO

    train_module.train(config, report)


@pytest.mark.slow
def test_a_kill_in_a_step_loses_what_came_after_the_last_save(config_file):
    """With checkpoint.every_seconds saves are made amid a step, each in the place of the last."""
    options = [*CUT, "deepspeed.zero_stage=1"]
    whole = figures(run(config_file, 2, *options))
    often = [*options, f"run.dir={config_file.parent / 'killed'}"]
    seconds = "checkpoint.every_seconds=0.000001"
    with pytest.raises(AssertionError, match="its process died"):
        run_distributed(_killed_amid, 2, config_file, [*often, seconds], fresh=True)
    events = run(config_file, 2, *often)
    start = of_kind(events, Started)[0]
    assert start.step == 2
    assert 4 <= start.runs <= 6
    assert figures(events) == whole[2:]
    # the step that was saved in its middle left a checkpoint of its own
    saved = RunFolder(config_file.parent / "killed").saved()
    assert [path.name for path in saved] == ["step-000005", "step-000003"]


def test_what_stays_when_a_checkpoint_is_made():
    """Whole steps are counted; of one under way only the newest stays, as it was last begun."""
    whole = ["step-000010", "step-000009"]
    assert kept(["step-000010-000009", *whole], 2, "step-000010-000009") == [
        "step-000010-000009",
        *whole,
    ]
    names = ["step-000010-000900", "step-000010-000050", *whole]
    assert kept(names, 1, "step-000010-000050") == ["step-000010-000050", "step-000010"]
    assert kept(["step-000011", *names], 2, "step-000011") == ["step-000011", "step-000010"]
    assert kept(["step-000011", *names], 1, "step-000011") == ["step-000011"]
