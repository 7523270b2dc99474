"""Sequences of any length from blocks, a rank reading its own shard only.

A split is one stream of tokens in fixed blocks (data_prep.schema). A sequence of length L that
begins at token i is tokens [i, i + L], one more than L for the last label; rank s of S reads tokens
[i + s * T, i + (s + 1) * T], T = L / S, and the blocks these lie in, no others.

Streaming has a StreamingDataset, not used here: it deals out whole samples, in an order that
depends on the number of workers, and leaves shared memory behind when a worker is killed. Here the
order (trainer.order) depends on no such number.
"""

from bisect import bisect_right
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.blocks import Blocks
from data_prep.mixture import Mixture
from data_prep.tokenizer import folder_tokenizer
from trainer.checks import info_faults, mixing_faults, tokenizer_faults
from trainer.config import Config, DataConfig
from trainer.layout import Layout
from trainer.order import SequenceOrder, Span
from trainer.worker import Worker

IGNORED = -100  # a label that no loss counts; torch's own choice


@dataclass(frozen=True)
class MicroBatch:
    """One rank's shard of some sequences: inputs and labels [B, T], reset [B, T] or None.

    Tokens and labels are int64; a label is IGNORED where it does not count. Frames are
    [B, T, A + 1 + S] and their labels, actions, [B, T, A] float32. `scored_tokens` of all shards
    of a sequence count; None: every token does.
    """

    inputs: Tensor
    labels: Tensor
    reset: Tensor | None
    scored_tokens: int | None = None


class ReadAhead:
    """The segments of some sequences as micro-batches, each read while another is in use."""

    def __init__(
        self, read: Callable[[int], MicroBatch], segments: list[int], pool: ThreadPoolExecutor
    ) -> None:
        """`segments` in the order in which they are asked for."""
        self._read, self._order, self._pool = read, iter(segments), pool
        self._ahead = pool.submit(read, next(self._order))

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> MicroBatch:
        """Raises DataError naming the file and the block that cannot be read."""
        ready = self._ahead.result()
        if (following := next(self._order, None)) is not None:
            self._ahead = self._pool.submit(self._read, following)
        return ready

    def wait(self) -> None:
        """Until the next one is read. Raises as above."""
        self._ahead.result()


@dataclass(frozen=True)
class StepBatch:
    """What a rank reads for a step, and the first token of every sequence of it, on any rank.

    Of each micro-batch the segments come as they are read. The tokens of several sources are
    counted end to end.
    """

    micro_batches: list[ReadAhead]
    begins: list[int]


