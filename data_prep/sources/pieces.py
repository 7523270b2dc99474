"""Files, the pieces that workers read at a time, and what comes out of a piece."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from data_prep.sources.storage import open_file

PIECE_BYTES = 8 << 20
SMALL_BYTES = 1 << 20  # files up to this size share a piece
SMALL_FILES = 4096  # in one piece, at most
MARK = b"\xef\xbb\xbf"  # of UTF-8, at the beginning of a file: no part of its text


@dataclass(frozen=True)
class File:
    """A file of a source. Its name does not depend on where the source lies, nor its content."""

    name: str
    path: str  # or an address
    size: int
    content: str = ""  # sha256, or what storage says instead
    kind: str = "text"
    packing: str = ""  # gz, bz2, xz, zst
    split: str | None = None  # where the command decides
    stamp: tuple[int, ...] = ()  # changes when the file here is written to (storage.stamp)


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of one file, or several small files whole; of parquet a row group."""

    files: tuple[File, ...]
    start: int
    end: int
    group: int = 0  # of parquet
    document: str | None = None  # all files are this one; else every text file is its own
    starts: bool = True  # whether the first document begins here
    ends: bool = True  # whether the last one ends here

    @property
    def kind(self) -> str:
        return self.files[0].kind

    @property
    def size_bytes(self) -> int:
        """How much input the piece stands for, for progress."""
        return self.end - self.start


@dataclass(frozen=True)
class Text:
    """Some text of a document, in order: its first part starts it, its last part ends it."""

    document: str
    text: str
    starts: bool = True
    ends: bool = True
    marked: bool = False  # a byte-order mark before it was left out


@dataclass(frozen=True)
class Faulty:
    """A record that is no text, or several that cannot be told apart; where it is and why."""

    message: str
    records: int = 1


Record = Text | Faulty
# Of what breaks a file: nobody knows how many records are lost with it.
UNTOLD = ", and where records begin after that nobody can tell: mend the file, or leave it out"


def whole(*files: File, document: str | None = None) -> Piece:
    """Files that are read from beginning to end."""
    return Piece(files, 0, sum(file.size for file in files), document=document)


def cut_at_lines(file: File, any_line: bool) -> list[Piece]:
    """A file, cut into pieces at line starts; one that is packed, or small, is one piece.

    With `any_line` at no other place, however long a line is: a line is a document.
    """
    if file.packing or file.size <= PIECE_BYTES:
        return [whole(file)]
    pieces: list[Piece] = []
    start = 0
    with open_file(file.path) as f:
        while start < file.size:
            cut = line_start(f, start + PIECE_BYTES, file.size, any_line)
            pieces.append(Piece((file,), start, cut, starts=start == 0, ends=cut == file.size))
            start = cut
    return pieces


def line_start(f: IO[bytes], target: int, end: int, any_line: bool = True) -> int:
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


def joined(pieces: list[Piece]) -> list[Piece]:
    """Small files of one kind that follow each other share a piece, so that none costs a start."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            last
            and _small(piece)
            and _small(last, counted=True)
            and last.kind == piece.kind
            and last.size_bytes + piece.size_bytes <= PIECE_BYTES
        ):
            result[-1] = replace(last, files=last.files + piece.files, end=last.end + piece.end)
        else:
            result.append(piece)
    return result


def _small(piece: Piece, counted: bool = False) -> bool:
    fine = piece.document is None and piece.kind != "parquet" and not piece.files[0].packing
    if counted and len(piece.files) > 1:
        return fine and len(piece.files) < SMALL_FILES
    return fine and piece.starts and piece.ends and piece.size_bytes <= SMALL_BYTES


def chunks(piece: Piece, any_line: bool) -> Iterator[tuple[File, int, bytes, bool]]:
    """(file, offset, bytes, whether the file or piece ends there) of every file of a piece.

    The chunks of a file end at line ends, however long a line is with `any_line`.
    """
    for file in piece.files:
        start, end = (piece.start, piece.end) if len(piece.files) == 1 else (0, file.size)
        with open_file(file.path, file.packing) as f:
            if file.packing:
                yield from _unpacked(file, f, any_line)
                continue
            f.seek(start)
            data = f.read(end - start)
        if len(data) != end - start:
            raise ValueError(f"{file.path} changed while it was read: run again when it is whole")
        yield file, start, data, True


def _unpacked(file: File, f: IO[bytes], any_line: bool) -> Iterator[tuple[File, int, bytes, bool]]:
    offset, rest = 0, b""
    try:
        while data := f.read(PIECE_BYTES):
            rest += data
            cut = rest.rfind(b"\n") + 1
            if not cut and not any_line and len(rest) > PIECE_BYTES:
                cut = _character_end(rest)
            if cut and cut < len(rest):
                yield file, offset, rest[:cut], False
                offset, rest = offset + cut, rest[cut:]
    except (OSError, EOFError, ValueError) as error:  # each packing has errors of its own
        raise ValueError(
            f"{file.path} cannot be unpacked after {offset:,} bytes: {error}"
        ) from None
    yield file, offset, rest, True


def _character_end(data: bytes) -> int:
    """Where the last whole UTF-8 character ends."""
    end = len(data)
    while end and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(0, end - 1)


def decode(data: bytes, file: File, offset: int) -> str:
    """Raises ValueError naming file and line for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line_number(file, offset + error.start)
        raise ValueError(f"{file.path}:{line}: {no_utf8(data, offset, error)}") from None


def no_utf8(data: bytes, offset: int, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that begin at a file's offset."""
    other = ""
    if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        other = "; it begins as UTF-16 does"
    return (
        f"byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}{other}): convert the file, "
        f"or leave it out"
    )


def line_number(file: File, offset: int) -> int:
    """The 1-based line of a byte offset; read only when there is an error to report."""
    line, left = 1, offset
    with open_file(file.path, file.packing) as f:
        while left and (chunk := f.read(min(left, 1 << 20))):
            line += chunk.count(b"\n")
            left -= len(chunk)
    return line
