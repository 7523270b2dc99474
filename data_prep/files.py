"""Files that are whole or not there: written aside, synced, renamed; and their digests."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is at `path`, on disk and complete, only when the block has ended."""
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Replace the file by one with this text: a reader sees the old one or the new one."""
    with written_whole(path) as f:
        f.write(text.encode())


def at_home(path: str) -> Path:
    """The path, ~ being the home folder. Raises ValueError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def folder_here(path: str) -> Path:
    """The same, where an address would not do. Raises ValueError for one."""
    if "://" in path:
        raise ValueError(f"{path} is an address: name a folder of this machine")
    return at_home(path)


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
