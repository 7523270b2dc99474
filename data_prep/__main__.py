"""python -m data_prep SOURCE... --out DIR, and python -m data_prep verify DIR."""

import argparse
import os
import sys

from data_prep.files import at_home, folder_here
from data_prep.remote import Remote
from data_prep.sources import FORMATS, Selection
from data_prep.sources.storage import is_address
from data_prep.write import Settings, prepare, prepare_remote


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
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files, folders or addresses (s3://...) of them: text, .jsonl, .json, .csv, .tsv, "
        ".parquet, packed (.gz, .bz2, .xz, .zst) or not; or `stdlib`, Python's own library",
    )
    add("--out", required=True, metavar="DIR", help="a folder, or an address (s3://...) of one")
    add(
        "--tokenizer",
        default=defaults.tokenizer,
        help="`bytes`, a Hugging Face tokenizers JSON file, or the folder it lies in",
    )
    add("--field", default="text", help="of records: the text's; within others, a.b")
    add("--format", choices=list(FORMATS), default="", help="of all files, whatever their names")
    add("--include", action="append", default=[], metavar="PATTERN", help="of file names")
    add("--exclude", action="append", default=[], metavar="PATTERN")
    add(
        "--held-out",
        type=float,
        default=None,
        help=f"share of the tokens kept for evaluation (default {defaults.held_out})",
    )
    add(
        "--held-out-from",
        action="append",
        default=[],
        metavar="SOURCE",
        help="what is kept for evaluation, instead of a share",
    )
    add("--block-size", type=int, default=defaults.block_size, help="tokens")
    add(
        "--end-of-document",
        metavar="TOKEN",
        help="put after every document: a token's name, or `new` for one of its own",
    )
    add(
        "--skip-faulty",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N records that are no text, and list them",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="take a tokenizer whose tokens do not decode to the text they are of",
    )
    add("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.held_out is not None and args.held_out_from:
        raise ValueError("--held-out and --held-out-from exclude each other: give one")
    selection = Selection(
        sources=tuple(args.sources),
        held_out_from=tuple(args.held_out_from),
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        kind=args.format,
        field=args.field,
    )
    settings = Settings(
        tokenizer=args.tokenizer,
        held_out=defaults.held_out if args.held_out is None else args.held_out,
        block_size=args.block_size,
        end_of_document=args.end_of_document,
        skip_faulty=args.skip_faulty,
        allow_changes=args.allow_changes,
    )
    workers = max(1, args.workers)
    if is_address(args.out):
        info = prepare_remote(selection, Remote(args.out), settings, workers)
    else:
        out = at_home(args.out.removeprefix("file://"))
        info = prepare(selection, out, settings, workers)
    total = sum(split.tokens for split in info.splits.values())
    for name, split in info.splits.items():
        print(
            f"{args.out}/{name}: {split.documents:,} documents, {split.tokens:,} tokens "
            f"({split.tokens / total:.1%}), {split.blocks:,} blocks of {info.block_size:,}"
        )
    return 0


def _verify(argv: list[str]) -> int:
    from data_prep.verify import verify

    parser = argparse.ArgumentParser(prog="python -m data_prep verify")
    parser.add_argument("folder", metavar="DIR")
    folder = folder_here(parser.parse_args(argv).folder)
    faults = verify(folder)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{folder} is whole: hashes, checksums, tokens and documents agree")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
