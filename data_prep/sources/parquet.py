"""Parquet: a row is a document, its text in one column; a piece is a row group."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.pieces import Piece, Text


def plan(name: str, path: Path, field: str) -> list[Piece]:
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


def read(piece: Piece, field: str) -> Iterator[Text]:
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
