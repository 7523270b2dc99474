"""Plain text: a file is a document."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.pieces import Piece, Text, cut_at_lines, decode, line_start, read_bytes


def plan(name: str, path: Path, field: str) -> list[Piece]:
    """The file's pieces."""
    return cut_at_lines(Piece("text", name, (str(path),), 0, path.stat().st_size), any_line=False)


def plan_split(name: str, path: Path, held_out: float) -> list[Piece]:
    """The same of a file that is split at its end, the last `held_out` of its bytes kept apart."""
    size = path.stat().st_size
    with path.open("rb") as f:
        cut = line_start(f, round(size * (1 - held_out)), size)
    train = Piece("text", name, (str(path),), 0, cut, "train")
    end = Piece("text", name + "#end", (str(path),), cut, size, "held_out")
    return [*cut_at_lines(train, any_line=False), *cut_at_lines(end, any_line=False)]


def read(piece: Piece, field: str) -> Iterator[Text]:
    """The piece's bytes; of several files each whole, one after another."""
    for i, path in enumerate(piece.paths):
        end = piece.end if len(piece.paths) == 1 else Path(path).stat().st_size
        data = read_bytes(path, piece.start, end)
        yield Text(piece.document, piece.starts and i == 0, decode(data, path, piece.start))
