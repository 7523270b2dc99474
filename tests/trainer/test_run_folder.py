"""A run's folder tells the truth of its settings, step and files, whatever became of them."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.files import file_sha256
from tests.trainer.runs import figures, of_kind, run, started_at, warnings
from tests.trainer.test_resume import _assert_identical, _state
from trainer import checkpoint
from trainer.events import Started
from trainer.run_folder import RunFolder, add_line, read_lines

BASE = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep=3", "evaluate.sequences=2"]


def changed(events: list) -> tuple[str, ...]:
    return of_kind(events, Started)[0].changed


@pytest.mark.slow
def test_settings_that_change_are_obeyed_listed_and_kept(config_file, tmp_path):
    """Alike on the same workers and on others; AdamW's own come along in a checkpoint."""
    options = [*BASE, "evaluate.sequences=0", "optim.warmup_steps=0", "optim.learning_rate=0.02"]
    other = ["optim.weight_decay=5.0", "optim.beta1=0.5", "optim.eps=1e-3"]
    weights = []
    for number, workers in enumerate((1, 2)):
        here = f"run.dir={tmp_path / str(number)}"
        run(config_file, 1, *options, here, "train.stop_after=2")
        sharded = ["parallel.sp=2"] if workers == 2 else []
        again = run(config_file, workers, *options, *other, *sharded, here)
        told = " ".join(changed(again))
        assert "optim.weight_decay 0.1 -> 5.0" in told
        assert "optim.beta1 0.9 -> 0.5" in told
        assert "stop_after" not in told  # of one start
        history = read_lines(RunFolder(tmp_path / str(number)).history)
        assert [line["config"]["optim"]["weight_decay"] for line in history] == [0.1, 5.0]
        weights.append(figures(again))
    for one, two in zip(*weights, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    straight = run(config_file, 1, *options, f"run.dir={tmp_path / 'as before'}")
    assert figures(straight)[-1][0] != pytest.approx(weights[0][-1][0], rel=1e-4)


@pytest.mark.slow
def test_a_schedule_that_is_drawn_anew_is_told(config_file):
    run(config_file, 1, *BASE)
    again = run(config_file, 1, *BASE, "train.steps=40")
    assert "train.steps 4 -> 40" in changed(again)
    assert any("the schedule of the learning rate was changed" in told for told in warnings(again))
    assert changed(run(config_file, 1, *BASE, "train.steps=40")) == ()


@pytest.mark.slow
def test_a_result_belongs_to_its_step_and_goes_with_it(config_file):
    folder = RunFolder(config_file.parent / "run")
    run(config_file, 1, *BASE)
    first = json.loads(folder.result.read_text())
    folder.report.write_text("of the whole run")
    shutil.rmtree(folder.checkpoint(4))
    again = run(config_file, 1, *BASE, "train.stop_after=1", "optim.learning_rate=0.1")
    assert started_at(again) == 2
    assert not folder.result.exists()
    assert not folder.report.exists()
    run(config_file, 1, *BASE, "optim.learning_rate=0.1")
    assert json.loads(folder.result.read_text())["loss"] != first["loss"]
    assert [line["step"] for line in read_lines(folder.evaluations)] == [4]


@pytest.mark.parametrize("torn", ['{"step": 2, "sha', '{"step": 2, "sha256": "b"}'])
def test_no_line_goes_on_in_one_that_was_torn(tmp_path, torn):
    """A machine died amid it: it is left out, or whole but for its end."""
    folder = RunFolder(tmp_path)
    folder.manifests.write_text('{"step": 1, "sha256": "a"}\n' + torn)
    assert folder.mend() == []
    add_line(folder.manifests, {"step": 3, "sha256": "c"})
    kept = [1, 2, 3] if torn.endswith("}") else [1, 3]
    assert [line["step"] for line in read_lines(folder.manifests)] == kept


def test_a_wrong_step_costs_its_own_line_alone(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2000, 3, 4, 3, 5):
        add_line(folder.sequences, {"step": step, "begins": []})
    assert "had 2 lines that cannot be read" in folder.mend()[0]
    assert [line["step"] for line in read_lines(folder.sequences)] == [1, 3, 4, 5]


def test_a_full_disk_tears_no_line_but_its_own(tmp_path):
    path = tmp_path / "manifests.jsonl"
    add_line(path, {"step": 1, "sha256": "a"})
    with path.open("a") as f:
        f.write('{"step": 2, "sh')
    add_line(path, {"step": 3, "sha256": "c"})
    assert [line["step"] for line in read_lines(path)] == [1, 3]


def test_checkpoints_are_vouched_for_where_the_file_that_did_so_was_damaged(tmp_path):
    """Or the next save would begin a file that refuses all that are older."""
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.checkpoint(step).mkdir(parents=True)
        (folder.checkpoint(step) / "manifest.json").write_text(str(step))
    folder.manifests.write_text('{"step": 1, "sha\n{"step": 2, "sha256": "b"}\n')
    assert "checkpoints are taken as they are" in folder.mend()[0]
    digests = [file_sha256(folder.checkpoint(step) / "manifest.json") for step in (1, 2)]
    kept = read_lines(folder.manifests)
    assert kept == [{"step": n + 1, "sha256": digests[n]} for n in (0, 1)]
    assert folder.mend() == []


@pytest.mark.slow
def test_a_run_that_is_lost_before_it_evaluates_does_so_when_it_goes_on(config_file):
    options = ["train.steps=4", "checkpoint.every=2", "evaluate.every=2", "evaluate.sequences=2"]
    folder = RunFolder(config_file.parent / "run")
    straight = [line["loss"] for line in _evaluated(config_file, folder, options)]
    shutil.rmtree(folder.path)
    run(config_file, 1, *options, "train.stop_after=2")
    folder.evaluations.unlink()
    assert [line["loss"] for line in _evaluated(config_file, folder, options)] == straight
    assert [line["step"] for line in read_lines(folder.evaluations)] == [2, 4]


def _evaluated(config_file: Path, folder: RunFolder, options: list[str]) -> list:
    run(config_file, 1, *options)
    return read_lines(folder.evaluations)


def test_foreign_names_are_left_alone(tmp_path):
    folder = RunFolder(tmp_path)
    for name in ("step-000003", "step-000003-best", "step-x", "notes", "step-000010.damaged"):
        (folder.checkpoints / name).mkdir(parents=True)
    (folder.checkpoints / "step-000012").write_text("a file")
    (folder.checkpoints / "step-1000000").mkdir()
    assert [path.name for path in folder.saved()] == ["step-1000000", "step-000003"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a file more", "another manifest"])
def test_what_this_run_has_not_written_is_not_loaded(config_file, tmp_path, how):
    """DeepSpeed's files are pickles: one that is not listed, or listed by another, would run."""
    folder = RunFolder(config_file.parent / "run")
    run(config_file, 1, *BASE)
    newest, trace = folder.checkpoint(4), tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(trace),))

    if how == "a file more":
        (newest / "deepspeed" / "more.pt").write_bytes(pickle.dumps(Evil()))
        said = "more.pt is not in its manifest"
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"].popitem()
        (newest / "manifest.json").write_text(json.dumps(manifest))
        said = "is not one that this run has written"
    again = run(config_file, 1, *BASE)
    assert started_at(again) == 2
    assert any(said in told for told in warnings(again))
    assert not trace.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_no_code_in_a_checkpoint_is_run_even_where_all_digests_fit(config_file, tmp_path, stage):
    """By one who may write the whole folder: what DeepSpeed reads are tensors and plain values."""
    options = [*BASE, f"deepspeed.zero_stage={stage}"]
    folder, trace = RunFolder(config_file.parent / "run"), tmp_path / "trace"
    run(config_file, 1, *options, "train.stop_after=2")

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(trace),))

    newest = folder.checkpoint(2)
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in [name for name in manifest["files"] if name.endswith(".pt")]:
        state = torch.load(newest / name, weights_only=False)
        torch.save(state | {"more": Evil()}, newest / name)
        manifest["files"][name] = checkpoint._seal(newest / name)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    checkpoint._record(folder, newest, 2)
    with pytest.raises(AssertionError, match="holds more than tensors and plain values"):
        run(config_file, 1, *options)
    assert not trace.exists()


