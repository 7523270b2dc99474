"""The door to Streaming: sequences of any length from blocks, a rank reading its own shard only.

A split is one stream of tokens in fixed blocks (data_prep.schema). A sequence of length L that
begins at token i is tokens [i, i + L], one more than L for the last label; rank s of S reads tokens
[i + s * T, i + (s + 1) * T], T = L / S, and the blocks these lie in, no others.

Streaming's readers give random access to blocks and its Stream fetches the files of a URL, but
its StreamingDataset is not used: that one deals out whole samples, in an order that depends on the
number of workers, and leaves shared memory behind when a worker is killed. Here the order depends
on seed and epoch alone, so a position in it, (epoch, sequences consumed), survives any change of
dp and sp.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from streaming.base.spanner import Spanner
from streaming.base.storage.download import CloudDownloader
from streaming.base.stream import Stream
from streaming.base.world import World
from torch import Tensor

from data_prep.schema import (
    INFO_NAME,
    TOKENIZER_NAME,
    DatasetInfo,
    block_checksum,
    file_faults,
    load_info,
)
from trainer.checks import info_faults
from trainer.config import Config, DataConfig
from trainer.layout import Layout

IGNORED = -100  # a label that no loss counts; torch's own choice


class DataError(ValueError):
    """An MDS shard file is missing, damaged or not what its index says; the message names it."""


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
    """Random access to the tokens of one split. `bytes_read` counts what was read of its blocks."""

    def __init__(self, config: DataConfig, split: str) -> None:
        # file:// is a folder to fetch from too: storage that is slower than the machine's own disk
        remote = config.path.removeprefix("file://") if "://" in config.path else None
        if "AWS_ENDPOINT_URL" in os.environ:  # botocore's name; Streaming has its own
            os.environ.setdefault("S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        self.folder = Path(config.cache or "") if remote else Path(config.path)
        self.info = _fetch_info(remote, self.folder) if remote else load_info(self.folder)
        self.split = self.info.splits[split]
        self.token_count = self.split.tokens
        self.bytes_read = 0
        if not remote and (faults := file_faults(self.folder, split)):
            raise DataError("\n".join(faults))
        self._stream = Stream(
            remote=remote,
            local=str(self.folder),
            split=split,
            download_retry=2,
            download_timeout=300,
            validate_hash="sha256",
            keep_zip=False,
        )
        # Each worker acts as the only one, under a lock of the machine: placement breaks nothing.
        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        with FileLock(self.folder / "lock") if remote else nullcontext():
            self._shards: Any = self._stream.get_shards(alone, allow_unsafe_types=False)
        self._present = [remote is None] * len(self._shards)
        self._spanner = Spanner(np.array([shard.samples for shard in self._shards]))

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens [start, stop) and the document starts among them, as offsets from `start`.

        Raises DataError naming the file and the block that cannot be read.
        """
        size = self.info.block_size
        tokens = np.empty(stop - start, np.int64)
        starts = []
        for block in range(start // size, (stop - 1) // size + 1):
            sample = self._block(block)
            begin, end = max(start, block * size), min(stop, (block + 1) * size)
            part = sample["tokens"][begin - block * size : end - block * size]
            tokens[begin - start : end - start] = part
            starts.append(
                np.frombuffer(sample["starts"], "<u4").astype(np.int64) + (block * size - start)
            )
        offsets = np.concatenate(starts)
        return tokens, offsets[(offsets >= 0) & (offsets < stop - start)]

    def _block(self, index: int) -> dict[str, Any]:
        shard_index, sample_index = self._spanner[index]
        shard = self._shards[shard_index]
        name = Path(self.folder, self._stream.split, shard.raw_data.basename)
        try:
            if not self._present[shard_index]:
                # one worker of a machine fetches, the others find the file there
                with FileLock(f"{name}.lock"):
                    self._stream.prepare_shard(shard)
                self._present[shard_index] = True
            data = shard.get_sample_data(sample_index)
            sample = shard.decode_sample(data)
            intact = block_checksum(sample["tokens"].tobytes(), sample["starts"]) == sample["crc32"]
        except Exception as error:  # Streaming raises whatever its bytes lead to
            raise DataError(
                f"MDS shard file {name}, block {sample_index}: cannot be read ({error}): "
                f"run `python -m data_prep verify {self.folder}`, prepare the data again"
            ) from error
        if not intact:
            raise DataError(
                f"MDS shard file {name}, block {sample_index}: its checksum is wrong, the file is "
                f"damaged: run `python -m data_prep verify {self.folder}`, prepare the data again"
            )
        self.bytes_read += len(data)
        return sample


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


def _fetch_info(remote: str, cache: Path) -> DatasetInfo:
    """Bring dataset.json (and a tokenizer) of a URL to the cache, once per machine."""
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not (cache / INFO_NAME).exists():
            downloader = CloudDownloader.get(remote)

            def fetch(name: str) -> Path:
                partial = cache / f"{name}.partial"
                try:
                    downloader.download(f"{remote}/{name}", str(partial), 300)
                except Exception as error:  # each cloud's client has errors of its own
                    raise DataError(f"{remote}/{name} cannot be fetched: {error}") from error
                return partial

            info = fetch(INFO_NAME)
            if json.loads(info.read_text())["tokenizer"] != "bytes":
                fetch(TOKENIZER_NAME).replace(cache / TOKENIZER_NAME)
            info.replace(cache / INFO_NAME)  # last: it says that the rest is there
    return load_info(cache)
