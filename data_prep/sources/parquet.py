"""Parquet: a row is a document, its text in one column; a piece is a row group."""

import io
from collections.abc import Iterator
from typing import Any

from data_prep.sources.fields import text_in
from data_prep.sources.pieces import Faulty, File, Piece, Record, Text
from data_prep.sources.storage import open_file


def _open(file: File) -> Any:
    import pyarrow.parquet as pq

    try:
        opened = open_file(file.path, file.packing)
        return pq.ParquetFile(io.BytesIO(opened.read()) if file.packing else opened)
    except Exception as error:  # pyarrow raises its own hierarchy
        raise ValueError(f"{file.path} is not a parquet file ({error})") from None


def plan(file: File, field: str) -> list[Piece]:
    opened = _open(file)
    columns = opened.schema_arrow.names
    if field not in columns and field.split(".")[0] not in columns:
        raise ValueError(
            f"{file.path}: no column {field!r} (it has: {', '.join(columns)}): "
            f"name the text's column with --field"
        )
    if columns.count(field) > 1:
        raise ValueError(f"{file.path}: {columns.count(field)} columns {field!r}: rename one")
    groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
    return [Piece((file,), 0, group.total_byte_size, i) for i, group in enumerate(groups)]


def read(piece: Piece, field: str) -> Iterator[Record]:
    file, row = piece.files[0], 0
    place = f"{file.path}: row group {piece.group}"
    opened = _open(file)
    batches = opened.iter_batches(1024, row_groups=[piece.group], columns=[field])
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # pyarrow raises its own hierarchy
            lost = opened.metadata.row_group(piece.group).num_rows - row
            yield Faulty(f"{place}, {lost} rows from {row} on: cannot be read ({error})", lost)
            return
        if batch is None:
            return
        if not batch.num_columns:
            lost = opened.metadata.row_group(piece.group).num_rows
            told = f"{place}, {lost} rows: no column {field!r}: name the text's column with --field"
            yield Faulty(told, lost)
            return
        for index in range(batch.num_rows):
            where, row = f"{place}, row {row}", row + 1
            try:
                record = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                text = text_in(record, field)
            except UnicodeDecodeError as error:
                yield Faulty(f"{where}: column {field!r} is not UTF-8 ({error.reason})")
            except ValueError as error:
                yield Faulty(f"{where}: {str(error).replace('field', 'column')}")
            else:
                yield Text(f"{file.name}:{piece.group}:{row - 1}", text)
