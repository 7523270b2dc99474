"""Where text comes from: files, folders, .jsonl, .parquet, and Python's own standard library.

A source is planned into pieces, each small enough for one worker's memory, in an order that
depends on names alone. Reading a piece yields its texts, each with the document it belongs to.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PIECE_BYTES = 8 << 20
EXCLUDED_FROM_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


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


def plan(sources: list[str], field: str, held_out: float) -> list[Piece]:
    """The pieces of all sources. Raises ValueError for a source that cannot be read.

    A source of a single text document is split at its end, the last `held_out` of its bytes for
    evaluation, because there is no other document to hold out.
    """
    files: list[tuple[str, Path]] = []
    pieces: list[Piece] = []
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            pieces += _plan_stdlib()
        elif path.is_dir():
            found = sorted(
                p
                for p in path.rglob("*")
                if p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(path).parts)
            )
            if not found:
                raise ValueError(f"source folder {source} holds no files")
            files += [(p.relative_to(path).as_posix(), p) for p in found]
        elif path.is_file():
            files.append((path.name, path))
        else:
            raise ValueError(f"source {source!r} is neither a file, a folder nor `stdlib`")
    for name, path in files:
        if path.suffix == ".parquet":
            pieces += _plan_parquet(name, path, field)
        elif path.suffix in (".jsonl", ".ndjson"):
            pieces += _plan_lines("jsonl", name, path, 0, path.stat().st_size)
        elif len(files) == 1 and not pieces and held_out > 0:
            size = path.stat().st_size
            with path.open("rb") as f:
                cut = _line_start(f, round(size * (1 - held_out)), size)
            pieces += _plan_lines("text", name, path, 0, cut, "train")
            pieces += _plan_lines("text", name + "#end", path, cut, size, "held_out")
        else:
            pieces += _plan_lines("text", name, path, 0, path.stat().st_size)
    return pieces


def read(piece: Piece, field: str) -> Iterator[Text]:
    """The texts of a piece. Raises ValueError naming file and line for what is not text."""
    if piece.kind == "parquet":
        yield from _read_parquet(piece, field)
    elif piece.kind == "jsonl":
        yield from _read_jsonl(piece, field)
    else:
        for i, path in enumerate(piece.paths):
            end = piece.end if len(piece.paths) == 1 else Path(path).stat().st_size
            data = _read_bytes(path, piece.start, end)
            yield Text(piece.document, piece.starts and i == 0, _decode(data, path, piece.start))


def _plan_stdlib() -> list[Piece]:
    """One document per package or top-level module of the running Python, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for entry in sorted(root.iterdir()):
        if entry.name in EXCLUDED_FROM_STDLIB or entry.name.startswith(("_sysconfigdata", ".")):
            continue
        modules = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py"))
        paths = [
            str(p)
            for p in modules
            if not EXCLUDED_FROM_STDLIB.intersection(p.relative_to(root).parts)
            and p.stat().st_size
            and _is_utf8(p)
        ]
        if paths:
            end = Path(paths[0]).stat().st_size
            pieces.append(Piece("text", f"stdlib/{entry.name}", tuple(paths), 0, end))
    return pieces


def _is_utf8(path: Path) -> bool:
    """A few modules of the standard library are, on purpose, in other encodings."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _plan_lines(
    kind: str, name: str, path: Path, start: int, end: int, split: str | None = None
) -> list[Piece]:
    """Cut bytes [start, end) of a file into pieces at line starts."""
    pieces: list[Piece] = []
    with path.open("rb") as f:
        while start < end:
            cut = _line_start(f, start + PIECE_BYTES, end, any_line=kind == "jsonl")
            pieces.append(Piece(kind, name, (str(path),), start, cut, split, starts=not pieces))
            start = cut
    return pieces


def _line_start(f: IO[bytes], target: int, end: int, any_line: bool = True) -> int:
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


def _read_bytes(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(start)
        data = f.read(end - start)
    if len(data) != end - start:
        raise ValueError(f"{path} changed while it was read: run again when it is complete")
    return data


def _decode(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _line_number(path, offset + error.start)
        raise ValueError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}): "
            f"convert the file, or leave it out"
        ) from None


def _line_number(path: str, offset: int) -> int:
    """The 1-based line of a byte offset; read only when there is an error to report."""
    line, left = 1, offset
    with open(path, "rb") as f:
        while left and (chunk := f.read(min(left, 1 << 20))):
            line += chunk.count(b"\n")
            left -= len(chunk)
    return line


def _read_jsonl(piece: Piece, field: str) -> Iterator[Text]:
    path, offset = piece.paths[0], piece.start
    for raw in _read_bytes(path, piece.start, piece.end).split(b"\n"):
        at, offset = offset, offset + len(raw) + 1
        if not raw.strip():
            continue
        line = _decode(raw, path, at)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{_line_number(path, at)}: not JSON ({error.msg})") from None
        if not isinstance(value, dict) or field not in value:
            has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{path}:{_line_number(path, at)}: no field {field!r} (it has: {has}): "
                f"name the text's field with --field"
            )
        if not isinstance(value[field], str):
            raise ValueError(
                f"{path}:{_line_number(path, at)}: field {field!r} is not a text "
                f"but {type(value[field]).__name__}"
            )
        try:
            value[field].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}:{_line_number(path, at)}: field {field!r} is not Unicode text "
                f"({error.reason})"
            ) from None
        yield Text(f"{piece.document}:{at}", True, value[field])


def _plan_parquet(name: str, path: Path, field: str) -> list[Piece]:
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own hierarchy
        raise ValueError(f"{path} is not a parquet file ({error})") from None
    if field not in metadata.schema_arrow.names:
        raise ValueError(
            f"{path}: no column {field!r} (it has: {', '.join(metadata.schema_arrow.names)}): "
            f"name the text's column with --field"
        )
    return [
        Piece(
            "parquet", name, (str(path),), group, metadata.metadata.row_group(group).total_byte_size
        )
        for group in range(metadata.num_row_groups)
    ]


def _read_parquet(piece: Piece, field: str) -> Iterator[Text]:
    import pyarrow.parquet as pq

    path, row = piece.paths[0], 0
    batches = pq.ParquetFile(path).iter_batches(
        batch_size=1024, row_groups=[piece.start], columns=[field]
    )
    for batch in batches:
        for value in batch.column(0).to_pylist():
            if not isinstance(value, str):
                raise ValueError(
                    f"{path}: row group {piece.start}, row {row}: column {field!r} is "
                    f"{'null' if value is None else 'not a text'}"
                )
            yield Text(f"{piece.document}:{piece.start}:{row}", True, value)
            row += 1
