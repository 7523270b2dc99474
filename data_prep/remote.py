"""A prepared folder at an fsspec address (s3://, gs://): its files, dataset.json last of all.

It is made in a folder of this machine, which an interrupted command goes on with.
"""

import hashlib
import os
import posixpath
import tempfile
from pathlib import Path
from typing import Any

import fsspec

from data_prep.schema import INFO_NAME, TOKENIZER_NAME, DatasetInfo, load_info


class Remote:
    """An address that a dataset is prepared for. What storage refuses is an OSError."""

    def __init__(self, address: str) -> None:
        """Raises ValueError where it cannot be used."""
        self.address = address.rstrip("/")
        protocol, _, path = address.partition("://")
        if "::" in address or not protocol or not path.strip("/"):
            raise ValueError(f"--out {address} names no place")
        try:
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--out {address} cannot be used: {error}") from None

    def within(self, source: str) -> bool:
        """Whether it lies in a source, which would then read it."""
        return f"{self.address}/".startswith(f"{source.rstrip('/')}/")

    def folder(self) -> Path:
        """Below which datasets for this address are made. Raises ValueError where none can be."""
        try:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError as error:  # of a user whom no file of the machine knows
            raise ValueError(f"{error} Set XDG_CACHE_HOME to a folder with room.") from None
        name = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        return caches / "longhaul" / name

    def existing(self) -> DatasetInfo | None:
        """What is there already. Raises ValueError where that is no dataset of this version."""
        if not self._try("exists", self._path(INFO_NAME)):
            return None
        with tempfile.TemporaryDirectory() as here:
            for name in (INFO_NAME, TOKENIZER_NAME):
                if self._try("exists", self._path(name)):
                    self._try("get_file", self._path(name), f"{here}/{name}")
            return load_info(here)

    def upload(self, folder: Path) -> None:
        """Bring every file there, dataset.json last."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / INFO_NAME)
        for path in [*files, folder / INFO_NAME]:
            target = self._path(path.relative_to(folder).as_posix())
            self._try("makedirs", posixpath.dirname(target), exist_ok=True)
            self._try("put_file", str(path), target)
            if (size := self._try("info", target)["size"]) != path.stat().st_size:
                whole = path.stat().st_size
                raise OSError(f"{target} has {size} of {whole} bytes: run the same command again")

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _try(self, call: str, *args: Any, **options: Any) -> Any:
        try:
            self._files.invalidate_cache()
            return getattr(self._files, call)(*args, **options)
        except Exception as error:  # each store's client has errors of its own
            raise OSError(
                f"{self.address}: {str(error) or type(error).__name__}; run the same command again"
            ) from error
