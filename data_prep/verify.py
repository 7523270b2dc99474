"""Recount and rehash a prepared folder: every byte is read."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.files import file_sha256
from data_prep.schema import SPLITS, block_checksum, file_faults, load_info


def verify(folder: Path, progress: bool = True) -> list[str]:
    """What is wrong with the folder, each fault by file name; empty when it is whole.

    Raises ValueError where there is no dataset to verify.
    """
    from streaming import LocalDataset

    info = load_info(folder)
    faults: list[str] = []
    for split in SPLITS:
        root, stated = folder / split, info.splits[split]
        missing = file_faults(folder, split)
        if missing:
            faults += missing
            continue
        if file_sha256(root / "index.json") != stated.index_sha256:
            faults.append(f"{root / 'index.json'} is not the index that was written")
            continue
        damaged = []
        for shard in json.loads((root / "index.json").read_text())["shards"]:
            path = root / shard["raw_data"]["basename"]
            if file_sha256(path) != shard["raw_data"]["hashes"]["sha256"]:
                damaged.append(f"{path} does not have the sha256 of its index")
        if damaged:
            faults += damaged
            continue
        if stated.blocks == 0:
            continue
        blocks = LocalDataset(local=str(folder), split=split)
        if len(blocks) != stated.blocks:
            faults.append(f"{root} holds {len(blocks)} blocks, dataset.json says {stated.blocks}")
        documents, largest = 0, -1
        for i in tqdm(range(len(blocks)), desc=f"verifying {split}", disable=not progress):
            block = blocks[i]
            if block_checksum(block["tokens"].tobytes(), block["starts"]) != block["crc32"]:
                faults.append(f"{root}: block {i} does not have its checksum")
            documents += len(block["starts"]) // 4
            largest = max(largest, int(block["tokens"].max()))
        last = stated.tokens - (stated.blocks - 1) * info.block_size if stated.blocks else 0
        if stated.blocks and not 0 < last <= info.block_size:
            faults.append(f"{root}: {stated.tokens} tokens do not fill {stated.blocks} blocks")
        elif stated.blocks and np.any(blocks[stated.blocks - 1]["tokens"][last:]):
            faults.append(f"{root} holds more tokens than dataset.json says, {stated.tokens}")
        if documents != stated.documents:
            faults.append(
                f"{root} holds {documents} documents, dataset.json says {stated.documents}"
            )
        if largest >= info.vocab_size:
            faults.append(f"{root} holds token {largest}, the vocabulary has {info.vocab_size}")
    return faults
