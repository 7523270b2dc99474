"""The format of a prepared folder, shared by its writer and its readers.

    DIR/dataset.json            this file's DatasetInfo; a folder without it is not a dataset
        tokenizer.json          the tokenizer, where it is not plain bytes
        train/index.json        MosaicML Streaming's index: MDS shard files, sizes, sha256
              shard.*.mds
        held_out/...            the same for the documents kept for evaluation

A split is one stream of tokens, its documents one after another, cut into blocks of `block_size`
tokens; a sample of the MDS files is a block. The last block is padded with zeros up to the size.
So data written once trains at any sequence length, and a reader touches only the blocks it needs.
A token is a number, or a frame of several (task.TrajectoryInfo).

What is read is what was written, in its place: dataset.json has a digest of itself and those of
tokenizer and indices, an index has those of its files, and a block's checksum is of its split and
number too.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.files import file_sha256, write_whole
from data_prep.task import SyntheticInfo, TrajectoryInfo

VERSION = 2
READ = (1, 2)  # of version 1 a block's checksum does not know its place, and nothing has a digest
INFO_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "held_out")
DTYPES = ("uint8", "uint16", "uint32", "float32")  # the last of frames alone


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

    tokenizer: str  # "bytes", the name of the tokenizer file that was given; of frames "none"
    vocab_size: int  # of frames 1
    block_size: int  # tokens per block
    dtype: str  # numpy name of a token's type
    fingerprint: str  # sha256 of the sources' names and content, and of all settings
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    version: int = VERSION
    synthetic: SyntheticInfo | None = None
    trajectories: TrajectoryInfo | None = None
    tokenizer_sha256: str = ""
    end_of_document: int | None = None  # the token after every document
    left_out: list[str] = field(default_factory=list)  # faulty records, by place and reason
    changed_texts: int = 0  # whose tokens do not decode to them, where that was allowed
    digest: str = ""  # of all that stands above

    @property
    def token_shape(self) -> tuple[int, ...]:
        """() of a number, (numbers,) of a frame."""
        return (self.trajectories.width,) if self.trajectories else ()

    def columns(self) -> dict[str, str]:
        """MDS columns: the block's tokens, where documents start in it, and a checksum of both."""
        shape = ",".join(map(str, (self.block_size, *self.token_shape)))
        return {
            "crc32": "uint32",
            "starts": "bytes",  # little-endian uint32 offsets into the block
            "tokens": f"ndarray:{self.dtype}:{shape}",
        }

    def checksum(self, split: str, block: int, tokens: bytes, starts: bytes) -> int:
        """crc32 of a block's tokens and document starts, and of whose and which block it is."""
        place = f"{self.fingerprint}/{split}/{block}".encode() if self.version > 1 else b""
        return zlib.crc32(starts, zlib.crc32(tokens, zlib.crc32(place)))

    def dump(self, folder: Path) -> None:
        self.digest = _digest(asdict(self))
        write_whole(folder / INFO_NAME, json.dumps(asdict(self), indent=2) + "\n")


def load_info(folder: str | Path) -> DatasetInfo:
    """Read DIR/dataset.json, and see that the tokenizer beside it is the one that was used.

    Raises ValueError naming the file and the remedy.
    """
    path = Path(folder) / INFO_NAME
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {INFO_NAME}, so it is not a prepared dataset: "
            f"write it with `python -m data_prep SOURCE --out {folder}`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): prepare the data again") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if version not in READ:
        raise ValueError(
            f"{path} is of format version {version}, this code reads "
            f"{' and '.join(map(str, READ))}: prepare the data again"
        )
    if version > 1 and raw.get("digest") != _digest(raw):
        raise ValueError(f"{path} is not as it was written: prepare the data again")
    try:
        info = _parsed(raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not what data_prep writes ({error}): prepare the data again"
        ) from None
    tokenizer = Path(folder) / TOKENIZER_NAME
    if info.tokenizer not in ("bytes", "none") and not tokenizer.is_file():
        raise ValueError(f"{tokenizer} is missing: prepare the data again")
    if info.tokenizer_sha256 and file_sha256(tokenizer) != info.tokenizer_sha256:
        raise ValueError(
            f"{tokenizer} is not the tokenizer that the data were prepared with: "
            f"bring it back, or prepare the data again"
        )
    return info


def _digest(raw: dict[str, Any]) -> str:
    stated = {name: value for name, value in raw.items() if name != "digest"}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _parsed(raw: dict[str, Any]) -> DatasetInfo:
    """Raises what a wrong field leads to, each with a word of it."""
    known = {f.name for f in fields(DatasetInfo)}
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"it has {unknown[0]!r}")
    if set(raw["splits"]) != set(SPLITS):
        raise ValueError(f"its splits are {', '.join(raw['splits'])}")
    info = DatasetInfo(**raw)
    info.splits = {name: SplitInfo(**split) for name, split in raw["splits"].items()}
    info.synthetic = SyntheticInfo(**raw["synthetic"]) if raw.get("synthetic") else None
    frames = raw.get("trajectories")
    info.trajectories = TrajectoryInfo(**frames) if frames else None
    counts = [("vocab_size", info.vocab_size), ("block_size", info.block_size)]
    for name, split in info.splits.items():
        for key in ("documents", "tokens", "blocks", "text_bytes"):
            counts.append((f"{name}.{key}", getattr(split, key)))
        if split.tokens > split.blocks * info.block_size:
            raise ValueError(f"{name} has more tokens than blocks")
    for key, value in counts:
        least = 0 if "." in key else 1
        if type(value) is not int or value < least:
            raise ValueError(f"{key} is {value!r}")
    if info.dtype not in DTYPES or (info.dtype == "float32") != bool(info.trajectories):
        raise ValueError(f"dtype is {info.dtype!r}")
    return info


def file_faults(folder: str | Path, split: str, info: DatasetInfo) -> list[str]:
    """What is wrong with a split's index and the sizes of its files, by name; reads no block."""
    root = Path(folder) / split
    index = root / "index.json"
    try:
        shards = json.loads(index.read_text())["shards"]
        if (stated := info.splits[split].index_sha256) and file_sha256(index) != stated:
            return [f"{index} is not the index that was written: prepare the data again"]
        described = [(shard["raw_data"], _shard_fault(shard, info)) for shard in shards]
        samples = sum(shard["samples"] for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{index} cannot be read ({error!r}): prepare the data again"]
    faults = []
    for raw, fault in described:
        name, size = raw["basename"], raw["bytes"]
        if fault:
            faults.append(f"{index}: {fault}: prepare the data again")
        elif Path(name).name != name:
            faults.append(f"{index} names {name!r}, a path outside its folder")
        elif not (root / name).is_file():
            faults.append(f"MDS shard file {root / name} is missing: prepare the data again")
        elif (actual := (root / name).stat().st_size) != size:
            faults.append(
                f"MDS shard file {root / name} has {actual} bytes, its index says {size}: "
                f"it is damaged, prepare the data again"
            )
    if not faults and samples != info.splits[split].blocks:
        stated_blocks = info.splits[split].blocks
        faults.append(f"{index} has {samples} blocks, dataset.json says {stated_blocks}")
    return faults


def _shard_fault(shard: dict[str, Any], info: DatasetInfo) -> str | None:
    """What would be read as anything else than a block. A column's type could run code."""
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if columns != info.columns():
        return f"its columns are {columns}, not {info.columns()}"
    if shard["format"] != "mds" or shard.get("compression") or shard.get("zip_data"):
        return "its files are not plain MDS"
    return None
