"""Recall, and problems to be worked out, made to measure: a dataset as any other.

One document is a sequence. Answers have an alphabet of their own: only these tokens count in losses
(task.SyntheticInfo). A task is a file with a class (kinds.py), and a line of `TASKS`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.parts import PartWriter, Told
from data_prep.schema import SPLITS, DatasetInfo
from data_prep.synthetic.copy import Copy
from data_prep.synthetic.cycle import Cycle
from data_prep.synthetic.even_pairs import EvenPairs
from data_prep.synthetic.kinds import MOST_TOKENS, Task
from data_prep.synthetic.majority import Majority
from data_prep.synthetic.mqar import AssociativeRecall
from data_prep.synthetic.needle import Needle
from data_prep.synthetic.parity import Parity
from data_prep.synthetic.s5 import S5
from data_prep.synthetic.variables import VariableTracking
from data_prep.task import SyntheticInfo
from data_prep.write import Settings, existing_dataset, only_writer, seal_dataset

TASKS: dict[str, Task] = {
    "copy": Copy(),
    "needle": Needle(),
    "mqar": AssociativeRecall(),
    "variables": VariableTracking(),
    "parity": Parity(),
    "s5": S5(),
    "cycle": Cycle(),
    "even-pairs": EvenPairs(),
    "majority": Majority(),
}
ROWS_AT_ONCE = 1 << 24  # tokens of the sequences that are made at a time


@dataclass(frozen=True)
class SyntheticSettings:
    """What decides every byte of a synthetic dataset."""

    task: str
    length: int = 1024  # tokens of a sequence, answers included: train.seq_len must be this
    tokens: int = 16  # of the answer; pairs of mqar; assignments of a chain of variables
    alphabet: int = 16  # different data tokens
    # in turn: from a needle's value to its answer; lengths of problems that are asked at the end
    distances: tuple[int, ...] = ()
    train: int = 20_000  # sequences
    held_out: int = 512
    seed: int = 0


def prepare_synthetic(settings: SyntheticSettings, out: Path) -> DatasetInfo:
    """Write DIR, or find it written. Raises ValueError for what cannot be made."""
    _check(settings)
    kind = TASKS[settings.task]
    words = kind.words(settings)
    task = SyntheticInfo(
        task=settings.task,
        sequence_tokens=settings.length,
        scored_from=words,
        scored_tokens=kind.scored(settings),
        distances=list(settings.distances),
        hidden_as=words - 1 if kind.hidden else None,  # the marker
    )
    described = json.dumps([asdict(settings), asdict(task)])
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    if out.exists():
        return existing_dataset(out, fingerprint)
    info = DatasetInfo(
        tokenizer="bytes",
        vocab_size=words + kind.answers(settings),
        block_size=min(settings.length, 4096),
        dtype="uint8",
        fingerprint=fingerprint,
        synthetic=task,
    )
    partial = out.with_name(out.name + ".partial")
    with only_writer(partial, out):
        part = partial / "parts" / "sequences.npz"
        _write(settings, part, info.dtype)
        seal_dataset([part], info, Settings(block_size=info.block_size), partial, out)
    return info


def _write(settings: SyntheticSettings, part: Path, dtype: str) -> None:
    """Both splits as documents of a part."""
    writer = PartWriter(part, dtype)
    # as many as fit memory, whole turns of the distances where a turn does
    at_once, turns = max(1, ROWS_AT_ONCE // settings.length), max(1, len(settings.distances))
    at_once = -(-at_once // turns) * turns if turns <= at_once else at_once
    for index, split in enumerate(SPLITS):
        # one sequence more than asked for: the last label of a sequence is the next one's token
        count = (settings.train if split == "train" else settings.held_out) + 1
        generator = np.random.default_rng([settings.seed, index])
        for first in range(0, count, at_once):
            turn = first % turns
            ahead = settings.distances[turn:] + settings.distances[:turn]
            rows = TASKS[settings.task].sequences(
                replace(settings, distances=ahead), min(at_once, count - first), generator
            )
            for row in rows.astype(np.uint8):
                writer.add(row, (len(row), True, 0, index))
    writer.close(Told([], []))


def _check(settings: SyntheticSettings) -> None:
    if settings.task not in TASKS:
        raise ValueError(f"task {settings.task!r} is not one of {', '.join(TASKS)}")
    if min(settings.tokens, settings.alphabet, settings.train, settings.held_out) < 1:
        raise ValueError("tokens, alphabet and the numbers of sequences must be positive")
    if not 0 <= settings.seed < 1 << 32:  # NumPy would take more for a list of such numbers
        raise ValueError(f"--seed {settings.seed} is not from 0 to {(1 << 32) - 1}")
    kind = TASKS[settings.task]
    if (tokens := kind.words(settings) + kind.answers(settings)) > MOST_TOKENS:
        raise ValueError(
            f"--alphabet {settings.alphabet} makes {tokens} different tokens, and they must fit a "
            f"byte: use a smaller one"
        )
    if settings.distances and not kind.asks_by_distance:
        raise ValueError(f"--distances: {settings.task} asks for nothing by distance: leave it out")
    if settings.length < 2:
        raise ValueError(f"--length {settings.length}: a sequence has at least two tokens")
    if fault := kind.fault(settings):
        raise ValueError(fault)
