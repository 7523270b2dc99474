"""Parts of tokens to MDS shard files: a split is one stream, cut into blocks."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import file_sha256
from data_prep.parts import Table, read_table, read_tokens
from data_prep.schema import DatasetInfo, SplitInfo
from data_prep.split import choose, document_numbers, held_tokens
from data_prep.tokenizer import Tokenizer

WINDOW_TOKENS = 4 << 20  # that are sorted out at a time


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a split, where documents start among them, and the text behind them."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    text_bytes: int


class Streams:
    """The tokens of all parts, one part after another, by split."""

    def __init__(
        self, parts: list[Path], info: DatasetInfo, held_out: float, tokenizer: Tokenizer
    ) -> None:
        self._parts, self._info, self._tokenizer = parts, info, tokenizer
        tables = [read_table(part)[0] for part in parts]
        self._sizes = [len(table.lengths) for table in tables]
        self._table = Table.joined([*tables, Table.of([])])
        self._numbers = document_numbers(self._table)
        self._split = choose(self._table, held_out)
        self._held = held_tokens(self._table, self._split)

    def large_held_out(self, share: float = 0.1) -> Iterator[tuple[int, int, int, bool]]:
        """(part, key, tokens held out, whether it is cut) of documents that are a large share."""
        held = np.bincount(self._numbers, self._held, 0).astype(np.int64)
        parts = np.repeat(np.arange(len(self._sizes)), self._sizes)
        for number in np.flatnonzero((held > 0) & (held >= share * held.sum())).tolist():
            stretch = int(np.searchsorted(self._numbers, number))
            key = int(self._table.keys[stretch])
            yield int(parts[stretch]), key, int(held[number]), number == self._split.cut

    def of(self, split: str) -> Iterator[Chunk]:
        """A split, some million tokens at a time."""
        stretch, begun = 0, -1  # the last document that has begun in this split
        for part, size in zip(self._parts, self._sizes, strict=True):
            tokens = read_tokens(part, self._info.dtype, self._info.token_shape)
            ends = np.cumsum(self._table.lengths[stretch : stretch + size])
            if len(tokens) != ends[-1:].sum():
                raise ValueError(
                    f"{part.with_suffix('.tokens')} has {len(tokens):,} tokens instead of "
                    f"{int(ends[-1]):,}: remove {part.parents[1]}, and run again"
                )
            first = 0
            while first < size:
                start = int(ends[first - 1]) if first else 0
                last = int(np.searchsorted(ends, start + WINDOW_TOKENS, side="right"))
                last = max(last, first + 1)
                here = slice(stretch + first, stretch + last)
                chunk = self._chunk(tokens[start : int(ends[last - 1])], here, split, begun)
                if chunk:
                    yield chunk
                    begun = int(self._numbers[here][self._mine(here, split) > 0][-1])
                first = last
            stretch += size

    def _mine(self, here: slice, split: str) -> NDArray[np.int64]:
        """[stretches] how many tokens of each are of the split."""
        held = self._held[here]
        return held if split == "held_out" else self._table.lengths[here] - held

    def _chunk(self, tokens: NDArray[Any], here: slice, split: str, begun: int) -> Chunk | None:
        """What of the tokens of some stretches is of the split."""
        lengths, mine = self._table.lengths[here], self._mine(here, split)
        total = int(mine.sum())
        if not total:
            return None
        text_bytes = self._table.text_bytes[here].copy()
        text_bytes[mine == 0] = 0
        if total < len(tokens):  # what is held out of a stretch lies last in it
            skipped = lengths - mine if split == "held_out" else np.zeros_like(lengths)
            where = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            keep = where >= np.repeat(skipped, lengths)
            keep &= where < np.repeat(skipped + mine, lengths)
            for cut in np.flatnonzero((mine > 0) & (mine < lengths)):
                end = int(lengths[: cut + 1].sum())
                held = self._tokenizer.decode(tokens[end - self._held[here][cut] : end].tolist())
                bytes_held = len(held.encode())
                text_bytes[cut] = (
                    bytes_held if split == "held_out" else text_bytes[cut] - bytes_held
                )
            tokens = tokens[keep]
        taken = np.flatnonzero(mine)
        new = np.diff(self._numbers[here][taken], prepend=begun) != 0
        starts = (np.cumsum(mine) - mine)[taken][new]
        return Chunk(np.asarray(tokens), starts, int(text_bytes.sum()))


def pack(
    stream: Iterator[Chunk], info: DatasetInfo, split: str, folder: Path, shard_bytes: int
) -> SplitInfo:
    """Write one split's MDS shard files, in order, in place of half-written ones."""
    from data_prep.mds import MDSWriter  # imports torch: only the packing process should

    shutil.rmtree(folder, ignore_errors=True)
    counts = SplitInfo()
    with MDSWriter(
        columns=info.columns(), out=str(folder), hashes=["sha256"], size_limit=shard_bytes
    ) as writer:
        for block, starts in _blocks(stream, info, counts):
            checksum = info.checksum(split, counts.blocks, block.tobytes(), starts)
            writer.write({"tokens": block, "starts": starts, "crc32": checksum})
            counts.blocks += 1
    counts.index_sha256 = file_sha256(folder / "index.json")
    return counts


def _blocks(
    stream: Iterator[Chunk], info: DatasetInfo, counts: SplitInfo
) -> Iterator[tuple[NDArray[Any], bytes]]:
    """The blocks, and the document starts in each; fills `counts` on the way."""
    size = info.block_size
    rest = np.empty((0, *info.token_shape), info.dtype)
    rest_starts = np.empty(0, np.int64)
    for chunk in stream:
        counts.documents += len(chunk.starts)
        counts.tokens += len(chunk.tokens)
        counts.text_bytes += chunk.text_bytes
        tokens = np.concatenate([rest, chunk.tokens])
        starts = np.concatenate([rest_starts, chunk.starts + len(rest)])
        whole = len(tokens) // size * size
        for begin in range(0, whole, size):
            first, last = np.searchsorted(starts, [begin, begin + size])
            inside = starts[first:last] - begin
            yield tokens[begin : begin + size], inside.astype("<u4").tobytes()
        rest, rest_starts = tokens[whole:], starts[starts >= whole] - whole
    if len(rest):
        padded = np.zeros((size, *info.token_shape), info.dtype)
        padded[: len(rest)] = rest
        yield padded, rest_starts.astype("<u4").tobytes()
