"""python -m data_prep SOURCE... --out DIR, and python -m data_prep verify DIR."""

import argparse
import os
import sys
from pathlib import Path

from data_prep.write import Settings, prepare


def main(argv: list[str]) -> int:
    """Run one command; 0 when it worked, 1 with one message on stderr when it did not."""
    try:
        return _verify(argv[1:]) if argv[:1] == ["verify"] else _prepare(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130


def _prepare(argv: list[str]) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Write text as MDS shard files of token blocks. Run again after an "
        "interruption, it goes on. `python -m data_prep verify DIR` checks a finished folder.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a text file, .jsonl, .parquet, a folder of them, or `stdlib` (Python's own)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--tokenizer", default=defaults.tokenizer, help="`bytes`, or a tokenizers JSON file"
    )
    parser.add_argument("--field", default=defaults.field, help="field of .jsonl and .parquet")
    parser.add_argument(
        "--held-out",
        type=float,
        default=defaults.held_out,
        help="share of the documents kept for evaluation (default %(default)s)",
    )
    parser.add_argument("--block-size", type=int, default=defaults.block_size, help="tokens")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    settings = Settings(args.tokenizer, args.field, args.held_out, args.block_size)
    info = prepare(args.sources, args.out, settings, max(1, args.workers))
    for name, split in info.splits.items():
        print(
            f"{args.out}/{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.blocks:,} blocks of {info.block_size:,}"
        )
    return 0


def _verify(argv: list[str]) -> int:
    from data_prep.verify import verify

    parser = argparse.ArgumentParser(prog="python -m data_prep verify")
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    faults = verify(folder)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{folder} is whole: hashes, checksums, tokens and documents agree")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
