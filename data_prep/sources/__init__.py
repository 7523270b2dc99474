"""Where text comes from: files, folders and addresses of them, and Python's own standard library.

A source is planned into pieces, each small enough for one worker's memory, in an order that
depends on names alone. Reading a piece yields its texts, each with the document it belongs to.
A format is a module with `plan` and `read`, and a line here.
"""

import lzma
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol

from data_prep.sources import csv, json, jsonl, parquet, stdlib, text
from data_prep.sources.pieces import Faulty, File, Piece, Record, Text, joined
from data_prep.sources.storage import (
    PACKINGS,
    is_address,
    open_file,
    size_and_content,
    stamp,
    walk,
)

__all__ = ["Faulty", "File", "Piece", "Record", "Selection", "Text", "plan", "read", "stamp"]


class Format(Protocol):
    """How files of one kind are cut into pieces, and read."""

    def plan(self, file: File, field: str) -> list[Piece]:
        """The pieces of a file. Raises ValueError where it is not one."""

    def read(self, piece: Piece, field: str) -> Iterator[Record]:
        """The texts of a piece, and what is wrong with records that have none."""


FORMATS: dict[str, Format] = {
    "csv": csv,
    "json": json,
    "jsonl": jsonl,
    "parquet": parquet,
    "text": text,
}
SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tsv": "csv",
}  # any other is text, unless it begins like something else
SIGNS = {
    b"PAR1": "parquet",
    b"\x1f\x8b": "a packed file (gzip)",
    b"BZh": "a packed file (bzip2)",
    b"\xfd7zXZ": "a packed file (xz)",
    b"\x28\xb5\x2f\xfd": "a packed file (zstd)",
    b"PK\x03\x04": "a zip archive",
}  # how files begin


@dataclass(frozen=True)
class Selection:
    """Which files are read, and as what."""

    sources: tuple[str, ...]
    held_out_from: tuple[str, ...] = ()
    include: tuple[str, ...] = ()  # patterns of names; none: all
    exclude: tuple[str, ...] = ()
    kind: str = ""  # of all files, whatever their names
    field: str = "text"


def plan(selection: Selection, out: Path | None, notes: list[str]) -> list[Piece]:
    """The pieces of all sources, in order; what was left out, and why, goes into `notes`.

    What lies in `out` is never a source. Raises ValueError for a source that cannot be read.
    """
    everything = replace(selection, include=(), exclude=())
    held_out = [
        _pieces(source, everything, out, "held_out", notes) for source in selection.held_out_from
    ]
    kept = {
        known
        for found in held_out
        for piece in found
        for file in piece.files
        for known in (file.content, file.path)
    }
    split = "train" if held_out else None
    pieces: list[Piece] = []
    for source in selection.sources:
        for piece in _pieces(source, selection, out, split, notes):
            files = tuple(file for file in piece.files if not {file.content, file.path} & kept)
            if len(files) == len(piece.files):
                pieces.append(piece)
                continue
            left_out = ", ".join(file.path for file in piece.files if file not in files)
            note = f"{left_out}: held out, so it is not trained on"
            if note not in notes:  # of each piece of a large one
                notes.append(note)
            if files:
                pieces.append(replace(piece, files=files, end=sum(file.size for file in files)))
    return joined(pieces) + joined([piece for found in held_out for piece in found])


def _pieces(
    source: str, selection: Selection, out: Path | None, split: str | None, notes: list[str]
) -> list[Piece]:
    """Of one source, each file of the split that was decided for it."""
    if source == "stdlib":
        return [
            replace(piece, files=tuple(replace(file, split=split) for file in piece.files))
            for piece in stdlib.plan()
        ]
    pieces: list[Piece] = []
    for file in _files(source, selection, out, notes):
        with _named(file.path):
            pieces += FORMATS[file.kind].plan(replace(file, split=split), selection.field)
    return pieces


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever a reader or an unpacker says of a file's bytes, with the file's name."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from None


def read(piece: Piece, field: str) -> Iterator[Record]:
    """The texts of a piece, and what is wrong with its records that have none."""
    with _named(piece.files[0].path):
        yield from FORMATS[piece.kind].read(piece, field)


def _files(source: str, selection: Selection, out: Path | None, notes: list[str]) -> list[File]:
    own = [] if out is None else [p.resolve() for p in (out, out.with_name(out.name + ".partial"))]
    chosen: list[tuple[str, str]] = []
    left_out = 0
    for name, path in walk(source, notes):
        absolute = None if is_address(path) else Path(path).resolve()
        if absolute and any(absolute.is_relative_to(folder) for folder in own):
            continue
        if _wanted(name, selection):
            chosen.append((name, path))
        else:
            left_out += 1
    if left_out:
        notes.append(f"{source}: {left_out} files are left out by --include and --exclude")
    if not chosen:
        which = " that --include and --exclude leave" if left_out else ""
        raise ValueError(f"source folder {source} holds no files{which}")
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda item: _file(item[0], item[1], selection.kind), chosen))


def _wanted(name: str, selection: Selection) -> bool:
    def any_of(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(name, p) or fnmatch(PurePosixPath(name).name, p) for p in patterns)

    return (not selection.include or any_of(selection.include)) and not any_of(selection.exclude)


def _file(name: str, path: str, kind: str) -> File:
    bare = PurePosixPath(name.lower())
    packing = PACKINGS.get(bare.suffix, "")
    inner = bare.with_suffix("").suffix if packing else bare.suffix
    if not name.isprintable():
        raise ValueError(f"{path!r}: a name that cannot be printed: rename it, or --exclude it")
    if not is_address(path) and not os.path.isfile(path):
        why = "a broken link" if os.path.islink(path) else "no regular file"
        raise ValueError(f"{path} is {why}: remove it, or leave it out by --exclude")
    with _named(path):
        written = stamp(path)  # before what it holds is looked at
        size, content = size_and_content(path)
        kind = kind or SUFFIXES.get(inner, "")
        file = File(name, path, size, content, kind, packing, stamp=written)
        return file if file.kind else _as_text(file)


def _as_text(file: File) -> File:
    """A file whose name says nothing, as text; ValueError where it begins as no text does."""
    with open_file(file.path, file.packing) as f:
        begin = f.read(4096)
    looks = next((what for sign, what in SIGNS.items() if begin.startswith(sign)), "")
    if not looks and b"\0" in begin and begin[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        looks = "no text (it holds zeros)"
    if not looks:
        first = begin.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].strip()
        if first[:1] in (b"{", b"[") and _is_json(first):
            looks = "JSON"
    if looks:
        raise ValueError(
            f"{file.path} has no suffix of a kind that is known, and looks like {looks}: say what "
            f"it is with --format ({', '.join(FORMATS)}), rename it, or leave it out by --exclude"
        )
    return replace(file, kind="text")


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(jsonl.parse(line.decode()), dict | list)
    except ValueError:
        return False
