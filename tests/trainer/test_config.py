"""Every fault of a configuration is told at once, with its place and the nearest known key."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.schema import load_info
from data_prep.synthetic import SyntheticSettings, prepare_synthetic
from launch.compare.file import load_comparison
from tests.distributed import run_distributed
from trainer.config import Config, dump_config, load_config, load_dumped
from trainer.guard import RunError
from trainer.settings import ConfigError, leaves_of
from trainer.train import train

FAULTY = """\
run:
  dir: {run}
train:
  seq_lenn: 5
  steps: many
  seq_len: 193
parallel: {{sp: 2}}
data: {{path: nowhere}}
launch: {{workers: 3}}
modle: 3
"""


def test_all_faults_together_with_file_line_and_nearest_key(tmp_path, monkeypatch):
    path = tmp_path / "bad.yaml"
    path.write_text(FAULTY.format(run=path / "below-a-file"))
    with pytest.raises(ConfigError) as caught:
        load_config(
            path, ["model.with=3", "train.dtype=fp16", "oops", "model.mixer=[mingru, rwkv]"]
        )
    text = str(caught.value)
    for expected in (
        f"{path}:4: train.seq_lenn: unknown key; the nearest known one is train.seq_len",
        f"{path}:5: train.steps: 'many' is not of type int",
        f"{path}:6: train.seq_len: 193 is not divisible by parallel.sp 2: use 192",
        f"{path}:7: parallel.sp: 2 does not divide launch.workers 3: use 2 workers",
        f"{path}:8: data.path: nowhere holds no dataset.json",
        f"{path}:10: modle: unknown key",
        f"{path}:2: run.dir: {path / 'below-a-file'} cannot be made: {path} is not a folder",
        "command line: model.with: unknown key; the nearest known one is model.width",
        "command line: train.dtype: 'fp16' is not fp32 or bf16",
        "command line: oops: an override is written key=value",
        "command line: model.mixer: 'rwkv' is not one of mingru, minlstm",
    ):
        assert expected in text
    assert len(caught.value.faults) == 11


@pytest.mark.slow
def test_faults_are_told_at_once_by_the_command(tmp_path):
    """Neither torch nor Ray is imported for them, which takes seconds."""
    path = tmp_path / "bad.yaml"
    path.write_text("train: {stepz: 3}\ndata: {path: nowhere}\n")
    command = [sys.executable, "-X", "importtime", "-m", "launch", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "omegaconf" in imported
    assert not imported & {"torch", "ray", "deepspeed"}
    assert done.returncode == 1
    assert "train.stepz: unknown key; the nearest known one is train.steps" in done.stderr
    assert "2 faults" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=3", "3 is not divisible by dp 2 * train.micro_batch_size 1: use 4"),
        ("model.vocab_size=100", "100 is below the 256 tokens"),
        ("train.seq_len=1000000", "needs 1000001 tokens"),
        ("evaluate.sequences=1 train.seq_len=40000", "the held-out split of"),
        ("train.segment_len=65536", "is above train.seq_len"),
        ("deepspeed.zero_stage=4", "4 is not 0, 1, 2 or 3"),
        ("parallel.sp=4 train.seq_len=8 launch.workers=4", "gives shards of 2 tokens"),
        ("checkpoint.keep=0", "0 is not positive"),
        ("optim.beta2=1.0", "1.0 is not below 1"),
        ("model=3", "this is a section"),
        ("data.path=s3://bucket/x", "needs a local folder here"),
        ("data.path=s3:// data.cache=x", "s3:// names no place"),
        ("data.path=a::s3://b data.cache=x", "is a chain of addresses"),
        ("data.path=s3://b data.cache=s3://b", "name a folder of this machine"),
        ("checkpoint.remote=://", "names no place"),
        ("model.heads=0", "0 is not positive"),
        ("model.memory_tokens=1e9", "is above 100,000,000"),
        ("run.dir=s3://bucket/x", "is an address: a run writes into a folder"),
        ("model.layers=1000000000", "TiB with gradients and optimizer"),
        ("optim.learning_rate=nan", "'nan' is not of type float: it must be a finite decimal"),
        ("optim.learning_rate=1e999", "it must be a finite decimal number"),
        ("train.curriculum=[64] train.curriculum_steps=0", "0 is not positive"),
        ("evaluate.seq_len=-5 train.segment_len=64", "-5 is not positive"),
        ("train.steps=010", "'010' is not of type int: it must be a whole decimal number"),
        ("train.steps=1:30", "'1:30' is not of type int"),
        ("train.steps=" + "9" * 400, "is too large"),
        ("run.dir=", "is empty"),
        ("data.reset_state=maybe", "it must be true or false"),
        ("launch.workers=10000000", "is above 65,536"),
        ("train.steps=${train.steps}", "Recursive interpolation"),
        ("model.conv_width=1", "is not 0 (off) or at least 2"),
        ("model.mixer=[[mingru,window],attention]", "'[mingru, window]' is not of type text"),
    ],
)
def test_single_faults(config_file, override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["launch.workers=2", *override.split()])
    assert said in str(caught.value)


def test_a_run_keeps_what_its_numbers_depend_on(config_file, tmp_path):
    config = load_config(config_file, [])
    run = Path(config.run.dir)
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    dump_config(config, run / "config.yaml")
    assert load_dumped(run / "config.yaml") == config
    load_config(config_file, ["parallel.sp=1", "launch.workers=2", "train.steps=9"])
    with pytest.raises(ConfigError, match="would resume: keep it"):
        load_config(config_file, ["model.width=24"])


def test_an_empty_file_is_all_defaults(tmp_path, dataset):
    (tmp_path / "empty.yaml").write_text("")
    options = [f"data.path={dataset}", "train.seq_len=192", f"run.dir={tmp_path}/run"]
    assert load_config(tmp_path / "empty.yaml", options).train.steps == Config().train.steps


def test_configurations_of_the_paper_are_valid():
    configs = Path(__file__).parents[2] / "configs"
    paths = [path for room in ("paper", "recall") for path in (configs / room).glob("*.yaml")]
    assert len(paths) >= 10
    for path in paths:
        comparison = load_comparison(path, ["compare.tasks={}"])
        asked = {"mingru", "minlstm", "mamba"}
        asked |= {"attention"} if comparison.config.model.of_frames else {"gru", "lstm"}
        assert asked <= set(comparison.models), path


def test_shipped_configurations_are_valid(dataset, tmp_path):
    """On the tests' data; comparisons without their trainings, whose data they name themselves."""
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        if path.name.startswith("compare"):
            comparison = load_comparison(path, ["compare.tasks={}"])
            assert comparison.settings.tasks == {}
            assert {"mingru", "minlstm"} <= set(comparison.models)
            with pytest.raises(ConfigError) as caught:  # of its trainings only the data is missing
                load_comparison(path, [f"data.path={dataset}/none"])
            assert all("holds no dataset.json" in fault for fault in caught.value.faults)
        else:
            short = ["train.seq_len=192", "train.segment_len=null", f"data.path={dataset}"]
            load_config(path, [*short, f"run.dir={tmp_path / path.stem}"])  # not the user's own