class TokenStream:
    """Random access to the tokens of one split, those of several sources end to end."""

    def __init__(self, config: DataConfig, split: str) -> None:
        """Raises DataError, or ValueError, where the data are not there or not as written."""
        self.names, self.mixture = list(config.sources), Mixture.of(config.sources)
        self.sources = [Blocks(name, split, config.cache_of(name)) for name in self.names]
        infos = [source.info for source in self.sources]
        if faults := list(mixing_faults(self.names, infos)):
            raise ValueError("\n".join(faults))
        self.folder, self.info = self.sources[0].folder, infos[0]
        self.fingerprint = self.mixture.fingerprint([info.fingerprint for info in infos])
        self.tokens = [info.splits[split].tokens for info in infos]
        self.firsts = [sum(self.tokens[:source]) for source in range(len(infos))]

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] the bytes of text that each token stands for; 0 where it has none."""
        lengths = np.zeros(self.info.vocab_size, np.int64)
        known = folder_tokenizer(self.folder).token_bytes()
        lengths[: len(known)] = np.maximum(known, 0)[: len(lengths)]
        if (end := self.info.end_of_document) is not None:
            lengths[end] = 0  # its name is no text
        return lengths

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens, or frames, [start, stop) of one source; the document starts among them.

        Raises DataError naming the file and the block that cannot be read.
        """
        source = bisect_right(self.firsts, start) - 1
        start, stop = start - self.firsts[source], stop - self.firsts[source]
        assert stop <= self.tokens[source]
        size = self.sources[source].info.block_size
        dtype = np.float32 if self.info.trajectories else np.int64
        tokens = np.empty((stop - start, *self.info.token_shape), dtype)
        starts = []
        for block in range(start // size, (stop - 1) // size + 1):
            found, begun = self.sources[source].read(block)
            begin, end = max(start, block * size), min(stop, (block + 1) * size)
            tokens[begin - start : end - start] = found[begin - block * size : end - block * size]
            starts.append(begun + (block * size - start))
        offsets = np.concatenate(starts)
        return tokens, offsets[(offsets >= 0) & (offsets < stop - start)]


def open_split(config: Config, split: str) -> TokenStream:
    """A split of the data, checked here too: the submitting machine may not have seen it."""
    stream = TokenStream(config.data, split)
    found = zip(stream.names, stream.sources, strict=True)
    faults = [
        fault for name, source in found for fault in info_faults(config, name, source.info, [split])
    ]
    if faults:
        raise ValueError("\n".join(f"{key}: {message}" for key, message in faults))
    return stream


class SequenceReader:
    """One rank's shard of any sequence of a split; `spans` says how many lie end to end where."""

    def __init__(
        self, stream: TokenStream, layout: Layout, with_reset: bool, shift: bool = False
    ) -> None:
        self.stream, self.layout, self.with_reset = stream, layout, with_reset
        seq_len = layout.seq_len
        # as many from wherever a shifted epoch begins
        counts = (max(0, tokens - (seq_len if shift else 1)) // seq_len for tokens in stream.tokens)
        self.spans = [Span(*each) for each in zip(stream.firsts, counts, strict=True)]

    def first_sequences(self, limit: int) -> list[tuple[int, int]]:
        """(first token, source) of the first `limit` in the order of the mixture, each once.

        Source after source.
        """
        turns = zip(self.spans, self.stream.mixture.counts(limit), strict=True)
        return [
            (span.first + index * self.layout.seq_len, source)
            for source, (span, count) in enumerate(turns)
            for index in range(min(count, span.sequences))
        ]

    def order(self, seed: int, shift: bool) -> SequenceOrder:
        """In which they are trained on."""
        return SequenceOrder(self.spans, self.stream.mixture, self.layout.seq_len, seed, shift)

    def micro_batch(self, begins: list[int], segment: int = 0) -> MicroBatch:
        """This rank's shard of a segment of the sequences that begin at the tokens `begins`.

        One row each. Labels are shifted before sharding, so the last token of a shard learns from
        the first of the next one.
        """
        held = self.layout.held(segment)
        length = len(held)
        rows: list[NDArray[Any]] = []
        reset = np.zeros((len(begins), length), np.uint8) if self.with_reset else None
        for row, begin in enumerate(begins):
            first = begin + held.start
            row_tokens, starts = self.stream.read(first, first + length + 1)
            rows.append(row_tokens)
            if reset is not None:
                reset[row, starts[starts < length]] = 1
        read = torch.from_numpy(np.stack(rows))
        task, frames = self.stream.info.synthetic, self.stream.info.trajectories
        if frames:  # hold their own labels
            inputs, labels = read[:, :-1].tensor_split([frames.width - frames.action_width], -1)
        else:
            inputs, labels = read[:, :-1], read[:, 1:]
        inputs, labels = inputs.contiguous(), labels.contiguous()
        if task:
            labels = labels.masked_fill(labels < task.scored_from, IGNORED)
            if task.hidden_as is not None:
                inputs = inputs.masked_fill(inputs >= task.scored_from, task.hidden_as)
        return MicroBatch(
            inputs,
            labels,
            None if reset is None else torch.from_numpy(reset),
            task.scored_tokens if task else None,
        )


def open_data(worker: Worker) -> tuple[TokenStream, SequenceReader | None]:
    """What is trained on, and this rank's shards of what is held out, if anything is.

    All workers are told what is wrong with the data. Raises DataError or ValueError.
    """
    config, together = worker.config, worker.topology.together
    data = together(partial(open_split, config, "train"))
    if not config.evaluate.sequences:
        return data, None
    held_out = together(partial(open_split, config.held_out, "held_out"))
    pair = [data.names[0], held_out.names[0]], [data.info, held_out.info]
    if faults := list(tokenizer_faults(*pair)):
        raise ValueError("\n".join(f"evaluate.path: {fault}" for fault in faults))
    layout = config.held_out.layout(worker.topology.sp_rank)
    return data, SequenceReader(held_out, layout, config.data.reset_state)


def training_batches(
    reader: SequenceReader,
    config: Config,
    dp_rank: int,
    consumed: int,
    done: tuple[int, int] = (0, 0),
) -> Generator[StepBatch, None, None]:
    """What this rank reads for every step from `consumed` sequences on.

    Of the first of them but what was `done` before: micro-batches, and reads of the one after. The
    first segment of every micro-batch is read a step ahead. Raises DataError.
    """
    order = reader.order(config.run.seed, config.data.shift)
    size, micro = config.train.batch_size, config.train.micro_batch_size
    segments = config.plan.reads

    def begin(first: int, pool: ThreadPoolExecutor, done: tuple[int, int] = (0, 0)) -> StepBatch:
        begins = [order[n] for n in range(first, first + size)]
        parts = (part * config.dp + dp_rank for part in range(done[0], config.accumulation))
        mine = (begins[part * micro : (part + 1) * micro] for part in parts)
        ahead, left = [], segments[done[1] :]
        for each in mine:
            ahead.append(ReadAhead(partial(reader.micro_batch, each), left, pool))
            left = segments
        return StepBatch(ahead, begins)

    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        ahead = begin(consumed, pool, done)
        while True:
            consumed += size
            ready, ahead = ahead, begin(consumed, pool)
            for micro_batch in ready.micro_batches:
                micro_batch.wait()
            yield ready
