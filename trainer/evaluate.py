"""Held-out loss, by position too, and the n-gram models it must beat; what actions earn."""

import importlib
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.mixer import Carry
from trainer.config import Config
from trainer.data import SequenceReader, TokenStream
from trainer.engine import Engine
from trainer.loss import token_scores
from trainer.worker import Worker

if TYPE_CHECKING:
    from trainer.rollout import Rollouts

COUNTED = 1 << 28  # tokens, for the n-gram models


@dataclass
class Evaluation:
    """Losses in nats per token over `tokens` held-out tokens, those that count.

    Of frames, the squared errors of actions, which have neither bytes nor a likeliest one.
    """

    loss: float
    bits_per_byte: float | None
    accuracy: float | None  # share of tokens that were the likeliest
    sequences: int
    tokens: int
    text_bytes: int  # behind these tokens
    # (first position, one past the last, mean loss) in powers of two: does more context help?
    by_position: list[tuple[int, int, float]] = field(default_factory=list)
    # (first position, one past the last, share of tokens that were the likeliest)
    accuracy_by_position: list[tuple[int, int, float]] = field(default_factory=list)
    # (distance in tokens, mean loss, accuracy) where the data has distances (data_prep.synthetic)
    by_distance: list[tuple[int, float, float]] = field(default_factory=list)
    # (source, tokens, mean loss, bits per byte) where the data has several
    by_source: list[tuple[str, int, float, float | None]] = field(default_factory=list)


def bits_per_byte(nats_per_token: float, tokens: float, text_bytes: float) -> float:
    """Independent of the tokenizer: the nats of all tokens over the bytes behind them, in bits."""
    return nats_per_token / math.log(2) * tokens / max(text_bytes, 1)


@torch.no_grad()
def evaluate(engine: Engine, reader: SequenceReader, worker: Worker) -> Evaluation:
    """The mean loss over the first sequences of the reader's split, evaluate.sequences at most.

    Of several sources, by their weights.

    Sequences are cut and sharded as in training and dealt to the DP ranks; every rank must call
    this and gets the same result. Every rank runs equally many forwards, as ZeRO-3 demands: where
    the sequences run out it repeats the last and does not count it.
    """
    topology, device, config = worker.topology, worker.device, worker.config
    sequences = reader.first_sequences(config.evaluate.sequences)
    edges, segments = _position_edges(reader.layout.seq_len), reader.layout.segments
    inner = torch.tensor(edges[1:-1], device=device)
    task = reader.stream.info.synthetic
    distances = (task.distances if task else []) or [0]
    sources = reader.stream.names
    frames = reader.stream.info.trajectories
    lengths = None if frames else torch.from_numpy(reader.stream.token_bytes).to(device)
    # of all sources, distances and positions: loss, likeliest, tokens, bytes of their text
    shape = 4, len(sources), len(distances), len(edges) - 1
    totals = torch.zeros(shape, dtype=torch.float64, device=device)
    engine.eval()
    for first in range(0, len(sequences), topology.dp_size):
        index = first + topology.dp_rank
        begin, source = sequences[min(index, len(sequences) - 1)]
        carry: list[Carry] | None = None
        for segment in range(segments):
            batch = reader.micro_batch([begin], segment)
            reset = None if batch.reset is None else batch.reset.to(device)
            labels = batch.labels.to(device)
            readout = partial(token_scores, labels=labels, tile=config.train.loss_tile_tokens)
            last, inputs = segment == segments - 1, batch.inputs.to(device)
            scores, carry = engine(inputs, carry, reset=reset, readout=readout, last=last)
            if index < len(sequences):
                held = reader.layout.held(segment)
                positions = torch.arange(held.start, held.stop, device=device)
                bins = torch.bucketize(positions, inner, right=True)
                scored = torch.cat([scores[:, 0], *_counted(labels, lengths)]).double()
                totals[:, source, index % len(distances)].index_add_(1, bins, scored)
    engine.train()
    totals = topology.gather(totals).sum(0)
    loss, right, tokens, text_bytes = totals.sum((1, 2, 3)).tolist()
    return Evaluation(
        loss=loss / tokens,
        bits_per_byte=None if frames or task else bits_per_byte(loss / tokens, tokens, text_bytes),
        accuracy=None if frames else right / tokens,
        sequences=len(sequences),
        tokens=int(tokens),
        text_bytes=int(text_bytes),
        by_position=_by_position(totals.sum(1), edges, what=0),
        accuracy_by_position=[] if frames else _by_position(totals.sum(1), edges, what=1),
        by_distance=_by_distance(totals.sum(1), distances),
        by_source=_by_source(totals.sum((2, 3)), sources, bool(frames)) if len(sources) > 1 else [],
    )