def test_faults_of_recovery_are_told_before_any_worker_starts(config_file):
    options = ["launch.workers=2", "launch.min_workers=3", "checkpoint.remote=nowhere://bucket/run"]
    options += ["checkpoint.every_seconds=60", "checkpoint.failures_per_day=2"]
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, options)
    said = str(caught.value)
    assert "launch.min_workers: 3 is above launch.workers 2" in said
    assert "checkpoint.remote: nowhere://bucket/run cannot be used: Protocol not known" in said
    assert "checkpoint.failures_per_day: it chooses checkpoint.every_seconds" in said


def test_text_is_taken_as_it_is_written(config_file, dataset, monkeypatch):
    """What YAML 1.1 would make a number, a truth, a date or a comment of."""
    for text in ("on", "no", "010", "1:30", "2026-01-01", "1e3", "None", "a #b", "{a: 1}", "[x]"):
        assert load_config(config_file, [f"run.dir={text}"]).run.dir == text
        base = config_file.read_text().replace(
            "evaluate:", f"checkpoint: {{remote: 'file://{text}'}}\nevaluate:"
        )
        other = config_file.with_name("other.yaml")
        lines = [line for line in base.splitlines() if not line.startswith("checkpoint: {every")]
        other.write_text("\n".join(lines))
        assert load_config(other, []).checkpoint.remote == f"file://{text}"
    plain = config_file.with_name("plain.yaml")
    plain.write_text(f"run: {{dir: on}}\ndata: {{path: {dataset}}}\ntrain: {{seq_len: 192}}\n")
    assert load_config(plain, []).run.dir == "on"
    monkeypatch.setenv("HOME", "/home/someone")
    with pytest.raises(ConfigError, match="'5 # a comment' is not of type int"):
        load_config(config_file, ["train.steps=5 # a comment"])
    config = load_config(config_file, ["run.dir=~/runs", "data.cache=~", "checkpoint.remote=null"])
    assert config.run.dir == "/home/someone/runs"
    assert config.data.cache == "/home/someone"
    assert config.checkpoint.remote is None


