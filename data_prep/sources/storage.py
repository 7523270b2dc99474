"""Files of a source, here or at an fsspec address, packed or not: found, opened, told apart."""

import bz2
import gzip
import hashlib
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

        f = pa.CompressedInputStream(pa.PythonFile(f, mode="r"), "zstd")
    elif packing:
        opener: Any = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[packing]
        f = opener(f, "rb")
    return cast(IO[bytes], f)


def size_and_content(path: str) -> tuple[int, str]:
    """A file's size, and what changes with its content: its sha256, or what storage knows it by."""
    if is_address(path):
        files, name = _files(path)
        return files.info(name)["size"], str(files.ukey(name))
    with open(path, "rb") as f:
        return os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()


def walk(source: str, notes: list[str]) -> Iterator[tuple[str, str]]:
    """(name, path) of every file below a folder, in order of names; links are followed.

    What is left out goes into `notes`. Raises ValueError where it is neither file nor folder.
    """
    if is_address(source):
        yield from _walk_address(source)
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
    if hidden:
        shown = ", ".join(hidden[:3]) + (", ..." if len(hidden) > 3 else "")
        notes.append(f"{len(hidden)} hidden files and folders are left out: {shown}")
    yield from sorted(found)


def _walk_address(source: str) -> Iterator[tuple[str, str]]:
    files, root = _files(source)
    try:
        found = {name: entry for name, entry in files.find(root, detail=True).items()}
    except Exception as error:  # each store's client has errors of its own
        raise ValueError(f"source {source} cannot be read: {error}") from None
    if not found:
        raise ValueError(f"source {source} holds no files")
    for name in sorted(found):
        inside = name.removeprefix(root).strip("/") or os.path.basename(name)
        yield inside, files.unstrip_protocol(name)
