"""A piece's tokens on their way to the blocks: written by one worker, read when all are there.

A part is two files: the tokens, as they lie in memory, and a table of its stretches of documents.
It exists when the table does, which is written last.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import written_whole


@dataclass
class Table:
    """Stretches [n] of documents that follow each other, in one part or in all."""

    lengths: NDArray[np.int64]  # tokens
    text_bytes: NDArray[np.int64]
    begins: NDArray[np.bool_]  # whether a document begins here, or one goes on
    keys: NDArray[np.uint64]  # of the document's name: which are held out follows from it
    decided: NDArray[np.int8]  # 0 train, 1 held out, -1 open

    @classmethod
    def of(cls, rows: list[tuple[int, int, bool, int, int]]) -> "Table":
        lengths, text_bytes, begins, keys, decided = zip(*rows, strict=True) if rows else ((),) * 5
        return cls(
            np.array(lengths, np.int64),
            np.array(text_bytes, np.int64),
            np.array(begins, np.bool_),
            np.array(keys, np.uint64),
            np.array(decided, np.int8),
        )

    @classmethod
    def joined(cls, tables: list["Table"]) -> "Table":
        names = ("lengths", "text_bytes", "begins", "keys", "decided")
        parts = [[getattr(table, name) for table in tables] for name in names]
        return cls(*(np.concatenate(arrays) for arrays in parts))


@dataclass
class Told:
    """What a person is to know of a piece."""

    faulty: list[str]  # records, by place and reason
    changed: list[str]  # the first text that its tokens do not decode to: the place, and how
    changes: int = 0  # such texts
    lost: int = 0  # records that are faulty
    marks: int = 0  # byte-order marks left out


def document_key(name: str) -> int:
    """A number that follows from a document's name alone, and is spread evenly."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


class PartWriter:
    """Writes tokens as they come, so that memory does not grow with the piece."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = path.with_suffix(".tokens").open("wb")
        self._rows: list[tuple[int, int, bool, int, int]] = []

    def add(self, tokens: NDArray[Any], row: tuple[int, bool, int, int]) -> None:
        """Tokens of a document, and (text bytes, whether it begins, key, decided) of them."""
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._rows.append((len(tokens), *row))

    def close(self, told: Told) -> None:
        """From here on the part exists."""
        self._file.flush()
        os.fsync(self._file.fileno())  # the table is on disk before it has its name
        self._file.close()
        write_table(self._path, Table.of(self._rows), told)


def write_table(path: Path, table: Table, told: Told) -> None:
    with written_whole(path) as f:
        np.savez(f, told=np.array(json.dumps(told.__dict__)), **table.__dict__)


def read_table(path: Path) -> tuple[Table, Told]:
    with np.load(path, allow_pickle=False) as arrays:
        told = Told(**json.loads(str(arrays["told"])))
        return Table(**{name: arrays[name] for name in arrays.files if name != "told"}), told


def read_tokens(path: Path, dtype: str, shape: tuple[int, ...] = ()) -> NDArray[Any]:
    """All of a part's tokens, [tokens, *shape], from the disk as they are needed."""
    tokens = path.with_suffix(".tokens")
    if not tokens.stat().st_size:
        return np.empty((0, *shape), dtype)
    return np.memmap(tokens, dtype, "r").reshape(-1, *shape)
