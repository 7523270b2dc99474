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
    line_number,
    no_utf8,
)


def plan(file: File, field: str) -> list[Piece]:
    """The file's pieces, whole lines each."""
    return cut_at_lines(file, any_line=True)


def read(piece: Piece, field: str) -> Iterator[Record]:
    here: File | None = None
    first = passed = 0  # the file's line where its first chunk begins, once it is asked for
    for file, offset, data, _ in chunks(piece, any_line=True):
        if file is not here:
            here, begin, first, passed = file, offset, 0, 0
        marked = offset == 0 and data.startswith(MARK)
        at = offset + len(MARK) * marked
        for number, raw in enumerate(data[len(MARK) * marked :].split(b"\n")):
            if raw.strip():
                try:
                    text = _text(raw, at, field)
                except ValueError as error:
                    first = first or line_number(file, begin)
                    yield Faulty(f"{file.path}:{first + passed + number}: {error}")
                else:
                    yield Text(f"{file.name}:{at}", text, marked=marked)
                marked = False
            at += len(raw) + 1
        passed += number  # lines that end in this chunk


def _text(raw: bytes, at: int, field: str) -> str:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(no_utf8(raw, at, error)) from None
    try:
        record = parse(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return text_in(record, field)


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
