"""Held-out loss and the n-gram models, against their definitions."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.sources import Selection
from data_prep.synthetic import SyntheticSettings, prepare_synthetic
from data_prep.write import Settings, prepare
from launch.report import risen_loss, write_report
from models.lm import LanguageModel
from tests.trainer.runs import run
from trainer.config import ConfigError, DataConfig, load_config
from trainer.data import SequenceReader, TokenStream
from trainer.evaluate import ngram_losses
from trainer.layout import Layout
from trainer.run_folder import RunFolder


def test_ngram_models_equal_a_count_by_hand(dataset):
    data = DataConfig(path=str(dataset))
    train, held_out = TokenStream(data, "train"), TokenStream(data, "held_out")
    text = train.read(0, train.tokens[0])[0].tolist()
    target = held_out.read(0, 1001)[0].tolist()
    singles, pairs = Counter(text[:-1]), Counter(pairwise(text))
    unigram = {t: (singles[t] + 1) / (len(text) - 1 + 256) for t in range(256)}
    expected = {
        "unigram": -sum(math.log(unigram[t]) for t in target[1:]) / 1000,
        "bigram": -sum(
            math.log((pairs[c, t] + unigram[t]) / (singles[c] + 1)) for c, t in pairwise(target)
        )
        / 1000,
    }
    assert ngram_losses(train, held_out, 1000) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sp"), [(1, 1), (4, 2), (3, 3)])
def test_loss_by_position_is_the_mean_over_each_range(config_file, ranks, sp):
    """Any topology gives the loss of the untrained model as one process computes it.

    Three sequences on two DP ranks leave one rank with nothing to count in the last round.
    """
    options = [f"parallel.sp={sp}", "train.steps=1", "optim.learning_rate=1e-30"]
    options += ["train.batch_size=2", "evaluate.sequences=3"]
    run(config_file, ranks, *options)
    result = json.loads((config_file.parent / "run" / "evaluation.json").read_text())
    config = load_config(config_file, [])
    reader = SequenceReader(TokenStream(config.data, "held_out"), Layout(192), True)
    torch.manual_seed(config.run.seed)
    model = LanguageModel(config.model)
    batch = reader.micro_batch([0, 192, 384])
    with torch.no_grad():
        logits, _ = model(batch.inputs, reset=batch.reset)
    losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(float(losses.mean()) / math.log(2), rel=1e-6)
    assert result["tokens"] == 3 * 192
    bounds = [(start, stop) for start, stop, _ in result["by_position"]]
    assert bounds == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 192)]
    for start, stop, loss in result["by_position"]:
        assert loss == pytest.approx(float(losses[:, start:stop].mean()), rel=1e-5)


@pytest.mark.slow
def test_bits_per_byte_count_the_bytes_of_the_tokens_that_were_scored(config_file, tmp_path):
    """A text that begins cheap in tokens and ends dear: the split's mean is neither."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(["abcabcabd " * 100], trainer)
    tokenizer.save(str(tmp_path / "bpe.json"))
    (tmp_path / "train.txt").write_text("abcabcabd " * 2000)
    held_out = "abcabcabd " * 400 + "xyzzy éö " * 400
    (tmp_path / "held.txt").write_text(held_out)
    selection = Selection((str(tmp_path / "train.txt"),), (str(tmp_path / "held.txt"),))
    settings = Settings(str(tmp_path / "bpe.json"), end_of_document="<|end|>")
    prepare(selection, tmp_path / "data", settings, 1, tell=None)
    options = [f"data.path={tmp_path / 'data'}", "train.steps=1", "evaluate.sequences=2"]
    options += ["data.reset_state=false", "train.seq_len=100", "train.batch_size=1"]
    run(config_file, 1, *options)
    result = json.loads((config_file.parent / "run" / "evaluation.json").read_text())
    stream = TokenStream(DataConfig(path=str(tmp_path / "data")), "held_out")
    scored = stream.read(1, 201)[0].tolist()
    text_bytes = len(tokenizer.decode(scored).encode())
    assert result["text_bytes"] == text_bytes
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] / math.log(2) * 200 / text_bytes, rel=1e-6
    )
    # its name of seven bytes is no text
    assert stream.token_bytes[tokenizer.token_to_id("<|end|>")] == 0
    split = stream.info.splits["held_out"]
    mean = split.text_bytes / split.tokens
    assert text_bytes / 200 > 1.5 * mean


