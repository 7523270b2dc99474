"""python -m launch keys [WORD]"""

import argparse
import sys

from launch.compare.file import ComparisonFile
from trainer.settings import described

HELP = "every key of a configuration: its type, bounds, default and meaning"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", nargs="?", default="", help="only keys that hold it")


def run(args: argparse.Namespace) -> int:
    found = [row for row in described(ComparisonFile) if args.word in row[0]]
    if not found:
        print(f"no key holds {args.word!r}", file=sys.stderr)
        return 1
    for name, kind, default, meaning in found:
        print(f"{name}={default}\n    {kind}" + (f": {meaning}" if meaning else ""))
    return 0