def mutate(folder: RunFolder, dice: random.Random) -> str:
    """Change one of the files beside the checkpoints, or of the newest one; what was done."""
    beside = [p for p in folder.path.iterdir() if p.is_file() and p.name != "lock"]
    inside = [p for p in folder.saved()[0].rglob("*") if p.is_file()]
    path = dice.choice(sorted(beside) if dice.random() < 0.7 else sorted(inside))
    data = path.read_bytes()
    how = dice.choice(["cut", "empty", "remove", "zeros", "twice", "swapped", "nonsense"])
    at = dice.randrange(len(data) or 1)
    lines = data.splitlines(keepends=True)
    made = {
        "cut": data[:at],
        "empty": b"",
        "zeros": data[:at] + bytes(8) + data[at + 8 :],
        "twice": data + data,
        "swapped": b"".join(reversed(lines)),
        "nonsense": data[:at] + b'{"step": "x"}\n[1]\n' + data[at:],
    }
    path.write_bytes(made.get(how, data))
    if how == "remove":
        path.unlink()
    return f"{how} {path.relative_to(folder.path)}"


def go_on_bitwise_or_say_why(config_file: Path, seeds: range) -> dict[str, int]:
    """How many mutated folders went on to the bit, and how many were refused in one sentence."""
    options = [*BASE, "train.steps=6"]
    folder, straight = RunFolder(config_file.parent / "run"), config_file.parent / "straight"
    undisturbed = figures(run(config_file, 1, *options, f"run.dir={straight}"))
    run(config_file, 1, *options, "train.stop_after=3")
    kept = config_file.parent / "kept"
    shutil.copytree(folder.path, kept)
    counts = {"went on": 0, "refused": 0}
    for seed in seeds:
        shutil.rmtree(folder.path)
        shutil.copytree(kept, folder.path)
        done = mutate(folder, random.Random(seed))
        try:
            again = run(config_file, 1, *options)
        except AssertionError as error:
            last = str(error).strip().splitlines()[-1]
            counts["refused" if str(folder.path) in last else f"{done}: {error}"] += 1
            continue
        assert undisturbed[started_at(again) :] == figures(again), done
        _assert_identical(_state(folder.path), _state(straight))
        counts["went on"] += 1
    return counts


@pytest.mark.slow
def test_a_damaged_folder_goes_on_to_the_bit_or_says_why(config_file):
    counts = go_on_bitwise_or_say_why(config_file, range(10))
    assert counts["went on"] >= 5


@pytest.mark.soak
def test_many_damaged_folders(config_file, fuzz_counts):
    tries = 130
    counts = go_on_bitwise_or_say_why(config_file, range(tries))
    fuzz_counts.append(
        {
            "what": "run folders with a file changed",
            "tried": tries,
            "refused by name": counts["refused"],
            "as if nothing were": counts["went on"],
            "else": 0,
        }
    )
