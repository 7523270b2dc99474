"""Files of a source, here or at an fsspec address, packed or not: found, opened, told apart."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from data_prep.files import at_home

PACKINGS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zstd": "zst"}


def is_address(path: str) -> bool:
    """Whether fsspec is to read it; file:// is a path like any other."""
    return "://" in path and not path.startswith("file://")


def _files(address: str) -> tuple[Any, str]:
    import fsspec

    if "::" in address:
        raise ValueError(f"source {address} is a chain of addresses: name the one of the files")
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"source {address} cannot be used: {error}") from None


def open_file(path: str, packing: str = "") -> IO[bytes]:
    """The bytes of a file, as they were before it was packed."""
    f: Any
    if is_address(path):
        files, name = _files(path)
        f = files.open(name, "rb")
    else:
        f = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    if packing == "zst":
        import pyarrow as pa

        # buffered, for it has no lines of its own
        f = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(f, mode="r"), "zstd"), 1 << 20)
    elif packing == "gz":
        f = gzip.GzipFile(fileobj=f)
    elif packing:
        f = io.BufferedReader(_Streams(f, packing), 1 << 20)
    return cast(IO[bytes], f)


class _Streams(io.RawIOBase):
    """bz2 or xz, of any number of streams: Python's readers end at what does not begin as one."""

    def __init__(self, packed: IO[bytes], packing: str) -> None:
        self._packed, self._packing = packed, packing
        self._unpack: Any = None  # between two streams
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        while True:
            if self._unpack is None or self._unpack.needs_input:
                self._rest = self._rest or self._packed.read(1 << 16)
                if not self._rest and self._unpack is None:
                    return 0
                if not self._rest:
                    raise EOFError("it ends in the middle of a stream")
            if self._unpack is None:
                if self._packing == "xz":  # between streams it may be padded
                    self._rest = self._rest.lstrip(b"\0")
                if not self._rest:
                    continue
                new: Any = {"bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}
                self._unpack = new[self._packing]()
            data = self._unpack.decompress(self._rest, len(room))
            self._rest = b""
            if self._unpack.eof:
                self._rest, self._unpack = self._unpack.unused_data, None
            if data:
                room[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self._packed.close()
        super().close()


def size_and_content(path: str) -> tuple[int, str]:
    """A file's size, and what changes with its content: its sha256, or what storage knows it by."""
    if is_address(path):
        files, name = _files(path)
        return files.info(name)["size"], _known_by(files, name)
    with open(path, "rb") as f:
        return os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()


def _known_by(files: Any, name: str) -> str:
    """What a store says of an object's content, however it was listed; else its sha256.

    Not fsspec's ukey: s3's differs between a file alone and one of a folder, http's is its address.
    """
    info = files.info(name)
    # digests first: an etag may change where the content does not
    for key in ("md5Hash", "Content-MD5", "content_md5", "crc32c", "ETag", "etag"):
        if value := info.get(key):
            return f"{key.lower()} {str(value).strip(chr(34))} of {info['size']}"
    with files.open(name, "rb") as f:
        digest = hashlib.sha256()
        while data := f.read(1 << 20):
            digest.update(data)
        return digest.hexdigest()


def stamp(path: str) -> tuple[int, ...]:
    """What changes when a file here is written to; of an address nothing."""
    if is_address(path):
        return ()
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


def walk(source: str, notes: list[str]) -> Iterator[tuple[str, str]]:
    """(name, path) of every file below a folder, in order of names; links are followed.

    What is left out goes into `notes`. Raises ValueError where it is neither file nor folder.
    """
    if is_address(source):
        yield from _walk_address(source, notes)
        return
    root = at_home(source.removeprefix("file://"))
    if root.is_file():
        yield root.name, str(root)
        return
    if not root.is_dir():
        raise ValueError(f"source {source!r} is neither a file, a folder nor `stdlib`")
    hidden: list[str] = []
    found: list[tuple[str, str]] = []
    seen = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to where one is already, or was
            notes.append(f"{folder} is a link to {real}, which is read already")
            folders.clear()
            continue
        seen.add(real)
        hidden += [os.path.join(folder, name) for name in folders + names if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            found.append((Path(path).relative_to(root).as_posix(), path))
    _note_hidden(hidden, notes)
    yield from sorted(found)


def _walk_address(source: str, notes: list[str]) -> Iterator[tuple[str, str]]:
    files, root = _files(source)
    try:
        files.invalidate_cache()
        found = {name: entry for name, entry in files.find(root, detail=True).items()}
    except Exception as error:  # each store's client has errors of its own
        raise ValueError(f"source {source} cannot be read: {error}") from None
    if not found:
        raise ValueError(f"source {source} holds no files")
    inside = {name: name.removeprefix(root).strip("/") for name in sorted(found)}
    hidden = [name for name, at in inside.items() if any(p[:1] == "." for p in at.split("/"))]
    _note_hidden(hidden, notes)
    for name in sorted(set(found) - set(hidden)):
        yield inside[name] or os.path.basename(name), files.unstrip_protocol(name)


def _note_hidden(hidden: list[str], notes: list[str]) -> None:
    if hidden:
        names = [name if name.isprintable() else ascii(name) for name in hidden[:3]]
        shown = ", ".join(names) + (", ..." if len(hidden) > 3 else "")
        notes.append(f"{len(hidden)} hidden files and folders are left out: {shown}")
