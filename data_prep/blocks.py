"""The one reader of blocks, for training and for verification: each is checked as it is read.

Streaming's readers give random access and its Stream fetches the files of a URL; columns of any
other type than ours, which could hold a pickle, are refused before.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from data_prep.files import file_sha256, sync_to_disk
from data_prep.mds import CloudDownloader, Spanner, Stream, World
from data_prep.schema import INFO_NAME, TOKENIZER_NAME, DatasetInfo, file_faults, load_info


class DataError(ValueError):
    """An MDS shard file is missing, damaged or not what its index says; the message names it."""


class Blocks:
    """Random access to the blocks of a split. `bytes_read` counts what was read of them."""

    def __init__(self, path: str, split: str, cache: str | None = None) -> None:
        """Of a folder, or of an address whose files are fetched into `cache`.

        Raises DataError naming the file that is not as it was written.
        """
        # file:// is a folder to fetch from too: storage that is slower than the machine's own disk
        remote = path.removeprefix("file://").rstrip("/") if "://" in path else None
        if "AWS_ENDPOINT_URL" in os.environ:  # botocore's name; Streaming has its own
            os.environ.setdefault("S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        self.folder = Path(cache or "") if remote else Path(path)
        self.info = _fetch_info(remote, self.folder) if remote else load_info(self.folder)
        self.split = split
        self.bytes_read = 0
        if not remote and (faults := file_faults(self.folder, split, self.info)):
            raise DataError("\n".join(faults))
        self._stream = Stream(
            remote=remote,
            local=str(self.folder),
            split=split,
            download_retry=2,
            download_timeout=300,
            validate_hash="sha256",
            keep_zip=False,
        )
        # Each worker acts as the only one, under a lock of the machine: placement breaks nothing.
        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        with FileLock(self.folder / "lock") if remote else nullcontext():
            self._shards: Any = self._stream.get_shards(alone, allow_unsafe_types=False)
        if remote and (faults := _index_faults(self.folder, split, self.info)):
            raise DataError("\n".join(faults))
        self._present = [remote is None] * len(self._shards)
        self._spanner = Spanner(np.array([shard.samples for shard in self._shards]))

    def read(self, index: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """A block's tokens [block_size, *token_shape], and where documents start in it.

        Raises DataError naming the file and the block that cannot be read.
        """
        shard_index, sample_index = self._spanner[index]
        shard = self._shards[shard_index]
        name = Path(self.folder, self.split, shard.raw_data.basename)
        again = f"run `python -m data_prep verify {self.folder}`, prepare the data again"
        try:
            if not self._present[shard_index]:
                # one worker of a machine fetches, the others find the file there
                with FileLock(f"{name}.lock"):
                    self._fetch(shard, name)
                self._present[shard_index] = True
            data = shard.get_sample_data(sample_index)
            sample = shard.decode_sample(data)
            tokens, starts = sample["tokens"], sample["starts"]
            checksum = self.info.checksum(self.split, index, tokens.tobytes(), starts)
        except Exception as error:  # Streaming raises whatever its bytes lead to
            raise DataError(
                f"MDS shard file {name}, block {sample_index}: cannot be read ({error}): {again}"
            ) from error
        if checksum != sample["crc32"]:
            name.with_name(f"{name.name}.whole").unlink(missing_ok=True)  # to be looked at anew
            raise DataError(
                f"MDS shard file {name}, block {sample_index}: its checksum is wrong, the file is "
                f"damaged or of another place: {again}"
            )
        self.bytes_read += len(data)
        return tokens, np.frombuffer(starts, "<u4").astype(np.int64)

    def _fetch(self, shard: Any, name: Path) -> None:
        """Bring a file to the cache; one that is there, but not whole, anew."""
        known, looked_at = shard.raw_data, name.with_name(f"{name.name}.whole")
        if name.exists() and not _same(looked_at, name):
            whole = name.stat().st_size == known.bytes
            if not whole or file_sha256(name) != known.hashes["sha256"]:
                name.unlink()  # Streaming takes whatever has the name
        try:
            self._stream.prepare_shard(shard)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        if not _same(looked_at, name):
            sync_to_disk(name)  # or a machine that dies may lose of it what was looked at
            looked_at.write_text(_stamp(name))  # not by every worker at every start


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _same(looked_at: Path, path: Path) -> bool:
    """Whether a file is as it was when it was looked at whole."""
    return looked_at.exists() and looked_at.read_text() == _stamp(path)


def _index_faults(folder: Path, split: str, info: DatasetInfo) -> list[str]:
    """Of what was fetched: the index alone, for its files come when they are read."""
    return [fault for fault in file_faults(folder, split, info) if "MDS shard file" not in fault]


def _fetch_info(remote: str, cache: Path) -> DatasetInfo:
    """Bring dataset.json (and a tokenizer) of an address to the cache, once per machine.

    Raises DataError where it cannot be fetched, or where the cache holds other data.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        downloader = CloudDownloader.get(remote)

        def fetch(name: str) -> Path:
            partial = cache / f"{name}.partial"
            partial.unlink(missing_ok=True)
            try:
                downloader.download(f"{remote}/{name}", str(partial), 300)
            except Exception as error:  # each cloud's client has errors of its own
                raise DataError(f"{remote}/{name} cannot be fetched: {error}") from error
            return partial

        info = fetch(INFO_NAME)
        if (cache / INFO_NAME).exists():
            if info.read_bytes() != (cache / INFO_NAME).read_bytes():
                raise DataError(
                    f"data.cache {cache} holds other data than {remote} does now: "
                    f"remove it, or choose another"
                )
            info.unlink()
        else:
            if json.loads(info.read_text())["tokenizer"] not in ("bytes", "none"):
                fetch(TOKENIZER_NAME).replace(cache / TOKENIZER_NAME)
            info.replace(cache / INFO_NAME)  # last: it says that the rest is there
    return load_info(cache)