def _counted(labels: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of labels [1, T], or of actions [1, T, A]: which count, and the bytes of their text."""
    if lengths is None:
        every = torch.ones(labels.shape[:2], device=labels.device)
        return every, torch.zeros_like(every)
    counts = (labels >= 0).float()
    return counts, lengths[labels.clamp(min=0)] * counts


def _by_source(
    totals: Tensor, sources: list[str], frames: bool
) -> list[tuple[str, int, float, float | None]]:
    rows = zip(sources, totals.T.tolist(), strict=True)
    return [
        (source, int(n), loss / n, None if frames else bits_per_byte(loss / n, n, text_bytes))
        for source, (loss, _, n, text_bytes) in rows
        if n
    ]


def _by_position(totals: Tensor, edges: list[int], what: int) -> list[tuple[int, int, float]]:
    """The mean of a row of the totals."""
    rows = zip(edges[:-1], edges[1:], totals.sum(1).T.tolist(), strict=True)
    return [(start, stop, row[what] / row[2]) for start, stop, row in rows if row[2]]


def _by_distance(totals: Tensor, distances: list[int]) -> list[tuple[int, float, float]]:
    rows = zip(distances, totals.sum(2).T.tolist(), strict=True)
    return [
        (distance, loss / n, hits / n) for distance, (loss, hits, n, _) in rows if distance and n
    ]


def final_result(
    evaluated: Evaluation, train: TokenStream, held_out: SequenceReader, worker: Worker
) -> dict[str, Any]:
    """The last held-out loss beside the n-gram models' on the same tokens, and what is earned."""
    config = worker.config
    losses: dict[str, float] = {}
    info = train.info
    if not info.synthetic and not info.trajectories:  # of which n-grams would tell nothing
        losses = _ngram_losses(train, held_out.stream, evaluated)
    counted = evaluated.tokens, evaluated.text_bytes
    baselines = {
        name: {"loss": loss, "bits_per_byte": bits_per_byte(loss, *counted)}
        for name, loss in losses.items()
    }
    result = {"baselines": baselines, "of": evaluated_on(held_out, config)}
    if config.evaluate.rollouts:
        result["rollouts"] = asdict(_rolled_out(config, worker.device))
    return {**asdict(evaluated), **result}


def check_rollouts() -> None:
    """Raises ValueError where episodes cannot be played on this machine."""
    try:
        importlib.import_module("trainer.rollout")
    except ImportError as error:
        raise ValueError(f"evaluate.rollouts: {error}: pip install 'longhaul[rl]'") from None


def _rolled_out(config: Config, device: torch.device) -> "Rollouts":
    from trainer.rollout import roll_out

    settings, folder = config.evaluate, Path(config.run.dir)
    chosen = settings.rollout_return, settings.rollout_frames
    return roll_out(folder, settings.rollouts, device, config.first_rollout, *chosen)


def evaluated_on(held_out: SequenceReader, config: Config) -> list[Any]:
    """Which data, how much, at which length, what was played: a result of others is none."""
    settings = config.evaluate
    chosen = settings.rollout_return, settings.rollout_frames
    played = settings.rollouts, config.first_rollout, *chosen
    return [
        held_out.stream.fingerprint,
        held_out.layout.seq_len,
        len(held_out.first_sequences(settings.sequences)),
        *(played if settings.rollouts else ()),
    ]


def _position_edges(seq_len: int) -> list[int]:
    """0, 16, 32, 64, ... up to the sequence's length."""
    edges = [0]
    step = 16
    while step < seq_len:
        edges.append(step)
        step *= 2
    return [*edges, seq_len]


def _ngram_losses(
    train: TokenStream, held_out: TokenStream, evaluated: Evaluation
) -> dict[str, float]:
    """Those of each source, counted in it alone, and together by the tokens evaluated in it.

    None where other data is held out than that of several sources: which one's to count?
    """
    names = train.names
    if len(names) > 1 and held_out.names != names:
        return {}
    tokens = {name: n for name, n, *_ in evaluated.by_source} or {names[0]: evaluated.tokens}
    losses: dict[str, float] = {}
    for name, n in tokens.items():
        for model, loss in ngram_losses(train, held_out, n, names.index(name)).items():
            losses[model] = losses.get(model, 0.0) + loss * n / evaluated.tokens
    return losses


def ngram_losses(
    train: TokenStream, held_out: TokenStream, evaluated_tokens: int, source: int = 0
) -> dict[str, float]:
    """Nats per token of the unigram and the bigram model, on the tokens that `evaluate` saw.

    Counted on the first COUNTED tokens of a source's training split. The unigram model is add-one
    smoothed, the bigram model takes the unigram as its prior with the weight of one observation.
    """
    first = held_out.firsts[source]
    tokens, _ = held_out.read(first, first + evaluated_tokens + 1)
    context, label = tokens[:-1], tokens[1:]
    vocabulary = train.info.vocab_size
    wanted, where = np.unique(context * vocabulary + label, return_inverse=True)
    singles = np.zeros(vocabulary, np.int64)
    pairs = np.zeros(len(wanted), np.int64)
    start = train.firsts[source]
    stop = start + min(COUNTED, train.tokens[source])
    for begin in range(start, stop - 1, 1 << 22):
        part, _ = train.read(begin, min(begin + (1 << 22), stop - 1) + 1)
        singles += np.bincount(part[:-1], minlength=vocabulary)
        codes = part[:-1] * vocabulary + part[1:]
        slot = np.minimum(np.searchsorted(wanted, codes), len(wanted) - 1)
        pairs += np.bincount(slot[wanted[slot] == codes], minlength=len(wanted))
    unigram = (singles + 1) / (singles.sum() + vocabulary)
    bigram = (pairs[where] + unigram[label]) / (singles[context] + 1)
    return {
        "unigram": float(-np.log(unigram[label]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }
