"""Synthetic tasks: the answer is there to be found, where it was said to be."""

import json

import numpy as np
import pytest

from data_prep import synthetic
from data_prep.schema import load_info
from data_prep.synthetic import SyntheticSettings, prepare_synthetic
from data_prep.synthetic.__main__ import main
from data_prep.synthetic.s5 import ELEMENTS
from data_prep.verify import verify
from data_prep.write import only_writer
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


@pytest.mark.parametrize("rows_at_once", [2, 4])
def test_distances_take_turns_whatever_fits_memory(rows_at_once, tmp_path, monkeypatch):
    """Fewer rows than distances, and more."""
    monkeypatch.setattr(synthetic, "ROWS_AT_ONCE", rows_at_once * NEEDLE.length)
    rows = _rows(NEEDLE, tmp_path / "needle")
    assert len(rows) == 41
    lies = [61 - (int(np.flatnonzero(row == 10)[0]) + 1) for row in rows]
    assert lies == [NEEDLE.distances[index % 3] for index in range(41)]


def test_same_settings_are_found_again_and_others_refused(tmp_path):
    first = prepare_synthetic(COPY, tmp_path / "set")
    assert prepare_synthetic(COPY, tmp_path / "set").fingerprint == first.fingerprint
    with pytest.raises(ValueError, match="choose another --out"):
        prepare_synthetic(NEEDLE, tmp_path / "set")


def test_two_do_not_write_one_folder(tmp_path):
    """Nor one after the other has found it missing."""
    out = tmp_path / "set"
    with only_writer(tmp_path / "set.partial", out), pytest.raises(ValueError, match="is writing"):
        prepare_synthetic(COPY, out)
    prepare_synthetic(COPY, out)
    with pytest.raises(ValueError, match="has just written"), only_writer(tmp_path / "a", out):
        pass
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["copy", "--length", "20"], "use at least 34"),
        (["needle", "--length", "64", "--distances", "5,100"], "--distances 5,100"),
        (["needle", "--length", "64"], "--distances is empty"),
        (["copy", "--alphabet", "130"], "must fit a byte"),
        (["variables", "--alphabet", "80"], "must fit a byte"),
        (["variables", "--tokens", "6", "--alphabet", "9"], "need 18 names"),
        (["mqar", "--tokens", "20", "--alphabet", "16"], "as many keys: use --alphabet 20"),
        (["mqar", "--length", "60"], "use at least 64"),
        (["cycle", "--length", "40", "--distances", "3..39"], "--distances 39"),
        (["cycle"], "--distances is empty"),
        (["parity", "--length", "1"], "at least two tokens"),
        (["s5", "--alphabet", "1"], "use 2 to 120"),
        (["copy", "--train", "0"], "must be positive"),
        (["copy", "--seed", "-1"], "--seed -1 is not from 0"),
        (["copy", "--seed", str(1 << 32)], "--seed 4294967296 is not from 0 to 4294967295"),
        (["copy", "--distances", "5,10"], "copy asks for nothing by distance"),
        (["needle", "--distances", "5,x"], "--distances: 'x' is neither a number nor two"),
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
    assert shards[0].inputs.tolist() == rows[[5, 9], :32].tolist()
    # the marker eight times, as in the papers: what is to be copied is nowhere read a second time
    assert shards[1].inputs[:, :-8].tolist() == rows[[5, 9], 32:-8].tolist()
    assert (shards[1].inputs[:, -8:] == 7).all()
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


def test_every_key_is_asked_for_once_after_the_pairs(tmp_path):
    settings = SyntheticSettings("mqar", length=40, tokens=4, alphabet=6, train=30, held_out=4)
    for row in _rows(settings, tmp_path / "mqar"):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(pairs) == 4
        (asked,) = np.nonzero(row[8:])
        queries = row[8:][asked[::2]], row[8:][asked[1::2]]
        assert sorted(queries[0]) == sorted(pairs)
        for key, answer in zip(*queries, strict=True):
            assert answer - 13 == pairs[key] - 7  # 1 blank, 6 keys, 6 values


def test_a_chain_leads_to_the_value(tmp_path):
    settings = SyntheticSettings("variables", length=60, tokens=3, alphabet=9, train=30, held_out=4)
    for row in _rows(settings, tmp_path / "variables"):
        (signs,) = np.nonzero(row == 27)
        assert len(signs) == 9
        known = {}
        for sign in signs:  # every name is set after what it is set to
            target, source = row[sign + 1], row[sign + 2]
            known[target] = known.get(source, source)
            assert known[target] >= 18
        name, ask, answer = row[-3:]
        assert ask == 28
        assert answer - 29 == known[name] - 18


def _problem(row: np.ndarray, words: int) -> tuple[np.ndarray, int]:
    """Symbols from 0 on, and the answer."""
    assert row[-2] == words - 1
    return row[:-2][row[:-2] > 0] - 1, int(row[-1]) - words


@pytest.mark.parametrize("task", ["cycle", "even-pairs", "majority"])
def test_problems_have_the_lengths_and_answers_they_should(tmp_path, task):
    settings = SyntheticSettings(
        task, length=30, alphabet=4, distances=(3, 9, 28), train=60, held_out=4
    )
    words = {"cycle": 5, "even-pairs": 4, "majority": 6}[task]
    answers = set()
    for index, row in enumerate(_rows(settings, tmp_path / "problem")):
        symbols, answer = _problem(row, words)
        assert len(symbols) == (3, 9, 28)[index % 3]
        place = 0
        for symbol in symbols:
            place += {0: 0, 1: 1, 2: -1}.get(int(symbol), 0)
        changes = np.count_nonzero(np.diff(symbols))
        often = [int((symbols == n).sum()) for n in range(4)]
        want = {"cycle": place % 5, "even-pairs": changes % 2, "majority": np.argmax(often)}[task]
        assert answer == want
        answers.add(answer)
    assert len(answers) == {"cycle": 5, "even-pairs": 2, "majority": 4}[task]


def test_states_are_asked_for_at_every_step(tmp_path):
    rows = _rows(SyntheticSettings("parity", length=20, train=9, held_out=4), tmp_path / "parity")
    for row in rows:
        ones, state = row[0::2] - 1, 0
        for one, answer in zip(ones, row[1::2], strict=True):
            state ^= int(one)
            assert answer - 4 == state
    settings = SyntheticSettings("s5", length=20, alphabet=6, train=9, held_out=4)
    rows = _rows(settings, tmp_path / "s5")
    for row in rows:
        things = list(range(5))
        for symbol, answer in zip(row[0::2] - 1, row[1::2] - 8, strict=True):
            things = [ELEMENTS[symbol][place] for place in things]  # each goes where it is sent
            assert things == ELEMENTS[answer].tolist()


def test_ranges_of_lengths(tmp_path):
    arguments = ["cycle", "--length", "20", "--distances", "3..5,9", "--train", "8"]
    assert main([*arguments, "--out", str(tmp_path / "set")]) == 0
    assert load_info(tmp_path / "set").synthetic.distances == [3, 4, 5, 9]


def test_an_address_is_not_taken_for_a_folder(capsys):
    assert main(["copy", "--out", "s3://bucket/copy"]) == 1
    assert "is an address: name a folder" in capsys.readouterr().err
