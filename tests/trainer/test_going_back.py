"""Back to an earlier checkpoint: asked for by its step, or since a later one led to a bad step."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.trainer.runs import figures, run, started_at, train_here, warnings
from trainer import checkpoint
from trainer.checkpoint import MANIFEST, WEIGHTS
from trainer.config import load_config, load_dumped
from trainer.events import Event
from trainer.going_back import withdraw_left
from trainer.run_folder import RunFolder, read_lines
from trainer.settings import ConfigError
from trainer.storage import Mirror

BASE = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep=3", "evaluate.sequences=2"]


@pytest.mark.slow
def test_going_back_to_a_step_leaves_what_came_after(config_file):
    folder = RunFolder(config_file.parent / "run")
    straight = run(config_file, 1, *BASE)
    again = run(config_file, 1, *BASE, "checkpoint.resume_step=2", "train.stop_after=1")
    assert started_at(again) == 2
    assert any("step-000004 is put aside" in told for told in warnings(again))
    assert [path.name for path in folder.saved()] == ["step-000003", "step-000002"]
    third = run(config_file, 1, *BASE)
    assert started_at(third) == 3
    assert figures(straight)[2:] == figures(again) + figures(third)
    with pytest.raises(AssertionError, match="has no checkpoint of that step"):
        run(config_file, 1, *BASE, "checkpoint.resume_step=1")


@pytest.mark.slow
def test_going_back_is_done_once(config_file):
    """The same command goes on, though the step is pruned; so does the one that a report tells."""
    folder = RunFolder(config_file.parent / "run")
    every = [*BASE, "checkpoint.every=1", "checkpoint.keep=2", "train.steps=6"]
    run(config_file, 1, *every, "train.stop_after=3")
    back = [*every, "checkpoint.resume_step=2"]
    assert started_at(run(config_file, 1, *back, "train.stop_after=2")) == 2
    assert [path.name for path in folder.saved()] == ["step-000004", "step-000003"]
    again = run(config_file, 2, *back, "parallel.sp=2", "train.stop_after=1")
    assert started_at(again) == 4
    assert any("it went back there before, and goes on" in told for told in warnings(again))
    assert load_dumped(folder.config).checkpoint.resume_step is None
    assert load_dumped(folder.config).train.stop_after is None
    other = run(config_file, 1, *every, "checkpoint.resume_step=4", "train.stop_after=1")
    assert started_at(other) == 4  # another wish
    run(config_file, 1, *every, "train.stop_after=1")
    assert started_at(run(config_file, 1, *every, "checkpoint.resume_step=5")) == 5  # anew
    with pytest.raises(ConfigError, match=r"train\.steps: 4 is below step 5"):
        load_config(config_file, [*every, "checkpoint.resume_step=5", "train.steps=4"])


@pytest.mark.slow
def test_going_back_to_what_is_kept_elsewhere(config_file, tmp_path):
    """The machine is lost with its folder; what is later there does not count any more."""
    folder = RunFolder(config_file.parent / "run")
    kept = [*BASE, "checkpoint.every=1", f"checkpoint.remote=file://{tmp_path}/kept"]
    straight = run(config_file, 1, *kept)
    shutil.rmtree(folder.path)
    again = run(config_file, 1, *kept, "checkpoint.resume_step=3")
    assert started_at(again) == 3
    assert figures(again) == figures(straight)[3:]
    shutil.rmtree(folder.path)
    run(config_file, 1, *kept, "checkpoint.resume_step=2", "train.stop_after=1")
    assert Mirror(f"file://{tmp_path}/kept").saved() == ["step-000003", "step-000002"]
    shutil.rmtree(folder.path)
    with pytest.raises(AssertionError, match="has no checkpoint of that step"):
        run(config_file, 1, *kept, "checkpoint.resume_step=1")


@pytest.mark.slow
def test_a_wanted_checkpoint_that_is_damaged_costs_nothing(config_file, tmp_path):
    """What is later stays, here and elsewhere; it is told, and told again."""
    folder = RunFolder(config_file.parent / "run")
    kept = [*BASE, f"checkpoint.remote=file://{tmp_path}/kept"]
    run(config_file, 1, *kept)
    (folder.checkpoint(2) / WEIGHTS).write_bytes(b"damaged")
    shutil.rmtree(tmp_path / "kept" / "step-000002")
    for said in ("the checkpoint of that step is damaged", "has no checkpoint of that step"):
        with pytest.raises(AssertionError, match=said):
            run(config_file, 1, *kept, "checkpoint.resume_step=2")
        assert [path.name for path in folder.saved()] == ["step-000004"]
        assert Mirror(f"file://{tmp_path}/kept").saved() == ["step-000004"]
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_same_command_goes_on_where_the_machine_was_lost_too(config_file, tmp_path):
    folder = RunFolder(config_file.parent / "run")
    every = [*BASE, "checkpoint.every=1", "checkpoint.keep=2", "train.steps=6"]
    every += [f"checkpoint.remote=file://{tmp_path}/kept"]
    run(config_file, 1, *every, "train.stop_after=3")
    back = [*every, "checkpoint.resume_step=2"]
    assert started_at(run(config_file, 1, *back, "train.stop_after=3")) == 2
    shutil.rmtree(folder.path)
    assert started_at(run(config_file, 1, *back, "train.stop_after=1")) == 5
    shutil.rmtree(folder.path)
    run(config_file, 1, *every)  # another wish: none
    with pytest.raises(AssertionError, match="has no checkpoint of that step"):
        run(config_file, 1, *back)


@pytest.mark.slow
def test_after_going_back_what_leads_to_a_bad_step_is_put_aside_too(config_file):
    """The weights of step 3 are broken; the same command goes back beyond them, as it is told."""
    folder = RunFolder(config_file.parent / "run")
    every = [*BASE, "checkpoint.every=1", "checkpoint.keep=4"]
    run(config_file, 1, *every, "train.stop_after=2")
    back = [*every, "checkpoint.resume_step=1", "optim.learning_rate=1e30"]
    with pytest.raises(AssertionError, match="goes back to step"):
        run(config_file, 1, *back)
    newest = folder.saved()[0]
    with pytest.raises(AssertionError, match=r"the (loss|gradient norm) is"):
        run(config_file, 1, *back)
    assert newest.with_suffix(".left").is_dir()


def test_what_led_to_a_bad_step_is_put_aside_once(tmp_path):
    """Made anew it is the same to the bit, and may lead farther: a lost worker costs it nothing."""
    folder = RunFolder(tmp_path)

    def save(step: int) -> None:
        folder.checkpoint(step).mkdir(parents=True)
        (folder.checkpoint(step) / MANIFEST).write_text(f"of {step}")

    save(5)
    save(10)
    checkpoint.note_bad_steps(folder, 14, "stop")
    assert checkpoint.leave_bad(folder, "stop") == ([folder.checkpoint(10)], 14)
    save(10)
    assert checkpoint.leave_bad(folder, "stop") == ([], 14)
    checkpoint.note_bad_steps(folder, 14, "stop")
    assert checkpoint.leave_bad(folder, "stop") == ([folder.checkpoint(10)], 14)


@pytest.mark.slow
def test_a_start_after_a_nan_goes_back_beyond_what_led_there(config_file):
    """A rate that breaks the weights in step 3; the checkpoint of step 3 has them."""
    every = [*BASE, "checkpoint.every=1"]
    folder = RunFolder(config_file.parent / "run")
    straight = run(config_file, 1, *every, f"run.dir={config_file.parent / 'straight'}")
    run(config_file, 1, *every, "train.stop_after=2")
    broken = [*every, "optim.learning_rate=1e30"]
    with pytest.raises(AssertionError, match="goes back to step 2, for step 3 led here"):
        run(config_file, 1, *broken)
    with pytest.raises(AssertionError, match=r"the (loss|gradient norm) is .* at step 4"):
        run(config_file, 1, *every, "checkpoint.resume_step=3")
    with pytest.raises(AssertionError, match=r"guard\.max_skips 1 steps were left out"):
        run(config_file, 1, *every, "guard.on_bad_step=skip", "guard.max_skips=1", "train.steps=6")
    mended = run(config_file, 1, *every)
    assert any("step-000003 is put aside, for it led to the bad" in t for t in warnings(mended))
    assert started_at(mended) == 2
    assert figures(mended) == figures(straight)[2:]
    assert (folder.checkpoints / "step-000003.left").is_dir()
    started = run(config_file, 1, *every, "checkpoint.resume_step=3", "train.stop_after=1")
    assert started_at(started) == 3  # that of the run that was mended


def _withdraws_nothing(config_file: Path, overrides: list[str]) -> list[Event]:
    """In this rank: the store refuses to let go of what it has."""

    def refuse(self: Mirror, name: str) -> None:
        raise OSError("checkpoint.remote: forbidden")

    Mirror.withdraw = refuse
    return train_here(config_file, overrides)


@pytest.mark.slow
def test_going_back_that_was_cut_off_is_done_again(config_file, tmp_path):
    """What is later at the address does not come back, though it was not withdrawn at first."""
    kept = [*BASE, "checkpoint.every=1", f"checkpoint.remote=file://{tmp_path}/kept"]
    run(config_file, 1, *kept)
    back = [*kept, "checkpoint.resume_step=2", "train.stop_after=1"]
    with pytest.raises(AssertionError, match="forbidden"):
        run_distributed(_withdraws_nothing, 1, config_file, back, fresh=True)
    assert started_at(run(config_file, 1, *back)) == 2


def test_what_was_put_aside_out_of_reach_is_withdrawn_later(tmp_path):
    """And not another checkpoint of that step, which another machine has made."""
    folder, mirror = RunFolder(tmp_path / "run"), Mirror(f"file://{tmp_path}/kept")
    for step, here, there in ((2, "a", "a"), (4, "b", "another"), (6, "c", "c")):
        for root, what in ((folder.checkpoints, here), (tmp_path / "kept", there)):
            made = root / f"step-{step:06d}"
            made.mkdir(parents=True)
            (made / MANIFEST).write_text(json.dumps({"of": what}))
    for step in (2, 4):
        checkpoint.put_aside(folder.checkpoint(step))
    withdraw_left(folder, mirror)
    assert mirror.saved() == ["step-000006", "step-000004"]
