"""JSON lines: a line is a document, its text in one field."""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.pieces import Piece, Text, cut_at_lines, decode, line_number, read_bytes


def plan(name: str, path: Path, field: str) -> list[Piece]:
    """The file's pieces, whole lines each."""
    return cut_at_lines(Piece("jsonl", name, (str(path),), 0, path.stat().st_size), any_line=True)


def read(piece: Piece, field: str) -> Iterator[Text]:
    path, offset = piece.paths[0], piece.start
    for raw in read_bytes(path, piece.start, piece.end).split(b"\n"):
        at, offset = offset, offset + len(raw) + 1
        if not raw.strip():
            continue
        line = decode(raw, path, at)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line_number(path, at)}: not JSON ({error.msg})") from None
        if not isinstance(value, dict) or field not in value:
            has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{path}:{line_number(path, at)}: no field {field!r} (it has: {has}): "
                f"name the text's field with --field"
            )
        if not isinstance(value[field], str):
            raise ValueError(
                f"{path}:{line_number(path, at)}: field {field!r} is not a text "
                f"but {type(value[field]).__name__}"
            )
        try:
            value[field].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}:{line_number(path, at)}: field {field!r} is not Unicode text "
                f"({error.reason})"
            ) from None
        yield Text(f"{piece.document}:{at}", True, value[field])
