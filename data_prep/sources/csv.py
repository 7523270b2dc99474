"""Comma- or tab-separated values: a row is a document, its text in one column of the header."""

import csv as csv_library
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from data_prep.sources.pieces import MARK, UNTOLD, Faulty, File, Piece, Record, Text, whole
from data_prep.sources.storage import open_file

csv_library.field_size_limit(sys.maxsize)


def plan(file: File, field: str) -> list[Piece]:
    """One piece: a line may end within quotes."""
    return [whole(file)]


def read(piece: Piece, field: str) -> Iterator[Record]:
    for file in piece.files:
        name = PurePosixPath(file.name.lower())
        tabs = (name.with_suffix("") if file.packing else name).suffix == ".tsv"
        with open_file(file.path, file.packing) as raw:
            marked = raw.read(len(MARK)) == MARK
        with open_file(file.path, file.packing) as raw:
            # what is not UTF-8 becomes what no UTF-8 can be, and is told with its row
            lines = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
            reader = csv_library.reader(lines, delimiter="\t" if tabs else ",", strict=True)
            for record in _rows(file, reader, field):
                if marked and isinstance(record, Text):
                    record, marked = replace(record, marked=True), False
                yield record


def _rows(file: File, reader: Any, field: str) -> Iterator[Record]:
    try:
        header: list[str] = next(reader, [])
    except csv_library.Error as error:
        raise ValueError(f"{file.path}:1: the header is not CSV ({error}){UNTOLD}") from None
    if field not in header:
        has = ", ".join(header) or "nothing"
        raise ValueError(
            f"{file.path}:1: no column {field!r} (it has: {has}): "
            f"name the text's column with --field"
        )
    if header.count(field) > 1:
        raise ValueError(f"{file.path}:1: {header.count(field)} columns {field!r}: rename one")
    column, number = header.index(field), 0
    while True:
        number += 1
        try:
            row = next(reader, None)
        except csv_library.Error as error:
            where = f"{file.path}:{reader.line_num}: row {number}"
            raise ValueError(f"{where} is not CSV ({error}){UNTOLD}") from None
        if row is None:
            return
        if not row:  # an empty line
            continue
        where = f"{file.path}:{reader.line_num}: row {number}"
        if len(row) != len(header):
            yield Faulty(f"{where} has {len(row)} values, the header {len(header)}")
        elif any("\ud800" <= character <= "\udfff" for character in row[column]):
            yield Faulty(f"{where}: column {field!r} is not UTF-8")
        else:
            yield Text(f"{file.name}:{number}", row[column])
