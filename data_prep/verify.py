"""Recount and rehash a prepared folder: every byte is read, by the reader that training has."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.blocks import Blocks, DataError
from data_prep.files import file_sha256
from data_prep.schema import SPLITS, DatasetInfo, file_faults, load_info


def verify(folder: Path, progress: bool = True) -> list[str]:
    """What is wrong with the folder, each fault by file name; empty when it is whole.

    Raises ValueError where there is no dataset to verify.
    """
    info = load_info(folder)
    faults: list[str] = []
    for split in SPLITS:
        found = file_faults(folder, split, info) or _changed_files(folder / split)
        faults += found or _recounted(folder, split, info, progress)
    return faults


def _changed_files(root: Path) -> list[str]:
    faults = []
    for shard in json.loads((root / "index.json").read_text())["shards"]:
        path = root / shard["raw_data"]["basename"]
        if file_sha256(path) != shard["raw_data"]["hashes"]["sha256"]:
            faults.append(f"{path} does not have the sha256 of its index")
    return faults


def _recounted(folder: Path, split: str, info: DatasetInfo, progress: bool) -> list[str]:
    stated, root = info.splits[split], folder / split
    if stated.blocks == 0:
        return []
    blocks = Blocks(str(folder), split)
    faults: list[str] = []
    documents, largest = 0, -1
    last = stated.tokens - (stated.blocks - 1) * info.block_size
    for index in tqdm(range(stated.blocks), desc=f"verifying {split}", disable=not progress):
        try:
            tokens, starts = blocks.read(index)
        except DataError as error:
            faults.append(str(error))
            continue
        documents += len(starts)
        if info.trajectories:
            if not np.isfinite(tokens).all():
                faults.append(f"{root}: block {index} holds numbers that are not finite")
        else:
            largest = max(largest, int(tokens.max()))
        if index == stated.blocks - 1 and np.any(tokens[max(last, 0) :]):
            faults.append(f"{root} holds more tokens than dataset.json says, {stated.tokens}")
    if not 0 < last <= info.block_size:
        faults.append(f"{root}: {stated.tokens} tokens do not fill {stated.blocks} blocks")
    if not faults and documents != stated.documents:
        faults.append(f"{root} holds {documents} documents, dataset.json says {stated.documents}")
    if largest >= info.vocab_size:
        faults.append(f"{root} holds token {largest}, the vocabulary has {info.vocab_size}")
    return faults
