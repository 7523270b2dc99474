"""Synthetic tasks: the answer is there to be found, where it was said to be."""

import json

import numpy as np
import pytest

from data_prep.schema import load_info
from data_prep.synthetic import SyntheticSettings, prepare_synthetic
from data_prep.synthetic.__main__ import main
from data_prep.verify import verify
from tests.trainer.runs import figures, plain_training, run
from trainer.config import ConfigError, DataConfig, load_config
from trainer.data import IGNORED, SequenceReader, TokenStream
from trainer.layout import Layout

NEEDLE = SyntheticSettings(
    "needle", length=64, tokens=3, alphabet=5, distances=(4, 20, 60), train=40, held_out=12
)
COPY = SyntheticSettings("copy", length=64, tokens=7, alphabet=5, train=40, held_out=12)


def _rows(settings, folder, split="train") -> np.ndarray:
    info = prepare_synthetic(settings, folder)
    assert verify(folder) == []
    stream = TokenStream(DataConfig(path=str(folder)), split)
    tokens, starts = stream.read(0, stream.tokens[0])
    assert len(tokens) % settings.length == 0
    assert starts.tolist() == list(range(0, len(tokens), settings.length))
    assert info.synthetic == load_info(folder).synthetic
    return tokens.reshape(-1, settings.length)


def test_copy_repeats_the_data_tokens_in_order(tmp_path):
    rows = _rows(COPY, tmp_path / "copy")
    assert len(rows) == 41
    for row in rows:
        context, ask, answer = row[:-8], row[-8], row[-7:]
        assert ask == 1 + 5 + 1
        data = context[context > 0]
        assert data.max() <= 5
        assert (answer - ask - 1).tolist() == (data - 1).tolist()
    places = {tuple(np.flatnonzero(row[:-8])) for row in rows}
    assert len(places) == 41


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_needle_lies_at_its_distance(tmp_path, split):
    rows = _rows(NEEDLE, tmp_path / "needle", split)
    for index, row in enumerate(rows):
        (here,) = np.flatnonzero(row == 10)  # 5 around it, 5 of data, this marker
        value, answer = row[here + 1 : here + 4], row[-3:]
        assert (answer - 12).tolist() == (value - 5).tolist()
        assert 61 - (here + 1) == NEEDLE.distances[index % 3]
        assert row[-4] == 11


def test_same_settings_are_found_again_and_others_refused(tmp_path):
    first = prepare_synthetic(COPY, tmp_path / "set")
    assert prepare_synthetic(COPY, tmp_path / "set").fingerprint == first.fingerprint
    with pytest.raises(ValueError, match="choose another --out"):
        prepare_synthetic(NEEDLE, tmp_path / "set")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["copy", "--length", "20"], "use at least 34"),
        (["needle", "--length", "64", "--distances", "5,100"], "--distances 5,100"),
        (["needle", "--length", "64"], "--distances is empty"),
        (["copy", "--alphabet", "90"], "above 84"),
        (["copy", "--train", "0"], "must be positive"),
    ],
)
def test_what_cannot_be_made_is_told(tmp_path, capsys, arguments, said):
    assert main([*arguments, "--out", str(tmp_path / "set")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_only_answers_are_labels(tmp_path):
    rows = _rows(COPY, tmp_path / "copy")
    stream = TokenStream(DataConfig(path=str(tmp_path / "copy")), "train")
    shards = [
        SequenceReader(stream, Layout(64, 2, shard), False).micro_batch([5 * 64, 9 * 64])
        for shard in (0, 1)
    ]
    assert [int((shard.labels != IGNORED).sum()) for shard in shards] == [0, 14]
    answers = shards[1].labels[:, -8:-1]
    assert answers.tolist() == rows[[5, 9], -7:].tolist()
    assert shards[0].tokens.tolist() == rows[[5, 9], :32].tolist()
    # the marker eight times, as in the papers: what is to be copied is nowhere read a second time
    assert shards[1].tokens[:, :-8].tolist() == rows[[5, 9], 32:-8].tolist()
    assert (shards[1].tokens[:, -8:] == 7).all()
    assert {shard.scored_tokens for shard in shards} == {7}


@pytest.mark.slow
def test_training_counts_answers_only_on_any_shard(config_file, tmp_path):
    """As plain torch does, though one shard has no answer at all; and accuracy by distance."""
    prepare_synthetic(NEEDLE, tmp_path / "needle")
    options = [f"data.path={tmp_path / 'needle'}", "data.reset_state=false", "train.seq_len=64"]
    options += ["evaluate.sequences=11"]
    events = run(config_file, 2, *options, "parallel.sp=2")
    for got, want in zip(figures(events), plain_training(config_file, *options), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    result = json.loads((config_file.parent / "run" / "evaluation.json").read_text())
    assert result["tokens"] == 33
    assert [distance for distance, _, _ in result["by_distance"]] == [4, 20, 60]
    losses = [loss for _, loss, _ in result["by_distance"]]
    mean = (4 * losses[0] + 4 * losses[1] + 3 * losses[2]) / 11  # of 11 sequences in turn
    assert result["loss"] == pytest.approx(mean)
    assert result["baselines"] == {}
    with pytest.raises(ConfigError, match="is not the 64 tokens that every sequence"):
        load_config(config_file, [*options, "train.seq_len=32"])
    with pytest.raises(ConfigError, match=r"data\.shift: every sequence of .* leave it off"):
        load_config(config_file, [*options, "data.shift=true"])
