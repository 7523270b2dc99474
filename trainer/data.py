"""Sequences of any length from blocks, a rank reading its own shard only.

A split is one stream of tokens in fixed blocks (data_prep.schema). A sequence of length L that
begins at token i is tokens [i, i + L], one more than L for the last label; rank s of S reads tokens
[i + s * T, i + (s + 1) * T], T = L / S, and the blocks these lie in, no others.

Streaming has a StreamingDataset, not used here: it deals out whole samples, in an order that
depends on the number of workers, and leaves shared memory behind when a worker is killed. Here the
order depends on seed and epoch alone, so a position in it, (epoch, sequences consumed), survives
any change of dp and sp.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.blocks import Blocks
from data_prep.tokenizer import folder_tokenizer
from trainer.checks import info_faults
from trainer.config import Config, DataConfig
from trainer.layout import Layout

IGNORED = -100  # a label that no loss counts; torch's own choice


@dataclass(frozen=True)
class MicroBatch:
    """One rank's shard of some sequences: tokens and labels [B, T] int64, reset [B, T] or None.

    A label is IGNORED where it does not count. `scored_tokens` of all shards of a sequence count;
    None: every token does.
    """

    tokens: Tensor
    labels: Tensor
    reset: Tensor | None
    scored_tokens: int | None = None


@dataclass(frozen=True)
class StepBatch:
    """What a rank reads for a step, and the first token of every sequence of it, on any rank."""

    micro_batches: list[MicroBatch]
    begins: list[int]


class TokenStream:
    """Random access to the tokens of one split."""

    def __init__(self, config: DataConfig, split: str) -> None:
        """Raises DataError, or ValueError, where the data are not there or not as written."""
        self.blocks = Blocks(config.path, split, config.cache)
        self.folder, self.info = self.blocks.folder, self.blocks.info
        self.split = self.info.splits[split]
        self.token_count = self.split.tokens

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] the bytes of text that each token stands for; 0 where it has none."""
        lengths = np.zeros(self.info.vocab_size, np.int64)
        known = folder_tokenizer(self.folder).token_bytes()
        lengths[: len(known)] = np.maximum(known, 0)[: len(lengths)]
        return lengths

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens [start, stop) and the document starts among them, as offsets from `start`.

        Raises DataError naming the file and the block that cannot be read.
        """
        size = self.info.block_size
        tokens = np.empty(stop - start, np.int64)
        starts = []
        for block in range(start // size, (stop - 1) // size + 1):
            found, begun = self.blocks.read(block)
            begin, end = max(start, block * size), min(stop, (block + 1) * size)
            tokens[begin - start : end - start] = found[begin - block * size : end - block * size]
            starts.append(begun + (block * size - start))
        offsets = np.concatenate(starts)
        return tokens, offsets[(offsets >= 0) & (offsets < stop - start)]


def open_split(config: Config, split: str) -> TokenStream:
    """A split of the data, checked here too: the submitting machine may not have seen it."""
    stream = TokenStream(config.data, split)
    if faults := [f"{key}: {message}" for key, message in info_faults(config, stream.info)]:
        raise ValueError("\n".join(faults))
    return stream


class SequenceReader:
    """One rank's shard of any sequence of a split; `sequences` of them lie end to end in it."""

    def __init__(
        self, stream: TokenStream, layout: Layout, with_reset: bool, shift: bool = False
    ) -> None:
        self.stream, self.layout, self.with_reset = stream, layout, with_reset
        seq_len = layout.seq_len
        # as many from wherever a shifted epoch begins
        self.sequences = max(0, stream.token_count - (seq_len if shift else 1)) // seq_len

    def micro_batch(self, begins: list[int], segment: int = 0) -> MicroBatch:
        """This rank's shard of a segment of the sequences that begin at the tokens `begins`.

        One row each. Labels are shifted before sharding, so the last token of a shard learns from
        the first of the next one.
        """
        held = self.layout.held(segment)
        length = len(held)
        rows = np.empty((len(begins), length + 1), np.int64)
        reset = np.zeros((len(begins), length), np.uint8) if self.with_reset else None
        for row, begin in enumerate(begins):
            first = begin + held.start
            rows[row], starts = self.stream.read(first, first + length + 1)
            if reset is not None:
                reset[row, starts[starts < length]] = 1
        ids = torch.from_numpy(rows)
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        task = self.stream.info.synthetic
        if task:
            labels = labels.masked_fill(labels < task.scored_from, IGNORED)
            if task.hidden_as is not None:
                tokens = tokens.masked_fill(tokens >= task.scored_from, task.hidden_as)
        return MicroBatch(
            tokens,
            labels,
            None if reset is None else torch.from_numpy(reset),
            task.scored_tokens if task else None,
        )


@dataclass(frozen=True)
class Position:
    """Where training stands in the data: sequences consumed since the run began."""

    consumed: int
    sequences: int  # in an epoch

    @property
    def epoch(self) -> int:
        return self.consumed // self.sequences

    @property
    def consumed_in_epoch(self) -> int:
        return self.consumed % self.sequences


class SequenceOrder:
    """Where the n-th sequence of the run begins: the sequences of an epoch end to end, permuted.

    Permutation and, with `shift`, the first sequence's token follow from seed and epoch alone.
    """

    def __init__(self, sequences: int, seq_len: int, seed: int, shift: bool = False) -> None:
        self.sequences, self.seq_len, self.seed, self.shift = sequences, seq_len, seed, shift
        self._epoch, self._begins = -1, np.empty(0, np.int64)

    def __getitem__(self, n: int) -> int:
        epoch, index = divmod(n, self.sequences)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._begins = epoch, generator.permutation(self.sequences) * self.seq_len
            if self.shift:
                self._begins += generator.integers(self.seq_len)
        return int(self._begins[index])


def training_batches(
    reader: SequenceReader, config: Config, dp_rank: int, consumed: int
) -> Iterator[StepBatch]:
    """What this rank reads for every step from `consumed` sequences on, read one step ahead."""
    order = SequenceOrder(
        reader.sequences, config.train.seq_len, config.run.seed, config.data.shift
    )
    size, micro = config.train.batch_size, config.train.micro_batch_size

    def read_step(first: int) -> StepBatch:
        begins = [order[n] for n in range(first, first + size)]
        parts = (part * config.dp + dp_rank for part in range(config.accumulation))
        mine = (begins[part * micro : (part + 1) * micro] for part in parts)
        return StepBatch([reader.micro_batch(each) for each in mine], begins)

    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        ahead = pool.submit(read_step, consumed)
        while True:
            consumed += size
            ready, ahead = ahead, pool.submit(read_step, consumed)
            yield ready.result()
