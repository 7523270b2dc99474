"""A comparison's file: every fault at once, and named."""

import shutil
from pathlib import Path

import pytest

from data_prep.synthetic import SyntheticSettings, prepare_synthetic
from launch.compare.file import load_comparison
from trainer.settings import ConfigError


def _faults(tmp_path, text: str, *overrides: str) -> str:
    path = tmp_path / "compare.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_comparison(path, list(overrides))
    return str(caught.value)


def test_faults_of_the_section_are_told_together(tmp_path):
    said = _faults(
        tmp_path,
        "compare: {mixers: [attention, rwkv], lengths: [], match: depth, repetitions: 0,\n"
        "  stepz: 3,"
        "  memory_gib_per_worker: -1, tasks: {text: [model.dropout=0.1, run.seed=3],\n"
        "    wiki/long: [], ..: [], a b: [], a_b: []},\n"
        "  learning_rates: [0.1, 0, 0.1], seeds: [-1], published: {txt: {mamba: 1.5}},\n"
        "  baselines: [atention]}\n"
        "model: {heads: 3, width: 64}\nparallel: {sp: 0}\n",
    )
    for part in (
        "compare.yaml:1: compare.mixers: 'rwkv' is not one of",
        "compare.lengths: the list is empty",
        "compare.match: 'depth' is not width, layers or none",
        "compare.repetitions: 0 is not positive",
        "compare.stepz: unknown key; the nearest known one is compare.steps",
        "model.heads: 3 does not cut width 64",
        "compare.memory_gib_per_worker: -1.0 is not positive",
        "parallel.sp: 0 is not positive",
        "compare.learning_rates: 0.1 is there twice",
        "compare.baselines: 'atention' is not one of attention, gru",
        "compare.tasks: text sets model.dropout=0.1, which is the comparison's own",
        "compare.tasks: text sets run.seed=3, which is the comparison's own",
        "compare.tasks: 'wiki/long' is to name folders and files, and cannot",
        "compare.tasks: '..' is to name folders and files, and cannot",
        "compare.tasks: 'a_b' would name the same files as 'a b'",
        "compare.learning_rates: 0.0 is not positive",
        "compare.seeds: -1 is negative",
        "compare.published: 'txt' is not one of the tasks text",
    ):
        assert part in said


def test_faults_of_cells_and_trainings_say_where(tmp_path):
    said = _faults(
        tmp_path,
        "compare:\n  mixers: [attention, mingru]\n  lengths: [64, 33]\n"
        "  tasks: {text: [data.path=nowhere, train.steps=0]}\n"
        "parallel: {sp: 2}\nlaunch: {workers: 2}\nevaluate: {every: 1}\n",
    )
    assert "attention at 33: train.seq_len: 33 is not divisible by parallel.sp 2" in said
    assert "task text, mingru: train.steps: 0 is not positive" in said
    assert said.count("nowhere holds no dataset.json") == 1


def test_a_task_without_evaluations_is_refused_and_one_with_its_own_is_not(tmp_path, dataset):
    text = (
        f"compare: {{mixers: [mingru], lengths: [64], tasks: {{text: [train.seq_len=64, TASK]}}}}\n"
        f"data: {{path: {dataset}}}\nevaluate: {{every: BASE}}\n"
    )
    said = _faults(tmp_path, text.replace("TASK", "evaluate.sequences=0").replace("BASE", "1"))
    assert "task text: evaluate.sequences: 0: tasks are compared by held-out losses" in said
    said = _faults(tmp_path, text.replace("TASK", "").replace(", ]", "]").replace("BASE", "0"))
    assert "task text: evaluate.every: 0: tasks are compared" in said
    (tmp_path / "compare.yaml").write_text(
        text.replace("TASK", "evaluate.every=1").replace("BASE", "0")
    )
    assert load_comparison(tmp_path / "compare.yaml", []).tasks


def test_every_training_keeps_its_checkpoints_apart(tmp_path, dataset):
    """At one address another's would be gone on with, or refused."""
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"compare: {{mixers: [mingru, attention], lengths: [64],\n"
        f"  tasks: {{text: [train.seq_len=64], more: [train.seq_len=64]}}}}\n"
        f"data: {{path: {dataset}}}\nevaluate: {{every: 1}}\n"
        f"checkpoint: {{remote: 'memory://kept/'}}\n"
    )
    comparison = load_comparison(path, [])
    runs = [
        each.at(rate, seed)
        for task in comparison.tasks.values()
        for each in task.values()
        for rate in (1e-3, 2e-3)
        for seed in (0, 1)
    ]
    remotes = {str(run.checkpoint.remote) for run in runs}
    assert len(remotes) == len(runs) == 16
    assert all(remote.startswith("memory://kept/") for remote in remotes)
    assert {"/".join(Path(run.run.dir).parts[-2:]) for run in runs} == {
        "/".join(remote.split("/")[-2:]) for remote in remotes
    }


def test_cells_are_whole_and_of_all_workers(tmp_path):
    """Whatever the runs' lengths are: segments are no longer than the cell, nothing comes first."""
    path = tmp_path / "compare.yaml"
    path.write_text(
        "compare: {mixers: [mingru], lengths: [64, 256]}\n"
        "train: {seq_len: 512, segment_len: 128, curriculum: [256]}\n"
        "launch: {workers: 2, min_workers: 1}\nparallel: {sp: 2}\n"
    )
    comparison = load_comparison(path, [])
    cells = [comparison.cells["mingru", length] for length in (64, 256)]
    assert [cell.train.segment_len for cell in cells] == [64, 128]
    assert [cell.train.curriculum for cell in cells] == [[], []]
    assert [cell.launch.min_workers for cell in (*cells, comparison.config)] == [None] * 3


