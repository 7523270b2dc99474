"""Pieces of sources: what one worker reads at a time, and how files are cut and decoded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of each of `paths`; for parquet, the row group `start`."""

    kind: str  # text, jsonl, parquet
    document: str  # a name that does not depend on where the source lies
    paths: tuple[str, ...]
    start: int
    end: int
    split: str | None = None  # set where the plan, not the document's name, decides
    starts: bool = True  # whether the document begins here

    @property
    def size_bytes(self) -> int:
        """How much input the piece stands for, for progress."""
        if self.kind == "parquet":
            return self.end
        if len(self.paths) > 1:
            return sum(Path(path).stat().st_size for path in self.paths)
        return self.end - self.start


@dataclass(frozen=True)
class Text:
    """Some text of a document, in order; `starts` on the document's first."""

    document: str
    starts: bool
    text: str


def cut_at_lines(whole: Piece, any_line: bool) -> list[Piece]:
    """A piece of one file, cut into pieces at line starts.

    With `any_line` at no other place, however long a line is: a line is a document.
    """
    pieces: list[Piece] = []
    start, end = whole.start, whole.end
    with open(whole.paths[0], "rb") as f:
        while start < end:
            cut = line_start(f, start + PIECE_BYTES, end, any_line)
            pieces.append(replace(whole, start=start, end=cut, starts=not pieces))
            start = cut
    return pieces


def line_start(f: IO[bytes], target: int, end: int, any_line: bool = True) -> int:
    """The first line start at or after `target`, at most `end`.

    Text without line ends (not `any_line`) is cut after a piece's length at a character instead.
    """
    if target >= end:
        return end
    f.seek(target - 1)
    position = target - 1
    while position < end and (chunk := f.read(1 << 20)):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return min(end, position + newline + 1)
        position += len(chunk)
        if not any_line and position - target >= PIECE_BYTES:
            f.seek(target)
            # where there is no character either, the reader of the piece says so
            skip = next((i for i, byte in enumerate(f.read(8)) if byte & 0xC0 != 0x80), 0)
            return min(end, target + skip)
    return end


def read_bytes(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(start)
        data = f.read(end - start)
    if len(data) != end - start:
        raise ValueError(f"{path} changed while it was read: run again when it is complete")
    return data


def decode(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line_number(path, offset + error.start)
        raise ValueError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}): "
            f"convert the file, or leave it out"
        ) from None


def line_number(path: str, offset: int) -> int:
    """The 1-based line of a byte offset; read only when there is an error to report."""
    line, left = 1, offset
    with open(path, "rb") as f:
        while left and (chunk := f.read(min(left, 1 << 20))):
            line += chunk.count(b"\n")
            left -= len(chunk)
    return line
