"""Tasks made to measure: python -m data_prep.synthetic TASK --out DIR [--length N ...].

copy        selective copying: `tokens` data tokens lie anywhere among blanks; after a marker the
            model must write them again, in order, reading only the marker, again and again
needle      a marked value of `tokens` tokens among random ones; at the end a marker asks for it; it
            lies as far back as one of `distances` says, in turn
mqar        `tokens` pairs of key and value; later every key once more, and its value is asked for
variables   three chains of `tokens` assignments; the value of the last name of one is asked for
parity      of ones so far, asked after every one of length / 2 symbols
s5          the product so far of permutations of five things, asked after every one
cycle, even-pairs, majority
            regular languages and counting, asked at the end of problems of one of `distances`
            symbols, in turn: 3..40 are all from 3 to 40
"""

import argparse
import sys

from data_prep.files import folder_here
from data_prep.schema import INFO_NAME
from data_prep.synthetic import TASKS, SyntheticSettings, prepare_synthetic


def main(argv: list[str]) -> int:
    """Write one dataset; 0 when it worked, 1 with one message on stderr when it did not."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", required=True, metavar="DIR")
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
    parser.add_argument("--distances", default="", help="comma-separated; 3..40: all of them")
    args = vars(parser.parse_args(argv))
    try:
        out = folder_here(args.pop("out"))
        args["distances"] = tuple(
            distance for part in args["distances"].split(",") if part for distance in _range(part)
        )
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


def _range(part: str) -> range:
    """One number, or all from one to another."""
    first, _, last = part.partition("..")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"--distances: {part!r} is neither a number nor two, as 3..40") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
