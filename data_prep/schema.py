"""The format of a prepared folder, shared by its writer and its readers.

    DIR/dataset.json            this file's DatasetInfo; a folder without it is not a dataset
        tokenizer.json          the tokenizer, where it is not plain bytes
        train/index.json        MosaicML Streaming's index: MDS shard files, sizes, sha256
              shard.*.mds
        held_out/...            the same for the documents kept for evaluation

A split is one stream of tokens, its documents one after another, cut into blocks of `block_size`
tokens; a sample of the MDS files is a block. The last block is padded with zeros up to the size.
So data written once trains at any sequence length, and a reader touches only the blocks it needs.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import write_whole
from data_prep.task import SyntheticInfo

VERSION = 1
INFO_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "held_out")


@dataclass
class SplitInfo:
    """What one split holds. `text_bytes` is the UTF-8 length of the text behind its tokens."""

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    text_bytes: int = 0
    index_sha256: str = ""


@dataclass
class DatasetInfo:
    """Everything a reader must know besides the blocks themselves."""

    tokenizer: str  # "bytes", or the name of the tokenizer file that was given
    vocab_size: int
    block_size: int  # tokens per block
    dtype: str  # numpy name of a token's type
    fingerprint: str  # sha256 of the sources' names, sizes and times, and of all settings
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    version: int = VERSION
    synthetic: SyntheticInfo | None = None

    def columns(self) -> dict[str, str]:
        """MDS columns: the block's tokens, where documents start in it, and a checksum of both."""
        return {
            "crc32": "uint32",
            "starts": "bytes",  # little-endian uint32 offsets into the block
            "tokens": f"ndarray:{self.dtype}:{self.block_size}",
        }

    def dump(self, folder: Path) -> None:
        write_whole(folder / INFO_NAME, json.dumps(asdict(self), indent=2) + "\n")


def load_info(folder: str | Path) -> DatasetInfo:
    """Read DIR/dataset.json. Raises ValueError naming the folder and the remedy."""
    path = Path(folder) / INFO_NAME
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {INFO_NAME}, so it is not a prepared dataset: "
            f"write it with `python -m data_prep SOURCE --out {folder}`"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): prepare the data again") from None
    if raw.get("version") != VERSION:
        raise ValueError(
            f"{path} is of format version {raw.get('version')}, this code reads {VERSION}: "
            f"prepare the data again"
        )
    raw["splits"] = {name: SplitInfo(**split) for name, split in raw["splits"].items()}
    if raw.get("synthetic"):
        raw["synthetic"] = SyntheticInfo(**raw["synthetic"])
    return DatasetInfo(**raw)


def file_faults(folder: str | Path, split: str) -> list[str]:
    """MDS shard files of a split that are missing or of the wrong size, by name; reads none."""
    root = Path(folder) / split
    try:
        shards = json.loads((root / "index.json").read_text())["shards"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        return [f"{root / 'index.json'} cannot be read ({error}): prepare the data again"]
    faults = []
    for shard in shards:
        name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        if Path(name).name != name:
            faults.append(f"{root / 'index.json'} names {name!r}, a path outside its folder")
        elif not (root / name).is_file():
            faults.append(f"MDS shard file {root / name} is missing: prepare the data again")
        elif (actual := (root / name).stat().st_size) != size:
            faults.append(
                f"MDS shard file {root / name} has {actual} bytes, its index says {size}: "
                f"it is damaged, prepare the data again"
            )
    return faults


def block_checksum(tokens: bytes, starts: bytes) -> int:
    """crc32 over a block's tokens and document starts."""
    return zlib.crc32(starts, zlib.crc32(tokens))
