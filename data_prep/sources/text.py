"""Plain text: a file is a document."""

from collections.abc import Iterator

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
)


def plan(file: File, field: str) -> list[Piece]:
    """The file's pieces."""
    return cut_at_lines(file, any_line=False)


def read(piece: Piece, field: str) -> Iterator[Record]:
    """The piece's text; of several files each is a document, unless they are parts of one."""
    for file, offset, data, last in chunks(piece, any_line=False):
        whole = piece.document is None
        marked = offset == 0 and data.startswith(MARK)
        starts = offset == 0 and (whole or file is piece.files[0])
        ends = last and (piece.ends if whole else file is piece.files[-1])
        try:
            text = decode(data[len(MARK) * marked :], file, offset + len(MARK) * marked)
        except ValueError as error:
            yield Faulty(str(error))
            if not (starts and ends):  # what is left of the document keeps its ends
                yield Text(piece.document or file.name, "", starts, ends)
        else:
            yield Text(piece.document or file.name, text, starts, ends, marked)
