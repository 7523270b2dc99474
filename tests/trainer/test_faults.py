"""What goes wrong ends in one clear message, on all ranks, and the last good checkpoint loads."""

import json
import shutil
import time
from pathlib import Path

import pytest

from data_prep.blocks import DataError
from data_prep.files import file_sha256
from data_prep.schema import load_info
from tests.distributed import run_distributed
from tests.trainer.runs import figures, run, started_at, train_here, warnings
from trainer import checkpoint
from trainer.config import DataConfig, load_config
from trainer.data import SequenceReader, TokenStream
from trainer.guard import RunError
from trainer.layout import Layout
from trainer.run_folder import RunFolder
from trainer.settings import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture
def own_data(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def _caught(config_file: Path, overrides: list[str], kinds: tuple[type[Exception], ...]) -> str:
    """On every rank: the message that ends the run."""
    with pytest.raises(kinds) as caught:
        train_here(config_file, overrides)
    return str(caught.value)


def _first_shard(data: Path) -> Path:
    return data / "train" / "shard.00000.mds"


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_shard_is_named_before_any_worker_starts(config_file, own_data, damage):
    shard = _first_shard(own_data)
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=rf"data.path: MDS shard file {shard}"):
        load_config(config_file, [f"data.path={own_data}"])


def _flip_then_train(config_file: Path, own_data: Path) -> str:
    return _caught(config_file, [f"data.path={own_data}", "parallel.sp=2"], (DataError,))


def test_flipped_bit_is_named_by_its_reader(config_file, own_data):
    """Sizes are right, one bit is not: one rank meets it, and all end with its message."""
    stream = TokenStream(DataConfig(path=str(own_data)), "train")
    begin = SequenceReader(stream, Layout(192), False).order(0, shift=False)[0]
    (blocks,) = stream.sources
    shard_index, block = blocks._spanner[(begin + 150) // stream.info.block_size]
    shard = own_data / "train" / blocks._shards[shard_index].raw_data.basename
    data = bytearray(shard.read_bytes())
    end = int.from_bytes(data[8 + 4 * block : 12 + 4 * block], "little")
    data[end - 3] ^= 1
    shard.write_bytes(data)
    started = time.monotonic()
    messages = run_distributed(_flip_then_train, 2, config_file, own_data)
    assert time.monotonic() - started < 300
    assert messages[0] == messages[1]
    assert f"MDS shard file {shard}, block {block}: its checksum is wrong" in messages[0]
    assert "data_prep verify" in messages[0]


def test_index_that_leaves_its_folder_is_refused(config_file, own_data):
    index = own_data / "train" / "index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["raw_data"]["basename"] = "../held_out/shard.00000.mds"
    index.write_text(json.dumps(content))
    info = load_info(own_data)
    info.splits["train"].index_sha256 = file_sha256(index)  # by one who knows the format
    info.dump(own_data)
    with pytest.raises(ConfigError, match="outside its folder"):
        load_config(config_file, [f"data.path={own_data}"])


def test_other_data_is_refused_on_resume(config_file, own_data, tmp_path):
    run(config_file, 1, "train.stop_after=1")
    folder = RunFolder(config_file.parent / "run")
    before = [path.read_text() for path in (folder.config, folder.data, folder.history)]
    info = load_info(own_data)
    info.fingerprint = "another"
    info.dump(own_data)
    # at an address, which only the workers look at
    for path in (str(own_data), f"file://{own_data}"):
        with pytest.raises(AssertionError, match=r"that the run in .* was trained on"):
            run(config_file, 1, f"data.path={path}", f"data.cache={tmp_path / 'cache'}")
    assert before == [path.read_text() for path in (folder.config, folder.data, folder.history)]


def _spoil(config_file: Path, ranks: int, how: str) -> tuple[Path, list]:
    """A run of three steps with a checkpoint each, the newest of them damaged."""
    options = ["checkpoint.every=1", "checkpoint.keep=3", "evaluate.sequences=0"]
    events = run(config_file, ranks, *options, f"parallel.sp={ranks}", "train.stop_after=3")
    folder = config_file.parent / "run"
    newest = RunFolder(folder).checkpoint(3)
    if how == "truncated":
        victim = newest / "deepspeed" / "mp_rank_00_model_states.pt"
        victim.write_bytes(victim.read_bytes()[:-100])
    elif how == "flipped":
        victim = newest / "deepspeed" / "mp_rank_00_model_states.pt"
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        (newest / checkpoint.MANIFEST).unlink()
    return folder, events


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "mp_rank_00_model_states.pt has"),
        ("flipped", "does not have the sha256"),
        ("no manifest", "it was never finished"),
    ],
)
def test_damaged_checkpoint_is_set_aside_and_the_last_good_one_loads(config_file, how, said):
    folder, before = _spoil(config_file, 2, how)
    events = run(config_file, 2, "parallel.sp=2", "evaluate.sequences=0")
    (warning,) = warnings(events)
    assert "step-000003 is not used" in warning
    assert said in warning
    assert started_at(events) == 2
    assert figures(events)[0] == figures(before)[2]  # the third step again, to the bit
    assert (folder / "checkpoints" / "step-000003.damaged").is_dir()


def test_only_damaged_checkpoints_is_an_error_not_a_new_start(config_file):
    folder, _ = _spoil(config_file, 1, "truncated")
    for step in (1, 2):
        (RunFolder(folder).checkpoint(step) / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(AssertionError, match=r"no checkpoint in .* is intact"):
        run(config_file, 1)


def _diverge(config_file: Path) -> str:
    options = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "optim.clip=0", "train.steps=50"]
    options += ["parallel.sp=2", "checkpoint.every=1"]
    return _caught(config_file, options, (RunError,))


def test_loss_that_is_not_finite_ends_the_run_on_all_ranks(config_file):
    messages = run_distributed(_diverge, 2, config_file)
    assert messages[0] == messages[1]
    assert "at step" in messages[0]
    assert "lower optim.learning_rate" in messages[0]
    # What was saved before still loads.
    events = run(config_file, 2, "parallel.sp=2", "train.steps=1", "evaluate.sequences=0")
    assert started_at(events) >= 1


def _no_folder(config_file: Path) -> str:
    return _caught(config_file, ["run.dir=/proc/longhaul", "parallel.sp=2"], (ValueError,))


def test_unwritable_run_folder_is_told_by_all_ranks(config_file):
    """A folder that only the attempt shows to be unwritable."""
    for message in run_distributed(_no_folder, 2, config_file):
        assert "run.dir /proc/longhaul cannot be written" in message