def test_a_report_says_when_losses_rose():
    def lines(*losses: float | None) -> list[dict]:
        return [{"loss": loss} for loss in losses]

    assert risen_loss(lines(3.0, 2.9, 2.5, 2.4)) is None
    assert risen_loss(lines(3.0)) is None
    told = risen_loss(lines(2.0, 2.1, None, 3.0, 3.2))
    assert told
    assert "3.100 over the last 2 steps, 2.050 over the first" in told


@pytest.mark.slow
def test_a_report_continues_the_text_that_was_evaluated(config_file, dataset, tmp_path):
    """Its own data has no held-out split."""
    (tmp_path / "text.txt").write_text("nothing like it " * 1000)
    selection, settings = Selection((str(tmp_path / "text.txt"),)), Settings(held_out=0)
    prepare(selection, tmp_path / "data", settings, 1, tell=None)
    folder = RunFolder(config_file.parent / "run")
    options = [f"data.path={tmp_path / 'data'}", f"evaluate.path={dataset}", "train.steps=1"]
    run(config_file, 1, *options)
    write_report(folder)
    held_out = TokenStream(DataConfig(path=str(dataset)), "held_out")
    begins = bytes(held_out.read(0, 40)[0].tolist()).decode()
    assert folder.samples.read_text().startswith(begins)
    folder.metrics.write_text("")
    with pytest.raises(ValueError, match="has taken no step yet"):
        write_report(folder)


@pytest.mark.slow
def test_held_out_data_may_be_others_and_longer(config_file, tmp_path):
    """Trained on problems of 3 to 8 symbols, tested on 30: the losses are those of one process."""
    short = SyntheticSettings("cycle", length=12, distances=(3, 8), train=40, held_out=4)
    long = SyntheticSettings("cycle", length=36, distances=(8, 30), train=1, held_out=6)
    prepare_synthetic(short, tmp_path / "short")
    prepare_synthetic(long, tmp_path / "long")
    options = [f"data.path={tmp_path / 'short'}", "data.reset_state=false", "train.seq_len=12"]
    options += [f"evaluate.path={tmp_path / 'long'}", "evaluate.seq_len=36"]
    options += ["train.steps=1", "optim.learning_rate=1e-30", "evaluate.sequences=6"]
    run(config_file, 2, *options, "parallel.sp=2")
    result = json.loads((config_file.parent / "run" / "evaluation.json").read_text())
    config = load_config(config_file, options)
    stream = TokenStream(DataConfig(path=str(tmp_path / "long")), "held_out")
    batch = SequenceReader(stream, Layout(36), False).micro_batch([36 * n for n in range(6)])
    torch.manual_seed(config.run.seed)
    with torch.no_grad():
        logits, _ = LanguageModel(config.model)(batch.inputs)
    loss = F.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=-100)
    assert result["tokens"] == 6
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert [distance for distance, _, _ in result["by_distance"]] == [8, 30]
    # more of them are another result; more than there are, the same
    for asked, there in ((2, 2), (6, 6), (600, 6)):
        run(config_file, 2, *options, "parallel.sp=2", f"evaluate.sequences={asked}")
        again = json.loads((config_file.parent / "run" / "evaluation.json").read_text())
        assert (again["sequences"], again["loss"] == result["loss"]) == (there, there == 6)
    report = write_report(RunFolder(config_file.parent / "run"))
    assert f"{result['accuracy']:.1%} right" in report
    assert "bits per byte" not in report
    assert "launch generate" not in report
    page = RunFolder(config_file.parent / "run").report.read_text()
    assert "On 6 answers that were not trained on." in page
    assert f"| 30 | {result['by_distance'][1][2]:.1%} |" in page
    assert "n-gram" not in page
    (last,) = result["accuracy_by_position"]
    assert last == [32, 36, pytest.approx(result["accuracy"])]
    for wrong, said in (
        ("evaluate.seq_len=35", r"evaluate\.seq_len: 35 is not the 36 tokens that every sequence"),
        (f"evaluate.path={tmp_path}", r"evaluate\.path: .* holds no dataset\.json"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(config_file, [*options, wrong])
    with pytest.raises(ConfigError, match=r"evaluate\.seq_len: 36 is not divisible by parallel"):
        load_config(config_file, [*options, "parallel.sp=5"])
    prepare_synthetic(SyntheticSettings("parity", length=36, held_out=6), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"evaluate\.path: .*are not of one tokenizer \(vocab"):
        load_config(config_file, [*options, f"evaluate.path={tmp_path / 'other'}"])
