"""Recall made to measure: a dataset as any other, one document a sequence.

Answers have an alphabet of their own: only these tokens count in losses (task.SyntheticInfo). A
task is a module that says where the data lie, and a line of `TASKS`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.parts import PartWriter, Told
from data_prep.schema import SPLITS, DatasetInfo
from data_prep.synthetic import copy, needle
from data_prep.task import SyntheticInfo
from data_prep.write import Settings, existing_dataset, seal_dataset


class Task(Protocol):
    """What is asked of a model."""

    HIDDEN: bool  # whether a model reads the marker in place of every answer

    def surround(self, settings: "SyntheticSettings") -> int:
        """How many different tokens surround the data; they are the first."""

    def fault(self, settings: "SyntheticSettings") -> str | None:
        """Why it cannot be made so."""

    def places(
        self, settings: "SyntheticSettings", count: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Where the data of `count` sequences lie, [count, tokens]."""


TASKS: dict[str, Task] = {"copy": copy, "needle": needle}


@dataclass(frozen=True)
class SyntheticSettings:
    """What decides every byte of a synthetic dataset."""

    task: str
    length: int = 1024  # tokens of a sequence, answer included: train.seq_len must be this
    tokens: int = 16  # of the answer
    alphabet: int = 16  # data tokens; the needle's surroundings use as many again
    distances: tuple[int, ...] = ()  # of the needle, from a value's token to its answer
    train: int = 20_000  # sequences
    held_out: int = 512
    seed: int = 0


def prepare_synthetic(settings: SyntheticSettings, out: Path) -> DatasetInfo:
    """Write DIR, or find it written. Raises ValueError for what cannot be made."""
    _check(settings)
    alphabet, kind = settings.alphabet, TASKS[settings.task]
    # surroundings, data, two markers, answers
    scored_from = kind.surround(settings) + alphabet + 2
    task = SyntheticInfo(
        task=settings.task,
        sequence_tokens=settings.length,
        scored_from=scored_from,
        scored_tokens=settings.tokens,
        distances=list(settings.distances),
        hidden_as=scored_from - 1 if kind.HIDDEN else None,  # the marker
    )
    described = json.dumps([asdict(settings), asdict(task)])
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    if out.exists():
        return existing_dataset(out, fingerprint)
    info = DatasetInfo(
        tokenizer="bytes",
        vocab_size=scored_from + alphabet,
        block_size=min(settings.length, 4096),
        dtype="uint8",
        fingerprint=fingerprint,
        synthetic=task,
    )
    partial = out.with_name(out.name + ".partial")
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    part = partial / "parts" / "sequences.npz"
    writer = PartWriter(part, info.dtype)
    for index, split in enumerate(SPLITS):
        count = settings.train if split == "train" else settings.held_out
        generator = np.random.default_rng([settings.seed, index])
        # one sequence more than asked for: the last label of a sequence is the next one's token
        for row in _sequences(settings, count + 1, generator):
            writer.add(row, (len(row), True, 0, index))
    writer.close(Told([], []))
    seal_dataset([part], info, Settings(block_size=info.block_size), partial, out)
    return info


def _check(settings: SyntheticSettings) -> None:
    if settings.task not in TASKS:
        raise ValueError(f"task {settings.task!r} is not one of {', '.join(TASKS)}")
    if min(settings.tokens, settings.alphabet, settings.train, settings.held_out) < 1:
        raise ValueError("tokens, alphabet and the numbers of sequences must be positive")
    if 3 * settings.alphabet + 2 > 256:
        raise ValueError(f"--alphabet {settings.alphabet} is above 84: tokens must fit a byte")
    if settings.length < 2 * settings.tokens + 2:
        raise ValueError(
            f"--length {settings.length} has no room for {settings.tokens} tokens and their "
            f"answer: use at least {2 * settings.tokens + 2}"
        )
    if fault := TASKS[settings.task].fault(settings):
        raise ValueError(fault)


def _sequences(
    settings: SyntheticSettings, count: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """[count, length] tokens, the answer last in each row."""
    length, tokens, alphabet = settings.length, settings.tokens, settings.alphabet
    task = TASKS[settings.task]
    surround = task.surround(settings)
    here, ask = surround + alphabet, surround + alphabet + 1  # markers
    values = generator.integers(0, alphabet, (count, tokens))
    rows = generator.integers(0, surround, (count, length)).astype(np.uint8)
    every = np.arange(count)[:, None]
    where = task.places(settings, count, generator)
    if not task.HIDDEN:  # among tokens like its own a value is marked
        rows[every, where[:, :1] - 1] = here
    rows[every, where] = surround + values
    rows[:, length - tokens - 1] = ask
    rows[:, length - tokens :] = ask + 1 + values
    return rows
