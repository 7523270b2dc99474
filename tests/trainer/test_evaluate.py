"""Held-out loss and the n-gram models, against their definitions."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from models.lm import LanguageModel
from tests.trainer.runs import run
from trainer.config import DataConfig, load_config
from trainer.data import SequenceReader, TokenStream
from trainer.evaluate import ngram_losses
from trainer.layout import Layout


def test_ngram_models_equal_a_count_by_hand(dataset):
    data = DataConfig(path=str(dataset))
    train, held_out = TokenStream(data, "train"), TokenStream(data, "held_out")
    text = train.read(0, train.token_count)[0].tolist()
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
        logits, _ = model(batch.tokens, reset=batch.reset)
    losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(float(losses.mean()) / math.log(2), rel=1e-6)
    assert result["tokens"] == 3 * 192
    bounds = [(start, stop) for start, stop, _ in result["by_position"]]
    assert bounds == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 192)]
    for start, stop, loss in result["by_position"]:
        assert loss == pytest.approx(float(losses[:, start:stop].mean()), rel=1e-5)