def test_a_run_in_less_time_has_the_same_schedule(tmp_path, dataset):
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"compare: {{mixers: [mingru], lengths: [64], tasks: {{text: [train.seq_len=64]}}}}\n"
        f"data: {{path: {dataset}}}\nevaluate: {{every: 1}}\n"
        f"train: {{steps: 800, curriculum: [32], curriculum_steps: 200}}\n"
        f"optim: {{warmup_steps: 50}}\n"
    )
    whole = load_comparison(path, []).tasks["text"]["mingru"]
    short = whole.at(1e-3, 0, 80)
    assert short.train.steps == 80
    assert (short.optim.warmup_steps, short.train.curriculum_steps) == (5, 20)
    assert whole.first.train.steps == 800


def test_models_have_the_tokens_of_the_tasks_data(tmp_path):
    """Rows of an embedding that nothing reaches are no parameters to compare by."""
    path = tmp_path / "compare.yaml"
    wanted = []
    for task, alphabet in (("parity", 2), ("copy", 8)):
        settings = SyntheticSettings(task, 64, alphabet=alphabet, tokens=4, train=4, held_out=2)
        wanted.append(prepare_synthetic(settings, tmp_path / task).vocab_size)
    assert wanted[0] < wanted[1] < 256
    path.write_text(
        f"compare: {{mixers: [mingru, attention], lengths: [64], tasks:\n"
        f"  {{parity: [data.path={tmp_path}/parity], copy: [data.path={tmp_path}/copy]}}}}\n"
        f"train: {{seq_len: 64}}\nevaluate: {{every: 1}}\n"
    )
    models = load_comparison(path, []).models
    assert {model.vocab_size for model in models.values()} == {max(wanted)}
    there = f"data.path=s3://there, data.cache={tmp_path}/cache"  # what it has is not known here
    path.write_text(path.read_text().replace(f"data.path={tmp_path}/copy", there))
    models = load_comparison(path, []).models
    assert {model.vocab_size for model in models.values()} == {256}
    models = load_comparison(path, ["model.vocab_size=100"]).models
    assert {model.vocab_size for model in models.values()} == {100}


def test_unknown_keys_of_a_task_are_told(tmp_path):
    said = _faults(
        tmp_path, "compare: {lengths: [64], tasks: {text: [train.stepz=3]}}\nevaluate: {every: 1}\n"
    )
    assert "task text: command line: train.stepz: unknown key" in said


def test_heads_that_ranks_do_not_divide_are_refused(tmp_path):
    said = _faults(
        tmp_path,
        "compare: {mixers: [attention], lengths: [66]}\nmodel: {heads: 2, width: 64}\n"
        "parallel: {sp: 3}\nlaunch: {workers: 3}\n",
    )
    assert "model.heads: 2 heads of attention cannot be dealt to parallel.sp 3 ranks" in said


def test_command_line_overrides_what_a_task_sets(tmp_path, dataset):
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"compare: {{lengths: [64], tasks: {{text: [train.steps=9, train.seq_len=64]}}}}\n"
        f"data: {{path: {dataset}}}\nevaluate: {{every: 1}}\n"
    )
    run = load_comparison(path, ["train.steps=3"]).tasks["text"]["mingru"].first
    assert (run.train.steps, run.train.seq_len) == (3, 64)


def test_a_training_on_other_data_is_another(tmp_path):
    """Data made anew at the same place: what was trained on the old does not pass for it."""
    path, data = tmp_path / "compare.yaml", tmp_path / "data"
    path.write_text(
        f"compare: {{lengths: [64], tasks: {{copy: [train.seq_len=64]}}}}\n"
        f"data: {{path: {data}}}\nevaluate: {{every: 1}}\n"
    )
    folders = []
    for seed in (0, 0, 1):
        shutil.rmtree(data, ignore_errors=True)
        prepare_synthetic(SyntheticSettings("copy", 64, train=4, held_out=2, seed=seed), data)
        run = load_comparison(path, []).tasks["copy"]["mingru"].first
        folders.append(run.run.dir)
    assert folders[0] == folders[1] != folders[2]
    limits = ["run.max_seconds=7200", "launch.wait_seconds=300", "launch.max_failures=9"]
    limits += ["parallel.timeout_seconds=60", "data.cache=cache", "launch.min_workers=1"]
    limits += ["optim.eps=1e-8"]  # which it is
    for options, same in ((limits, True), (["launch.workers=2", "parallel.sp=2"], False)):
        run = load_comparison(path, options).tasks["copy"]["mingru"].first
        assert (run.run.dir == folders[2]) == same


def test_all_cells_see_the_same_tokens_and_parameters(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text(
        """
compare:
  mixers: [attention, minlstm, [mingru, window]]
  lengths: [64, 256, 2048]
  tokens_per_step: 1024
  micro_batch_tokens: 256
model: {layers: 2, width: 64, window: 16}
parallel: {sp: 2}
launch: {workers: 4}
"""
    )
    comparison = load_comparison(path, [])
    for (_, length), cell in comparison.cells.items():
        train = cell.train
        assert train.seq_len == length
        assert train.batch_size * length == max(1024, 2 * length)  # a sequence for each of dp=2
        assert train.micro_batch_size == max(1, 256 // length)
    assert list(comparison.models) == ["attention", "minlstm", "mingru+window"]
