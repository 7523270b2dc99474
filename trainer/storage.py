"""Checkpoints kept a second time, at an address of object storage (s3, gs) or another folder.

The door to fsspec. A checkpoint exists there when its manifest does, which is uploaded last.
"""

import json
import posixpath
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

MANIFEST = "manifest.json"


def place_of(name: str) -> tuple[int, int] | None:
    """(steps taken, runs of a segment in the next) at which a checkpoint of this name was saved."""
    found = re.fullmatch(r"step-(\d+)(?:-(\d+))?", name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def kept(names: list[str], keep: int, made: str) -> list[str]:
    """Of checkpoints' names, newest first, those that stay now that one is `made`.

    Of whole steps the newest `keep`; of a step under way the one just made: what else there is was
    saved before it, or is of that step as it was begun before.
    """
    whole = [name for name in names if (place_of(name) or (0, 1))[1] == 0]
    if made in whole:
        return [made, *(name for name in whole if name != made)][:keep]
    return [made, *whole[:keep]]


def address_fault(address: str) -> str | None:
    """Why an address cannot be used from here; None where it can."""
    protocol, path = fsspec.core.split_protocol(address)
    if "::" in address:
        return f"{address} is a chain of addresses: name the one where the files are"
    if "://" in address and not (protocol and path.strip("/")):
        return f"{address} names no place"
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        return f"{address} cannot be used: {error}"
    return None


class Mirror:
    """The checkpoints of one run at an fsspec address. What storage refuses is an OSError."""

    def __init__(self, address: str) -> None:
        if fault := address_fault(address):  # a worker's machine may lack what another has
            raise ValueError(f"checkpoint.remote: {fault}")
        self._address = address
        self._files: Any
        self._files, self._root = fsspec.core.url_to_fs(address)

    def upload(self, folder: Path, names: list[str]) -> None:
        """Some files of a checkpoint, which does not count until `commit`."""
        for name in names:
            target = self._path(folder.name, name)
            self._try(self._files.makedirs, posixpath.dirname(target), exist_ok=True)
            self._try(self._files.put_file, str(folder / name), target)

    def commit(self, folder: Path, keep: int) -> None:
        """The checkpoint is complete; all but the newest `keep` are dropped, manifests first.

        Unless storage has lost what it was given: a store that is started again may have.
        """
        found = self._sizes(folder.name)
        here = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
        for path in here:
            name = path.relative_to(folder).as_posix()
            if found.get(name) != path.stat().st_size:
                raise OSError(
                    f"checkpoint.remote {self._address}: {folder.name}/{name} has "
                    f"{found.get(name, 0)} of {path.stat().st_size} bytes"
                )
        for name in set(found) - {path.relative_to(folder).as_posix() for path in here}:
            self._try(self._files.rm_file, self._path(folder.name, name))  # of one that was cut off
        self.upload(folder, [MANIFEST])
        stay = kept(self.saved(), keep, folder.name)
        for path in self._try(self._files.glob, self._path("step-*")):  # unfinished ones too
            name = posixpath.basename(path)
            if name in stay:
                continue
            if self._try(self._files.exists, self._path(name, MANIFEST)):
                self._try(self._files.rm_file, self._path(name, MANIFEST))
            self._try(self._files.rm, self._path(name), recursive=True)

    def try_out(self, name: str) -> None:
        """Write a small object, read it and remove it again; OSError where any of it fails."""
        path = self._path(name)
        self._try(self._files.makedirs, self._root, exist_ok=True)
        self._try(self._files.pipe_file, path, b"longhaul")
        if self._try(self._files.cat_file, path) != b"longhaul":
            raise OSError(f"checkpoint.remote {self._address}: {name} does not read as written")
        self._try(self._files.rm_file, path)

    def saved(self) -> list[str]:
        """Names of the checkpoints that are complete, newest first."""
        self._files.invalidate_cache()
        found = self._try(self._files.glob, self._path("step-*", MANIFEST))
        names = [posixpath.basename(posixpath.dirname(path)) for path in found]
        places = ((place_of(name), name) for name in names)
        return [name for _, name in sorted(each for each in places if each[0])[::-1]]

    def withdraw(self, name: str) -> None:
        """A checkpoint that does not count any more: one of its name may have fewer files."""
        if self._try(self._files.exists, self._path(name, MANIFEST)):
            self._try(self._files.rm_file, self._path(name, MANIFEST))
            self._try(self._files.rm, self._path(name), recursive=True)

    def keep_note(self, name: str, text: str) -> None:
        """A small file beside the checkpoints."""
        self._try(self._files.makedirs, self._root, exist_ok=True)
        self._try(self._files.pipe_file, self._path(name), text.encode())

    def note(self, name: str) -> str | None:
        """What was kept, if it was."""
        self._files.invalidate_cache()
        if not self._try(self._files.exists, self._path(name)):
            return None
        return str(self._try(self._files.cat_file, self._path(name)).decode())

    def forget_note(self, name: str) -> None:
        if self._try(self._files.exists, self._path(name)):
            self._try(self._files.rm_file, self._path(name))

    def files(self, name: str) -> list[str]:
        """Of a checkpoint, by their names in it."""
        return sorted(self._sizes(name))

    def _sizes(self, name: str) -> dict[str, int]:
        self._files.invalidate_cache()
        root = self._path(name)
        found = self._try(self._files.find, root, detail=True)
        return {
            posixpath.relpath(self._files._strip_protocol(path), root): entry["size"]
            for path, entry in found.items()
        }

    def download(self, name: str, files: list[str], folder: Path) -> None:
        """Some files of a checkpoint into a local folder."""
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            self._try(self._files.get_file, self._path(name, file), str(folder / file))

    def manifest(self, name: str) -> dict[str, Any]:
        """Of a checkpoint there, as it was written. Raises ValueError where it is no JSON."""
        return json.loads(self._try(self._files.cat_file, self._path(name, MANIFEST)))

    def _path(self, *parts: str) -> str:
        return posixpath.join(self._root, *parts)

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        for pause_seconds in (1, 2, 4, 8, 0):  # a store that is started again is waited for
            try:
                return call(*args, **options)
            except Exception as error:  # each store's client has errors of its own
                final = isinstance(error, FileNotFoundError | PermissionError)
                if final or not pause_seconds:
                    raise OSError(f"checkpoint.remote {self._address}: {error}") from error
            time.sleep(pause_seconds)
