"""Recall made to measure: python -m data_prep.synthetic copy|needle --out DIR [--length N ...].

copy    selective copying: `tokens` data tokens lie anywhere among blanks; after a marker the model
        must write them again, in order, reading only the marker, again and again. Gu & Dao 2023
        (arXiv:2312.00752), section 4.1.1, as in Feng et al. 2024 (arXiv:2410.01201).
needle  a marked value of `tokens` tokens among random ones; at the end a marker asks for it. The
        distance from value to answer is one of `distances`, in turn.

A dataset as any other, one document a sequence, with the answers in an alphabet of their own: only
these tokens count in losses (schema.SyntheticInfo).
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.schema import INFO_NAME, SPLITS, DatasetInfo, SyntheticInfo
from data_prep.write import Settings, existing_dataset, seal_dataset, write_part

TASKS = ("copy", "needle")


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
    alphabet = settings.alphabet
    # copy: 0 is blank; needle: 0 .. alphabet - 1 surround it
    surround = 1 if settings.task == "copy" else alphabet
    # surroundings, data, two markers, answers
    scored_from = surround + alphabet + 2
    task = SyntheticInfo(
        task=settings.task,
        sequence_tokens=settings.length,
        scored_from=scored_from,
        scored_tokens=settings.tokens,
        distances=list(settings.distances),
        hidden_as=scored_from - 1 if settings.task == "copy" else None,  # the marker
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
    splits = {}
    for index, split in enumerate(SPLITS):
        count = settings.train if split == "train" else settings.held_out
        generator = np.random.default_rng([settings.seed, index])
        # one sequence more than asked for: the last label of a sequence is the next one's token
        rows = _sequences(settings, count + 1, surround, generator)
        splits[split] = (rows, np.arange(count + 1) * settings.length)
    write_part(part, {name: (rows.ravel(), starts) for name, (rows, starts) in splits.items()})
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
    if settings.task == "needle":
        least, most = settings.tokens + 1, settings.length - settings.tokens - 1
        wrong = [d for d in settings.distances if not least <= d <= most]
        if wrong or not settings.distances:
            raise ValueError(
                f"--distances {','.join(map(str, wrong)) or 'is empty'}: a needle of "
                f"{settings.tokens} tokens in {settings.length} can be {least} to {most} away"
            )


def _sequences(
    settings: SyntheticSettings, count: int, surround: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """[count, length] tokens, the answer last in each row."""
    length, tokens, alphabet = settings.length, settings.tokens, settings.alphabet
    here, ask = surround + alphabet, surround + alphabet + 1  # markers
    values = generator.integers(0, alphabet, (count, tokens))
    rows = generator.integers(0, surround, (count, length)).astype(np.uint8)
    every = np.arange(count)[:, None]
    if settings.task == "copy":
        places = generator.random((count, length - tokens - 1)).argpartition(tokens, axis=1)
        where = np.sort(places[:, :tokens], axis=1)
    else:
        distance = np.resize(settings.distances, count)[:, None]
        where = length - tokens - distance + np.arange(tokens)
        rows[every, where[:, :1] - 1] = here
    rows[every, where] = surround + values
    rows[:, length - tokens - 1] = ask
    rows[:, length - tokens :] = ask + 1 + values
    return rows


def main(argv: list[str]) -> int:
    """Write one dataset; 0 when it worked, 1 with one message on stderr when it did not."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    for name, meaning in (
        ("length", "tokens of a sequence"),
        ("tokens", "tokens of the answer"),
        ("alphabet", "different data tokens"),
        ("train", "sequences to train on"),
        ("held-out", "sequences to evaluate on"),
        ("seed", "of all that is random"),
    ):
        default = getattr(SyntheticSettings, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--distances", default="", help="of the needle, comma-separated")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    try:
        args["distances"] = tuple(int(d) for d in args["distances"].split(",") if d)
        info = prepare_synthetic(SyntheticSettings(**args), out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assert info.synthetic
    print(
        f"{out / INFO_NAME}: {args['task']}, sequences of {info.synthetic.sequence_tokens:,} "
        f"tokens of which {info.synthetic.scored_tokens} count"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