def test_the_model_has_as_many_tokens_as_the_data(config_file, tmp_path):
    prepare_synthetic(SyntheticSettings("copy", 192, train=40, held_out=4), tmp_path / "copy")
    options = [f"data.path={tmp_path / 'copy'}", "data.reset_state=false"]
    tokens = load_info(tmp_path / "copy").vocab_size
    assert load_config(config_file, options).model.vocab_size == tokens
    assert load_config(config_file, [*options, "model.vocab_size=64"]).model.vocab_size == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "the file is not a mapping of sections"),
        ("a: [1", "not readable as YAML: while parsing a flow sequence"),
        ("train:\n  steps: 3\n  steps: 4\n", ":3: train.steps: this key stands there twice"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("{" * 3000, "nested too deeply"),
        ("a: &a [*a]", "a: unknown key"),
        ("model: &m {mixer: [*m]}", "model.mixer: is too large, or nested too deeply"),
        ("model: {mixer: &a [&b [*b, *b], *a]}", "is too large, or nested too deeply"),
        ("x" * 2_000_000, "2,000,000 bytes: no configuration is so large"),
        ("train: {steps: 1}\ntrain: {steps: 2}", ":2: train: this key stands there twice"),
        ("? [a, b]\n: 1", "a key is not a name"),
        ("!!python/object/apply:os.system [ls]", "the file is not a mapping of sections"),
        ("run: {dir: !!python/name:os.system ''}", "which means nothing here"),
        (
            "x: [&a0 [q, q], &a1 [*a0, *a0]]\nmodel: {mixer: &b0 [*a1, *a1]}",
            "model.mixer: '[&id001 [q, q], *id001]' is not of type text",
        ),
        ("model: {expansion: 1e308}", "model.expansion: 1e+308 is above 100,000"),
        ("model: {mlp_ratio: 1e308}", "model.mlp_ratio: 1e+308 is above 100,000"),
        ("run: {dir: '???'}", "run.dir: is '???', which names nothing"),
        ('run: {dir: "a\\0b"}', "which names nothing"),
        ("run: {dir: ~nosuchuser/x}", "~nosuchuser/x: Could not determine home directory"),
        (f"run: {{dir: {'x' * 300}}}", "cannot be made: File name too long"),
        ("train: {steps: 5}\ntrain.steps: 9", "train.steps: this key stands there twice"),
        ("model: {mixer: " + "[" * 200 + "]" * 200 + "}", "is too large, or nested too deeply"),
        ("--- 1\n--- 2", "expected a single document"),
        ("\x00", "unacceptable character #x0000"),
        ("train:\n\tsteps: 1", "found character '\\t' that cannot start any token"),
    ],
    ids=range(25),
)
def test_no_file_hangs_or_is_misread(text, said, tmp_path, dataset):
    """For its own fault alone: the data are there, and fit."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"data.path={dataset}", "train.seq_len=192"])
    assert time.process_time() - started < 2
    assert said in str(caught.value)


# Values of which any could be given for any key.
VALUES = [
    *("0", "1", "2", "-1", "3", "1.5", "1e-3", "1e30", "nan", "inf", "010", "0x1f", "1:30", "on"),
    *("null", "", "~", "None", "true", "[]", "[1]", "[mingru, window]", "{a: 1}", "${run.seed}"),
    *(
        "${x}",
        "mingru",
        "attention",
        "bf16",
        "9" * 30,
        "'",
        '"',
        "a b",
        "\u00e9",
        "\x00",
        "s3://b/x",
    ),
]


def attempt(config_file: Path, dice: random.Random) -> Config | None:
    """A configuration with some keys set to anything; None where it is refused, as it should be."""
    keys = [name for name, _ in leaves_of(Config)]
    overrides = [f"{dice.choice(keys)}={dice.choice(VALUES)}" for _ in range(dice.randint(1, 3))]
    if dice.random() < 0.2:  # the file itself
        text = config_file.read_text()
        at = dice.randrange(len(text))
        config_file = config_file.with_name("mutated.yaml")
        config_file.write_text(text[:at] + dice.choice(VALUES) + text[at + dice.randint(0, 3) :])
    started = time.process_time()
    try:
        return load_config(config_file, overrides, workers=dice.choice([1, 2]))
    except ConfigError:
        return None
    finally:
        assert time.process_time() - started < 2, overrides


def test_any_value_is_a_configuration_or_a_clear_fault(config_file):
    accepted = sum(attempt(config_file, random.Random(seed)) is not None for seed in range(500))
    assert 20 < accepted < 400


def _first_step(config: Config) -> str:
    """Of an accepted configuration, in this rank: it starts, or says in one sentence why not."""
    try:
        train(config)
    except (ValueError, RunError) as error:
        return str(error)
    return ""


@pytest.mark.soak
def test_what_is_accepted_starts(config_file, tmp_path, fuzz_counts):
    started = refused = 0
    tries = int(os.environ.get("LONGHAUL_FUZZ", "500"))
    for seed in range(tries):
        config = attempt(config_file, random.Random(seed))
        if config is None:
            refused += 1
            continue
        config.run.dir = str(tmp_path / str(seed))
        config.train.stop_after = 1
        config.checkpoint.remote = None  # anywhere
        if config.data.path != load_config(config_file, []).data.path:
            continue
        said = run_distributed(_first_step, config.launch.workers, config)
        assert all(len(text) < 500 for text in said), said
        started += 1
    assert started > 20
    fuzz_counts.append(
        {
            "what": "configurations with keys set to anything",
            "tried": refused + started,
            "refused by name": refused,
            "as if nothing were": started,
            "else": 0,
        }
    )


def test_an_interpolation_cannot_bring_another_type(config_file):
    with pytest.raises(ConfigError, match=r"data\.path: '0' is not of type text or"):
        load_config(config_file, ["data.path=${run.seed}", "run.seed=0"])


def test_aliases_do_not_multiply_without_end(tmp_path):
    """Ten of ten of ten, fifteen times."""
    lines = ["x0: &x0 [q, q, q, q, q, q, q, q, q, q]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 15)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "model: {mixer: *x14}"]))
    started = time.process_time()
    with pytest.raises(ConfigError, match="is too large, or nested too deeply"):
        load_config(tmp_path / "c.yaml", [])
    assert time.process_time() - started < 2
