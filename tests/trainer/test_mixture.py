"""Several sources with weights: the same sequences on any dp x sp, and after any resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources import Selection
from data_prep.write import Settings, prepare
from tests.trainer.runs import refused, run
from trainer.config import load_config
from trainer.data import SequenceReader, open_split
from trainer.layout import Layout
from trainer.settings import ConfigError


def _prepared(folder: Path, text: str, **settings) -> str:
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    chosen = Settings(held_out=0.2, block_size=64, **settings)
    prepare(Selection((str(folder / "text.txt"),)), folder / "set", chosen, 1, tell=None)
    return str(folder / "set")


@pytest.fixture
def sources(tmp_path):
    """Of letters and of digits, so that a sequence tells where it is from."""
    dice = np.random.default_rng(0)
    return [
        _prepared(tmp_path / name, "".join(dice.choice(list(alphabet), size)))
        for name, alphabet, size in (("letters", "abcdef \n", 9000), ("digits", "0123456\n", 3000))
    ]


def _weights(sources: list[str], *weights: float) -> str:
    pairs = zip(sources, weights, strict=True)
    return "data.path={" + ", ".join(f"{path}: {weight}" for path, weight in pairs) + "}"


def test_sequences_come_by_weight_from_one_source_each(config_file, sources):
    """3 to 1 in every four; each source in epochs of its own, of permutations without a repeat."""
    config = load_config(config_file, [_weights(sources, 3, 1), "run.seed=5"])
    reader = SequenceReader(open_split(config, "train"), Layout(192), with_reset=False)
    order = reader.order(5, shift=False)
    counts = [span.sequences for span in reader.spans]
    begins = [order[n] for n in range(4 * counts[1])]
    drawn = []
    for begin in begins:
        text = bytes(reader.micro_batch([begin]).inputs[0].tolist()).decode()
        assert not (set(text) & set("abcdef") and set(text) & set("0123456"))
        drawn.append(int(bool(set(text) & set("0123456"))))
    assert all(sum(drawn[n : n + 4]) == 1 for n in range(0, len(drawn), 4))
    digits = [begin for begin, source in zip(begins, drawn, strict=True) if source]
    assert sorted(digits) == list(reader.spans[1].first + 192 * np.arange(counts[1]))
    assert [p.consumed for p in order.positions(8)] == [6, 2]


def test_losses_are_the_same_on_any_ranks_and_after_a_stop(config_file, sources, tmp_path):
    """One worker, two of dp, two of sp, and one that stops within the run: the same sequences."""
    mixed = [_weights(sources, 0.7, 0.3), "train.steps=4", "evaluate.sequences=8"]

    def of(name: str, ranks: int, *more: str) -> Path:
        folder = tmp_path / name
        run(config_file, ranks, *mixed, f"run.dir={folder}", *more)
        return folder

    whole = of("whole", 1)
    stopped = of("stopped", 1, "train.stop_after=2", "checkpoint.every=1")
    of("stopped", 2, "parallel.sp=2")
    of_dp = of("dp", 2)
    read = [(f / "sequences.jsonl").read_text() for f in (whole, stopped, of_dp)]
    assert read[0] == read[1] == read[2]
    losses = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, stopped, of_dp)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-5)
    result = json.loads((whole / "evaluation.json").read_text())
    names, tokens, sums, _ = zip(*result["by_source"], strict=True)
    assert list(names) == sources
    assert tokens == (5 * 192, 3 * 192)  # 5.6 and 2.4 of eight are the exact shares
    assert np.dot(tokens, sums) / sum(tokens) == pytest.approx(result["loss"])
    assert "bigram" in result["baselines"]
    of("whole", 1, f"evaluate.path={sources[1]}")  # no longer the text that n-grams are counted in
    assert json.loads((whole / "evaluation.json").read_text())["baselines"] == {}
    manifest = json.loads((whole / "checkpoints/step-000004/manifest.json").read_text())
    assert manifest["positions"] == [[0, 5], [0, 3]]


def test_what_cannot_be_mixed_is_refused(config_file, sources, tmp_path):
    """Other tokens, weights that are none or changed, a source twice; by workers too, of URLs."""
    ended = _prepared(tmp_path / "ended", "a text\n" * 500, end_of_document="new")
    for options, said in (
        ([_weights([sources[0], ended], 1, 1)], "not of one tokenizer"),
        ([_weights(sources, 1, 0)], "weight 0.0 of .* is not positive"),
        ([_weights(sources, 1, 1e-9)], "round them"),
        ([f"data.path={{{sources[0]}: many}}"], "is not of type float"),
        ([f"data.path={{{sources[0]}: 1, {sources[0]}: 2}}"], "twice"),
        (["data.path={}"], "no source"),
        ([_weights([sources[0], f"{sources[0]}/../set"], 1, 1)], "are one folder"),
        ([_weights([sources[0], "nowhere"], 1, 1)], "nowhere holds no dataset.json"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(config_file, options)
    run(config_file, 1, _weights(sources, 3, 1), "train.stop_after=1")
    with pytest.raises(ConfigError, match="not the data that the run"):
        load_config(config_file, [_weights(sources, 1, 1)])
    remote = _weights([f"file://{sources[0]}", f"file://{ended}"], 1, 1)
    options = [
        remote,
        f"data.cache={tmp_path / 'cache'}",
        "model.vocab_size=257",
        "run.dir=" + str(tmp_path / "x"),
    ]
    assert "not of one tokenizer" in refused(config_file, 1, *options)
