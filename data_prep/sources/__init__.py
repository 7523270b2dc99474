"""Where text comes from: files, folders, .jsonl, .parquet, and Python's own standard library.

A source is planned into pieces, each small enough for one worker's memory, in an order that
depends on names alone. Reading a piece yields its texts, each with the document it belongs to.
A format is a module with `plan` and `read`, and a line here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data_prep.sources import jsonl, parquet, stdlib, text
from data_prep.sources.pieces import Piece, Text

__all__ = ["Piece", "Text", "plan", "read"]


class Format(Protocol):
    """How files of one kind are cut into pieces, and read."""

    def plan(self, name: str, path: Path, field: str) -> list[Piece]:
        """The pieces of a file that goes by `name`. Raises ValueError where it is not one."""

    def read(self, piece: Piece, field: str) -> Iterator[Text]:
        """The texts of a piece. Raises ValueError naming file and line for what is not text."""


FORMATS: dict[str, Format] = {"jsonl": jsonl, "parquet": parquet, "text": text}  # a piece's kinds
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}  # all others are text


def plan(sources: list[str], field: str, held_out: float) -> list[Piece]:
    """The pieces of all sources. Raises ValueError for a source that cannot be read.

    A source of a single text document is split at its end, the last `held_out` of its bytes for
    evaluation, because there is no other document to hold out.
    """
    files: list[tuple[str, Path]] = []
    pieces: list[Piece] = []
    for source in sources:
        if source == "stdlib":
            pieces += stdlib.plan()
        else:
            files += _files(source)
    for name, path in files:
        kind = SUFFIXES.get(path.suffix, "text")
        if kind == "text" and len(files) == 1 and not pieces and held_out > 0:
            pieces += text.plan_split(name, path, held_out)
        else:
            pieces += FORMATS[kind].plan(name, path, field)
    return pieces


def read(piece: Piece, field: str) -> Iterator[Text]:
    """The texts of a piece. Raises ValueError naming file and line for what is not text."""
    yield from FORMATS[piece.kind].read(piece, field)


def _files(source: str) -> list[tuple[str, Path]]:
    """Every file of a source, by a name that does not depend on where the source lies."""
    path = Path(source)
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise ValueError(f"source {source!r} is neither a file, a folder nor `stdlib`")
    files = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"source folder {source} holds no files")
    return [(p.relative_to(path).as_posix(), p) for p in files]
