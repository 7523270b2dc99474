"""JSON lines: a line is a document, its text in one field."""

import json
from collections.abc import Iterator
from typing import Any

from data_prep.sources.fields import record_of, text_in
from data_prep.sources.pieces import (
    MARK,
    Faulty,
    File,
    Piece,
    Record,
    Text,
    chunks,
    cut_at_lines,
    decode,
    line_number,
)


def plan(file: File, field: str) -> list[Piece]:
    """The file's pieces, whole lines each."""
    return cut_at_lines(file, any_line=True)


def read(piece: Piece, field: str) -> Iterator[Record]:
    for file, offset, data, _ in chunks(piece, any_line=True):
        marked = offset == 0 and data.startswith(MARK)
        at = offset + len(MARK) * marked
        for raw in data[len(MARK) * marked :].split(b"\n"):
            if raw.strip():
                try:
                    text = _text(raw, file, at, field)
                except ValueError as error:
                    yield Faulty(str(error))
                else:
                    yield Text(f"{file.name}:{at}", text, marked=marked)
                marked = False
            at += len(raw) + 1


def _text(raw: bytes, file: File, at: int, field: str) -> str:
    line = decode(raw, file, at)
    try:
        record = parse(line)
    except ValueError as error:
        raise ValueError(f"{file.path}:{line_number(file, at)}: not JSON ({error})") from None
    return (
        text_in(record, field, f"{file.path}:{line_number(file, at)}")
        if not _simple(record, field)
        else record[field]
    )


def _simple(record: Any, field: str) -> bool:
    """The usual case, for which no line is counted."""
    value = record.get(field) if type(record) is dict else None
    return isinstance(value, str) and value.isascii()


def parse(text: str) -> Any:
    """A JSON value. Raises ValueError with the reason, whatever the text."""
    try:
        return json.loads(text, object_pairs_hook=record_of)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(str(error).split(";")[0]) from None
